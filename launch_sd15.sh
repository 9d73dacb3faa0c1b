#!/usr/bin/env bash
# Trains Stable Diffusion 1.5 on all GPUs of this machine.
#   bash launch_sd15.sh [--num_processes N] [--config=FILE] [--config.key=value ...]
# Python: $PYTHON, else the .venv of this folder, else python3.
set -euo pipefail
cd "$(dirname "$0")"
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
exec "$PYTHON" -m spo.launch train_sd15.py "$@"
