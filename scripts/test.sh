#!/usr/bin/env bash
# Set-up, lint, format check and tests, as CI runs them. Arguments go to pytest:
#   scripts/test.sh tests/models -k rope
#   scripts/test.sh --thorough                            the cases too that CI leaves out
#   scripts/test.sh --cov=neva_jax --cov-report=term      with line coverage: a fifth slower
# All steps run, so that one call shows everything; the exit status is the first failing step's.
set -euo pipefail
trap 'exit 130' INT

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bash scripts/setup.sh
py=$root/.venv/bin/python

export JAX_PLATFORMS=cpu
# One thread a worker in the libraries that would otherwise take every core each: two workers already fill two cores.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export TF_CPP_MIN_LOG_LEVEL=2 MPLBACKEND=agg
# Nothing here may depend on a model hub.
export HF_HUB_OFFLINE=1

status=0 failed=''
step() {
  local name=$1 rc=0
  shift
  printf 'test: %s\n' "$name"
  "$@" || rc=$?
  if [[ $rc -ne 0 ]]; then
    failed+="${failed:+, }$name"
    [[ $status -ne 0 ]] || status=$rc
  fi
}

step "ruff check" "$py" -m ruff check
step "ruff format --check" "$py" -m ruff format --check
step "pytest" "$py" -m pytest -n 2 --dist worksteal "$@"
[[ $status -eq 0 ]] || printf 'test: failed: %s\n' "$failed" >&2
exit "$status"
