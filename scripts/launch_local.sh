#!/usr/bin/env bash
# Starts a command as several processes of one run on this machine:
#   scripts/launch_local.sh N [--cpu DEVICES] COMMAND...
#   scripts/launch_local.sh 2 python -m neva_jax.train --config configs/finetune_7b.yaml
#   scripts/launch_local.sh 2 --cpu 4 python -m neva_jax.train --config … --mesh-shape data=8
# Each process gets its share of the GPUs (of CUDA_VISIBLE_DEVICES, or of all), or with --cpu so many made-up devices.
# Lines of output begin with [number of the process]. When one ends badly the others are ended too, and its status is
# the status of this script. SIGTERM and Ctrl-C are passed on: all processes save, then end.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
count=${1:-} && shift || usage
[[ $count =~ ^[1-9][0-9]*$ ]] || usage
cpu=
if [[ ${1:-} == --cpu ]]; then
  cpu=${2:-}
  [[ $cpu =~ ^[1-9][0-9]*$ ]] || usage
  shift 2
fi
(($# > 0)) || usage

# A port that is free now; the first process listens there in a moment.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count PYTHONUNBUFFERED=1
gpus=()
if [[ -n $cpu ]]; then
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$cpu
  # The older way to make up devices, which would contradict it.
  XLA_FLAGS=$(sed 's/--xla_force_host_platform_device_count=[0-9]*//' <<<"${XLA_FLAGS:-}")
  export XLA_FLAGS
else
  visible=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
  IFS=, read -r -a gpus <<<"$visible"
  each=$((${#gpus[@]} / count))
  ((each > 0)) || { echo "launch_local: ${#gpus[@]} GPUs for $count processes; --cpu N makes up devices" >&2 && exit 2; }
fi

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
prefixed() { # NUMBER NAME: a pipe whose lines go, with the number, where this function's own output goes
  mkfifo "$pipes/$1.$2"
  sed -u "s/^/[$1] /" <"$pipes/$1.$2" &
  seds+=($!)
}
pids=() seds=()
for ((i = 0; i < count; i++)); do
  own=("JAX_PROCESS_ID=$i")
  if [[ -z $cpu ]]; then
    own+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:i*each:each}")")
  fi
  prefixed "$i" out
  prefixed "$i" err >&2
  env "${own[@]}" "$@" >"$pipes/$i.out" 2>"$pipes/$i.err" &
  pids+=($!)
done

stop() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM
trap 'stop INT' INT

status=0 timer=
while ((${#pids[@]})); do
  one=0 ended=
  wait -n -p ended "${pids[@]}" $timer 2>/dev/null || one=$?
  [[ -n ${ended:-} ]] || continue # only a signal came
  if [[ $ended == "$timer" ]]; then
    stop KILL
    timer=
    continue
  fi
  remaining=()
  for pid in "${pids[@]}"; do [[ $pid == "$ended" ]] || remaining+=("$pid"); done
  pids=("${remaining[@]}")
  if ((one != 0 && status == 0)); then
    status=$one
    sleep 90 & # the others end by themselves, within a moment or guard.peer_timeout; then they are ended
    timer=$!
  fi
done
[[ -z $timer ]] || kill "$timer"
wait "${seds[@]}" # for the last lines of output
exit "$status"
