#!/usr/bin/env bash
# The rows of docs/performance.md, on the GPUs of this machine, the most wanted first: about a minute each.
#   scripts/bench_gpu.sh docs/results/DATE_train_CARD.jsonl [flags for every row, as --steps 20 or --tiny]
# Rows are appended as they come, so it may be stopped at any time; one that fails is a row that says so.
# Then: python -m neva_jax.bench report
set -uo pipefail
out=$1
shift
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PYTHON:-python3}
gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
common=(--limit 150 "$@")

bench() {
  "$python" -m neva_jax.bench train "${common[@]}" "$@" >>"$out" || echo "failed: $*" >&2
  echo "$SECONDS s: $(tail -n 1 "$out" | cut -c 1-200)"
}
pretrain() { bench --config "$root/configs/pretrain_7b.yaml" --micro-batch 32 "$@" model.projector.kind=mlp2x_gelu; }
finetune() { bench --config "$root/configs/finetune_7b.yaml" --tokens 806 "$@" model.projector.kind=mlp2x_gelu; }

if [[ $gpus -eq 1 ]]; then
  one=(--mesh-shape data=1)
  pretrain "${one[@]}" --tokens 320
  pretrain "${one[@]}" --tokens 320 --precision fp8_delayed precision.fp8.amax_history=1 precision.fp8.amax_algorithm=most_recent
  pretrain "${one[@]}" --tokens 320 --precision fp8_current
  pretrain "${one[@]}" --tokens 320 --baseline hf
  pretrain "${one[@]}" --tokens 320 --baseline hf_checkpointing
  finetune "${one[@]}" --pack 3 --micro-batch 2 train.remat=dots
  finetune "${one[@]}" --pack 3 --micro-batch 2 train.remat=full
  finetune "${one[@]}" --pack 3 --micro-batch 2 --precision fp8_current train.remat=full
  finetune "${one[@]}" --baseline hf_checkpointing --sweep micro-batch=4,8
  pretrain "${one[@]}" --tokens 320 --data jpeg
  pretrain "${one[@]}" --tokens 345 data.template=llama_2
  pretrain "${one[@]}" --tokens 345 --precision fp8_delayed data.template=llama_2
  bench --config "$root/configs/pretrain_13b.yaml" --tokens 345 --micro-batch 16 "${one[@]}"
  trace=$(mktemp -d)
  pretrain "${one[@]}" --tokens 320 --profile "$trace"
  pretrain "${one[@]}" --tokens 320 --profile "$trace" --precision fp8_delayed
  finetune "${one[@]}" --micro-batch 2 train.remat=full --sweep layers=8,16,24,32
  pretrain "${one[@]}" --layers 8 --micro-batch 4 --sweep tokens=320,512,1024,2048,4096 train.loss_chunk=512
  pretrain "${one[@]}" --layers 8 --tokens 320 --sweep micro-batch=1,4,16,64
  pretrain "${one[@]}" --tokens 320 --sweep layers=8,16,32,40
else
  # Efficiency needs one GPU of the same machine.
  CUDA_VISIBLE_DEVICES=0 pretrain --mesh-shape data=1 --tokens 320
  trace=$(mktemp -d)
  for mesh in data fsdp tensor; do
    for micro in 32 64; do
      pretrain --mesh-shape "$mesh=$gpus" --tokens 320 --micro-batch "$micro"
    done
    pretrain --mesh-shape "$mesh=$gpus" --tokens 320 --profile "$trace"
    pretrain --mesh-shape "$mesh=$gpus" --tokens 320 --global-batch $((32 * gpus)) --steps 100
    finetune --mesh-shape "$mesh=$gpus" --micro-batch 4 train.remat=full
  done
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 mesh.sequence_parallel=true
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 --global-batch $((32 * gpus)) --steps 100 run.seed=1235
  finetune --mesh-shape "tensor=$gpus" --micro-batch 4 --sweep layers=16,20,24,30,32
fi
