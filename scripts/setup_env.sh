#!/usr/bin/env bash
# Prints a Python that has this project's packages, first making .venv where there is none.
#   PYTHON=$(bash scripts/setup_env.sh [MODULE ...])     MODULE: what it must have besides
# $PYTHON is taken as it is, if it has what every run needs. An active virtual or conda environment is
# taken if it has them all.
set -euo pipefail
cd "$(dirname "$0")/.."

needed="absl accelerate diffusers matplotlib ml_collections peft torch transformers"
modules="$needed datasets open_clip wandb"

say() { echo "$*" >&2; }  # stdout is for the answer

missing_modules() {
    local python=$1
    shift
    "$python" - "$@" <<'EOF'
import importlib.util, sys
sys.path.remove("")  # or the wandb/ folder that runs leave here would pass for the package
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])
EOF
}

find_base_python() {
    local python usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))'
    for python in python3 python3.{14,13,12,11,10} python; do
        if "$python" -c "$usable" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    say "error: no Python >= 3.10 with venv found: install one (Debian, Ubuntu: python3-venv)"
    return 2
}

if [ -n "${PYTHON:-}" ]; then
    missing=$(missing_modules "$PYTHON" $needed "$@")
    if [ -n "$missing" ]; then
        say "error: PYTHON=$PYTHON lacks $missing: unset it to use .venv, or install" \
            "'-r requirements.lock.txt -e .[dev]' there"
        exit 2
    fi
    echo "$PYTHON"
    exit
fi

active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -x "$active/bin/python" ] &&
    missing=$(missing_modules "$active/bin/python" $modules "$@") && [ -z "$missing" ]; then
    say "Using the active environment $active"
    echo "$active/bin/python"
    exit
fi

stamp=$(cat pyproject.toml requirements.lock.txt | cksum)
if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
    base=$(find_base_python)
    say "Making .venv with $("$base" --version): downloads several GB, which takes some minutes"
    "$base" -m venv .venv >&2
    .venv/bin/python -m pip install --disable-pip-version-check \
        -r requirements.lock.txt -e ".[dev,tensorboard]" >&2
    echo "$stamp" >.venv/stamp
fi
say "Using $PWD/.venv"
echo "$PWD/.venv/bin/python"
