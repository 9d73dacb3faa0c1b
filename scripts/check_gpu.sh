#!/usr/bin/env bash
# Checks and measures this project on a machine with one GPU: traces of the official code, tiny runs,
# full-size iterations with random weights. Needs no network; a line for each check, then a table.
#   bash scripts/check_gpu.sh [--out DIR] [--seconds N] [--only NAME ...]     compilation comes last
#   bash scripts/check_gpu.sh --cpu        every check at tiny size on a CPU, to find their own faults
#   bash scripts/check_gpu.sh --pack [PYTHON_VERSION]     before, where there is a network: wheels of
#       what a machine with PyTorch, transformers, accelerate and peft lacks, into .wheels
# Python: $PYTHON, else the .venv of this folder, else python3, where .wheels are installed if need be.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
packages="diffusers open-clip-torch wcwidth datasets multiprocess dill ml-collections ftfy importlib-metadata"

if [ "${1:-}" = --pack ]; then
    version=${2:-3.12}
    platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 39 35 34 31 28 27 24 17)
    # shellcheck disable=SC2086
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
        --implementation cp $platforms --platform manylinux2014_x86_64 --dest .wheels \
        --constraint requirements.lock.txt $packages
    du -sh .wheels
    exit
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # for an environment without this package
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false
if ! "$PYTHON" -c "import diffusers, open_clip, datasets, ml_collections" 2>/dev/null; then
    [ -d .wheels ] || {
        echo "error: $PYTHON lacks the packages: run \`bash scripts/setup_env.sh\`, or, for a machine" \
            "without a network, \`bash scripts/check_gpu.sh --pack\` where there is one" >&2
        exit 2
    }
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --root-user-action=ignore .wheels/*.whl
fi
exec "$PYTHON" -m spo.gpu_check "$@"
