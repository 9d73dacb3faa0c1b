"""Checks and measures this project on a machine with one GPU: `bash scripts/check_gpu.sh`."""
