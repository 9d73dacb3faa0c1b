#!/usr/bin/env bash
# Checks style and runs the tests, in an environment made on first use.
#   bash scripts/test.sh [--all] [arguments of pytest]     --all: with the long ones, 20 minutes
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # for an environment without this package
PYTHON=$(bash scripts/setup_env.sh datasets open_clip wandb pytest xdist hypothesis ruff) || exit
selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    selection=()
    shift
fi
status=0
"$PYTHON" -m ruff check . || status=1
"$PYTHON" -m ruff format --check . || status=1
"$PYTHON" -m pytest -q -n auto --dist worksteal "${selection[@]}" "$@" || status=1
exit $status
