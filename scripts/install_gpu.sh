#!/usr/bin/env bash
# Adds the GPU packages to .venv: jax for the CUDA that the driver supports, then Transformer Engine (FP8, packed attention).
#   scripts/install_gpu.sh [--dry-run] [--cuda 12|13] [--te VERSION | --no-te]
#     --dry-run     prints the commands and runs none
#     --cuda N      takes CUDA N whatever nvidia-smi says (to prepare a machine image without a GPU)
#     --te VERSION  exactly this Transformer Engine; see the table in requirements-gpu.txt
#     --no-te       jax only; FP8 then runs on neva_jax's own XLA backend
# Exit status: 0 done; 2 bad usage, or no NVIDIA GPU or driver; 1 anything else.
set -euo pipefail
trap 'exit 130' INT

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
py=.venv/bin/python
state_file=.venv/.neva_setup # scripts/setup.sh explains it

say() { printf 'install_gpu: %s\n' "$*"; }
fail() {
  local status=$1
  shift
  printf 'install_gpu: %s\n' "$@" >&2
  exit "$status"
}

dry='' cuda='' te_version='' te=yes
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry=yes ;;
    --no-te) te='' ;;
    --cuda | --te)
      [[ $# -ge 2 ]] || fail 2 "$1 needs a value"
      if [[ $1 == --cuda ]]; then cuda=$2; else te_version=$2; fi
      shift
      ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) fail 2 "unknown argument: $1 (scripts/install_gpu.sh --help lists them)" ;;
  esac
  shift
done
[[ -z $cuda || $cuda == 12 || $cuda == 13 ]] || fail 2 "--cuda takes 12 or 13, not '$cuda'"

# The newest CUDA that the driver supports; the CUDA libraries themselves come as wheels.
if [[ -z $cuda ]]; then
  command -v nvidia-smi >/dev/null 2>&1 ||
    fail 2 "no NVIDIA GPU or driver here: nvidia-smi is not found (for CPU, scripts/setup.sh is all that is needed)"
  limit=()
  ! command -v timeout >/dev/null 2>&1 || limit=(timeout 60) # nvidia-smi can hang on a broken driver
  rc=0
  answer=$(${limit[@]+"${limit[@]}"} nvidia-smi 2>&1 | tr -d '\0') || rc=$?
  [[ $rc -eq 0 ]] || fail 2 "no usable NVIDIA GPU or driver here: nvidia-smi failed (exit status $rc): ${answer%%$'\n'*}"
  [[ $answer != *"No devices were found"* ]] || fail 2 "no NVIDIA GPU here: nvidia-smi says: No devices were found"
  # "CUDA Version: 13.0"; newer drivers print "CUDA UMD Version: 13.1".
  [[ $answer =~ CUDA( UMD)?\ Version\ *:\ *([0-9]+)\.([0-9]+) ]] ||
    fail 2 "no CUDA version in what nvidia-smi prints, so the driver cannot be judged; if there is a GPU, say --cuda 12 or --cuda 13"
  driver=${BASH_REMATCH[2]}.${BASH_REMATCH[3]}
  if [[ ${BASH_REMATCH[2]} -ge 13 ]]; then
    cuda=13
  elif [[ ${BASH_REMATCH[2]} -eq 12 ]]; then
    cuda=12
  else
    fail 2 "the driver supports CUDA $driver at most; jax needs CUDA 12 or newer: update the NVIDIA driver (525 or newer)"
  fi
  say "the driver supports CUDA $driver: taking jax[cuda$cuda]"
fi

# requirements-gpu.txt with this CUDA in place of the one written there; Transformer Engine apart, it comes last.
jax_packages=() te_packages=()
while IFS= read -r line || [[ -n $line ]]; do
  line=${line%%#*}
  line=${line//[[:space:]]/}
  case $line in
    '' | -*) ;;
    transformer-engine*) te_packages+=("$line") ;;
    *) jax_packages+=("${line//\[cuda12\]/[cuda$cuda]}") ;;
  esac
done <requirements-gpu.txt
[[ -z $te_version ]] || te_packages=("transformer-engine[jax]==$te_version")

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ -z $dry ]] || return 0
  "$@"
}

# While pip writes, .venv counts as unfinished: should this be cut off, scripts/setup.sh makes it anew.
pip_run() {
  local rc=0 owner state
  [[ -n $dry ]] || {
    { IFS= read -r owner && IFS= read -r state; } <"$state_file"
    printf '%s\nbusy\n' "$owner" >"$state_file"
  }
  run "$py" -m pip --disable-pip-version-check "$@" || rc=$?
  [[ -n $dry || $rc -ge 128 ]] || printf '%s\n%s\n' "$owner" "$state" >"$state_file"
  return "$rc"
}

run bash scripts/setup.sh
constraint=()
if [[ -x $py ]]; then
  lock=locks/py$("$py" -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
  [[ ! -f $lock ]] || constraint=(-c "$lock")
elif [[ -n $dry ]]; then
  constraint=(-c "locks/pyXYZ.txt") # its name is known once .venv is there
fi

# Switching between CUDA 12 and 13: both kinds of wheels write to the same folders (nvidia/cudnn, nvidia/nccl), so the
# old ones go first, and Transformer Engine with them, which is linked to one kind.
other=jax-cuda$((25 - cuda))-plugin
if [[ -x $py ]]; then
  installed=() switching=''
  while IFS= read -r name; do
    name=${name%%[= ]*}
    name=${name//_/-}
    [[ $name != "$other" ]] || switching=yes
    [[ $name != @(nvidia-*|jax-cuda*|transformer-engine*) ]] || installed+=("$name")
  done < <("$py" -m pip --disable-pip-version-check list --format freeze 2>/dev/null)
  if [[ -n $switching ]]; then
    say ".venv holds the packages for the other CUDA: removing them first"
    pip_run uninstall -q -y "${installed[@]}" || fail 1 "pip could not remove them: its message is above"
  fi
fi
pip_run install ${constraint[@]+"${constraint[@]}"} -r requirements.txt "${jax_packages[@]}" ||
  fail 1 "pip could not install ${jax_packages[*]}: its message is above"

te_failed() {
  fail 1 "$1" \
    "jax itself is installed: training runs on the GPU, with FP8 on the XLA backend. For Transformer Engine, its JAX part" \
    "is compiled here and needs a C++17 compiler (g++ 9 or newer), the Python headers (python3-dev), and the headers of" \
    "CUDA, cuDNN 9 and NCCL. The wheels bring those; should one be reported missing, install the CUDA $cuda toolkit (nvcc)," \
    "cuDNN's and NCCL's development packages (libcudnn9-dev-cuda-$cuda, libnccl-dev), and run this with" \
    "CPATH=/usr/local/cuda/include LIBRARY_PATH=/usr/local/cuda/lib64." \
    "Another version: scripts/install_gpu.sh --te 2.11.0 (requirements-gpu.txt lists what was tried)."
}

if [[ -n $te ]]; then
  # No build isolation: it would compile against a freshly downloaded jax[cuda12], whatever .venv has.
  # That leaves its build requirements to us; NVTX because its headers are not among those that jax's wheels bring.
  nvtx=nvidia-nvtx
  [[ $cuda != 12 ]] || nvtx=nvidia-nvtx-cu12
  pip_run install ${constraint[@]+"${constraint[@]}"} "setuptools>=77" wheel "pybind11[global]" nvidia-cudnn-frontend "$nvtx" ||
    fail 1 "pip could not install what Transformer Engine's build needs: its message is above"
  [[ -n $dry ]] || command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || te_failed "no C++ compiler (g++) found."

  # Compile and link against the wheels, the ones that will be loaded: a system-wide toolkit, cuDNN or NCCL may be of
  # another version. Before 2.20 Transformer Engine prefers the toolkit, so the wheels' headers and libraries are laid
  # out as one. Wheels have libnccl.so.2 only, the linker wants libnccl.so.
  toolkit=$(mktemp -d)
  trap 'rm -rf -- "$toolkit"' EXIT
  mkdir -- "$toolkit/bin" "$toolkit/include" "$toolkit/lib"
  if [[ -z $dry ]]; then
    # nvcc is asked for its version only, and not every CUDA has it in a wheel.
    runtime=nvidia-cuda-runtime
    [[ $cuda != 12 ]] || runtime=nvidia-cuda-runtime-cu12
    version=$("$py" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$runtime") ||
      te_failed "the package $runtime is not there."
    printf '#!/bin/sh\necho "release %s"\n' "$(cut -d. -f1,2 <<<"$version")" >"$toolkit/bin/nvcc"
    chmod +x "$toolkit/bin/nvcc"
    for folder in .venv/lib/python*/site-packages/nvidia/*; do
      [[ ! -d $folder/include ]] || cp -as -- "$root/$folder/include/." "$toolkit/include/" 2>/dev/null || true
      for library in "$folder"/lib/lib*.so.*; do
        name=${library##*/}
        [[ ! -e $library ]] || ln -sf -- "$root/$library" "$toolkit/lib/${name%%.so.*}.so"
      done
    done
  fi
  export CUDA_HOME=$toolkit CPATH=$toolkit/include${CPATH:+:$CPATH} LIBRARY_PATH=$toolkit/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
  export NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_FRAMEWORK=jax
  say "compiling Transformer Engine's JAX part against the wheels (CUDA_HOME, CPATH, LIBRARY_PATH): some minutes"
  # No cache: pip would take a build of the same version against another jax or CUDA for this one.
  pip_run install ${constraint[@]+"${constraint[@]}"} --no-build-isolation --no-cache-dir "${te_packages[@]}" ||
    te_failed "Transformer Engine did not build: pip's message is above."
fi

[[ -z $dry ]] || exit 0
if ! nvidia-smi >/dev/null 2>&1; then
  say "installed; nothing could be checked, as there is no GPU here"
  exit 0
fi
say "checking"
"$py" -c 'import jax; d = jax.devices("gpu"); print("jax", jax.__version__, "sees", len(d), "x", d[0].device_kind)' ||
  fail 1 "jax does not see the GPU: its message is above"
if [[ -n $te ]]; then
  "$py" -c 'import transformer_engine.jax as _; from importlib.metadata import version; print("transformer-engine", version("transformer-engine"))' ||
    te_failed "Transformer Engine is installed but does not load: its message is above."
fi
say "ready. Activate it with: source .venv/bin/activate"
