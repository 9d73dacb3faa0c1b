#!/usr/bin/env bash
# Trains the embedded tiny model on the CPU, in an environment made on first use.
#   bash launch_tiny.sh [--num_processes N] [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=$(bash scripts/setup_env.sh)
# More threads only wait for each other on tensors this small.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m spo.launch --cpu train_sd15.py --config=config/tiny.py "$@"
