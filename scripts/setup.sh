#!/usr/bin/env bash
# Makes .venv in the repository root with everything that neva_jax and its tests need (CPU).
#   scripts/setup.sh                      picks a Python by itself
#   PYTHON=python3.12 scripts/setup.sh    takes this one
# Run it as often as you like: with nothing changed it ends at once, and what an interrupted run left is made anew.
# Exit status: 0 ready; 2 no usable Python, or a .venv in the way; 1 anything else.
set -euo pipefail
# pip ends a Ctrl-C with an ordinary status, after which this script would go on.
trap 'exit 130' INT

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
[[ ${PYTHON:-} != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
cd -- "$root"
venv=.venv
py=$venv/bin/python
# Line 1: the path that this .venv was made at, or "other" when somebody else made it (a moved one has wrong paths in
# its scripts). Line 2: "busy" while packages are being written, "failed", or what was installed.
state_file=$venv/.neva_setup
log=$venv/setup.log

say() { printf 'setup: %s\n' "$*"; }
fail() {
  local status=$1
  shift
  printf 'setup: %s\n' "$@" >&2
  exit "$status"
}

# Two runs at once would write the same files. The lock is the folder itself, so no lock file is left behind.
if command -v flock >/dev/null 2>&1; then
  exec 9<"$root"
  if ! flock -n 9; then
    say "another set-up is running here; waiting for it"
    flock 9 || true # a file system without locks: go on without
  fi
fi

# ---------------------------------------------------------------------------------------------- choosing a Python
# Prints: "version real-path missing-modules". Real path, because a pyenv shim or an active .venv may be what was found.
# shellcheck disable=SC2016
probe='
import importlib, sys
missing = []
for name in ("venv", "ensurepip", "ssl", "ctypes"):
    try:
        importlib.import_module(name)
    except ImportError:
        missing.append(name)
base = sys.executable if sys.prefix == sys.base_prefix else getattr(sys, "_base_executable", sys.executable)
print("%d.%d.%d" % sys.version_info[:3], ",".join(missing) or "-", base)
'
chosen='' chosen_version='' reasons=() packages=()

# consider NAME: sets chosen, or adds to reasons and packages.
consider() {
  local name=$1 answer version missing real minor package
  command -v -- "$name" >/dev/null 2>&1 || { reasons+=("$name: not found") && return 1; }
  # A pyenv shim exists for versions that are not active, and fails when run.
  answer=$("$name" -c "$probe" 2>/dev/null) || { reasons+=("$name: found, but it does not run") && return 1; }
  read -r version missing real <<<"$answer"
  minor=${version#*.} minor=${minor%%.*}
  if [[ ${version%%.*} != 3 || $minor -lt 11 || $minor -gt 13 ]]; then
    reasons+=("$name: is $version; 3.11, 3.12 or 3.13 is needed")
    return 1
  fi
  if [[ $missing != - ]]; then
    reasons+=("$name: is $version but lacks the standard modules ${missing//,/, }")
    [[ $missing == *ensurepip* || $missing == *venv* ]] || return 1
    package=python3-venv # Debian's name for the default Python's; the others carry the version
    [[ ${name##*/} == python3.* ]] && package=python3.$minor-venv
    packages+=("$package")
    return 1
  fi
  chosen=$real chosen_version=$version
}

choose_python() {
  local name
  if [[ -n ${PYTHON:-} ]]; then
    consider "$PYTHON" || true
  else
    # The default one first: least surprise. Then the newest.
    for name in python3 python3.13 python3.12 python3.11; do
      consider "$name" && break
    done
  fi
  [[ -z $chosen ]] || return 0
  {
    if [[ -n ${PYTHON:-} ]]; then
      echo "setup: the Python that PYTHON names cannot be used:"
    else
      echo "setup: no usable Python. Needed: Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip. Tried:"
    fi
    printf 'setup:   %s\n' "${reasons[@]}"
    if grep -qsiE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release; then
      # One package is enough: the first named belongs to the first Python that would do.
      echo "setup: on this system, as root: apt-get update && apt-get install ${packages[0]:-python3 python3-venv}"
      [[ ${#packages[@]} -gt 0 ]] ||
        echo "setup: if its python3 is older than 3.11 or newer than 3.13: apt-get install python3.12 python3.12-venv (or 3.11, 3.13)"
    else
      echo "setup: install one of them, or name it: PYTHON=/path/to/python3.12 scripts/setup.sh"
    fi
  } >&2
  exit 2
}

# ------------------------------------------------------------------------------------------------ state of the .venv
owner='' state=''
read_state() {
  owner='' state=''
  [[ -f $state_file ]] || return 0
  { IFS= read -r owner && IFS= read -r state; } <"$state_file" || true
}
write_state() { printf '%s\n%s\n' "$owner" "$1" >"$state_file.new" && mv -f -- "$state_file.new" "$state_file"; }

# What has to be installed, as one line: the Python and a hash of the requirement and lock files. Fails when .venv's
# Python does not run or has no pip.
wanted() {
  "$py" - 2>/dev/null <<'PY'
import hashlib, importlib.util, pathlib, sys
if importlib.util.find_spec("pip") is None or not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(1)
digest = hashlib.sha256()
for name in ("requirements.txt", "requirements-dev.txt", "locks/py%d%d.txt" % sys.version_info[:2]):
    path = pathlib.Path(name)
    digest.update(name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b"") + b"\0")
print("python %d.%d.%d" % sys.version_info[:3], digest.hexdigest())
PY
}

make_venv() {
  choose_python
  say "using Python $chosen_version ($chosen)"
  rm -rf -- "$venv"
  mkdir -- "$venv"
  # Marked as ours, and as unfinished, before anything is in it.
  owner=$root
  write_state busy
  "$chosen" -m venv -- "$venv" ||
    fail 1 "'$chosen -m venv' failed (its message is above); on Debian or Ubuntu, apt-get install python3-venv helps"
}

want=''
if [[ -e $venv || -L $venv ]]; then
  read_state
  want=$(wanted) || want=''
  rebuild=''
  if [[ -z $owner ]]; then
    [[ -n $want ]] || fail 2 \
      ".venv is here already, was not made by this script, and has no working Python 3.11 to 3.13 with pip." \
      "It is left alone. Move it away, or delete it (rm -rf '$root/.venv'), and run this again."
    say "note: .venv was made by something else; it is kept, and the packages are installed into it"
    owner=other
  elif [[ $owner != other && $owner != "$root" ]]; then
    rebuild="was made at another path ($owner)"
  elif [[ -z $want ]]; then
    rebuild="has a Python that no longer works"
  elif [[ $state == busy ]]; then
    rebuild="was left unfinished by an interrupted run"
  elif [[ -n ${PYTHON:-} ]]; then
    choose_python
    [[ "$want" == "python $chosen_version "* ]] || rebuild="has another Python than the $chosen_version asked for"
  fi
  if [[ -n $rebuild ]]; then
    [[ $owner != other ]] || fail 2 ".venv $rebuild; it was not made by this script and is left alone." \
      "Delete it (rm -rf '$root/.venv') and run this again."
    say ".venv $rebuild: making it anew"
    make_venv
    state=''
    want=$(wanted)
  fi
else
  make_venv
  want=$(wanted)
fi

version=${want#python }
version=${version%% *}
if [[ $state == "$want" ]]; then
  say "ready (Python $version, nothing to do)"
  exit 0
fi

# ---------------------------------------------------------------------------------------------------------- install
minor=${version%.*}
lock=locks/py${minor/./}.txt
constraint=()
if [[ -f $lock ]]; then
  constraint=(-c "$lock")
  say "installing requirements.txt and requirements-dev.txt at the versions of $lock (about 100 packages, 1 to 3 minutes)"
else
  say "installing requirements.txt and requirements-dev.txt; no lock for Python $minor, so the newest that fit (1 to 5 minutes)"
fi

# pip in full goes to the log; what shows that it moves, and what went wrong, to the screen.
pip_install() {
  local status=0 before
  before=$(wc -l <"$log")
  "$py" -m pip --disable-pip-version-check install --progress-bar off "$@" 2>&1 | tee -a "$log" |
    awk '/^ *(Downloading|Using cached|Processing) / { sub(/^ *(Downloading|Using cached|Processing) /, ""); sub(/ \(.*/, ""); sub(/.*\//, "")
                                                       print "  got " $0; fflush(); next }
         /^ *(Building|Installing)/ { print "  " substr($0, 1, 100); fflush() }
         /^ *ERROR|Retrying|rror:/ { print "  " substr($0, 1, 300); fflush() }' || status=${PIPESTATUS[0]}
  [[ $status -ne 0 ]] || return 0
  if [[ $status -lt 128 ]] && ! tail -n "+$((before + 1))" "$log" | grep '^Installing collected' >/dev/null; then
    write_state failed # it did not come to writing, so the next run can go on with this .venv
  fi
  local why="pip failed (exit status $status); the whole output is in $root/$log"
  if grep -qE 'No space left on device' "$log"; then
    fail 1 "$why" "The disk is full: about 1.5 GB is needed."
  elif grep -qE 'Retrying|Max retries|ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Name or service not known|resolve host' "$log"; then
    fail 1 "$why" "The package registry could not be reached: check the network, or pip's settings for a proxy or a mirror" \
      "(pip config list; PIP_INDEX_URL, HTTPS_PROXY), and run this again: it goes on from here."
  elif [[ ${#constraint[@]} -gt 0 ]] && grep -q 'No matching distribution found' "$log"; then
    fail 1 "$why" "A version in $lock has no package for this system or is gone; delete that line or the file, and run this again."
  fi
  fail 1 "$why"
}

: >"$log"
write_state busy
# ${array[@]+...}: bash before 4.4 takes an empty array for an unset variable.
pip_install ${constraint[@]+"${constraint[@]}"} -r requirements.txt -r requirements-dev.txt
# Editable, so that python -m neva_jax.… works from any folder and not only from the root; it fetches setuptools from the
# same registry for the build, and installs nothing but a path entry and the metadata.
pip_install --no-deps -e .

say "checking that the packages import"
JAX_PLATFORMS=cpu TRANSFORMERS_VERBOSITY=error "$py" -c 'import jax, flax, optax, orbax.checkpoint, grain, sentencepiece, transformers' ||
  fail 1 "the packages were installed but do not import: the message above says which"
"$py" -m pip --disable-pip-version-check check ||
  say "note: pip sees the conflicts above; packages that you added to .venv yourself may cause them"
for plugin in "$venv"/lib/python*/site-packages/jax_cuda*_plugin; do
  [[ ! -e $plugin ]] || say "note: .venv holds the GPU packages; run scripts/install_gpu.sh to bring them to the same versions"
done
write_state "$want"
say "ready. Activate it with: source .venv/bin/activate"
