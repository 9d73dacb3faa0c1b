#!/usr/bin/env bash
# Trains a step-aware preference model on all GPUs of this machine; --cpu: on the CPU.
#   bash launch_spm.sh [--cpu] [--num_processes N] [--config=FILE] [--config.key=value ...]
# Python: $PYTHON, else the .venv of this folder, else python3.
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # for an environment without this package
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
"$PYTHON" -c "import ml_collections" 2>/dev/null || {
    echo "error: $PYTHON lacks the packages: run \`bash scripts/setup_env.sh\` first, or, without a GPU," \
        "\`bash launch_tiny.sh\`, which trains a tiny model on the CPU" >&2
    exit 2
}
exec "$PYTHON" -m spo.launch scripts/train_preference_model.py "$@"
