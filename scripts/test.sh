#!/usr/bin/env bash
# Checks style and runs the tests, in an environment made on first use.
#   bash scripts/test.sh [arguments of pytest]
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # for an environment without this package
PYTHON=$(bash scripts/setup_env.sh pytest xdist hypothesis ruff) || exit
status=0
"$PYTHON" -m ruff check . || status=1
"$PYTHON" -m ruff format --check . || status=1
"$PYTHON" -m pytest -q -n auto --dist worksteal "$@" || status=1
exit $status
