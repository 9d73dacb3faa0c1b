#!/usr/bin/env bash
# Trains Stable Diffusion 1.5 on all GPUs of this machine.
#   bash launch_sd15.sh [--num_processes N] [--config=FILE] [--config.key=value ...]
# Python: $PYTHON, else the .venv of this folder, else python3.
set -euo pipefail
cd "$(dirname "$0")"
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
"$PYTHON" -c "import ml_collections" 2>/dev/null || {
    echo "error: $PYTHON lacks the packages: run \`bash scripts/setup_env.sh\` first, or, without a GPU," \
        "\`bash launch_tiny.sh\`, which trains a tiny model on the CPU" >&2
    exit 2
}
exec "$PYTHON" -m spo.launch train_sd15.py "$@"
