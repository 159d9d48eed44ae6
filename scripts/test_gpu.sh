#!/usr/bin/env bash
# The tests that need a GPU, on the machine that has one:   scripts/test_gpu.sh [pytest options]
# (The other tests' conftest.py hides GPUs, hence --confcutdir.)
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m pytest -p no:cacheprovider --confcutdir=tests/gpu tests/gpu "$@"
