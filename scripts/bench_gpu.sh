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
# Samples of 808 tokens, not 806: FP8's products want a multiple of 16 tokens in a micro batch.
finetune() { bench --config "$root/configs/finetune_7b.yaml" --tokens 808 "$@" model.projector.kind=mlp2x_gelu; }

# The seconds of train to its first step, compiled programs there or not.
start() {
  "$python" -m neva_jax.bench start --config "$root/configs/pretrain_7b.yaml" data.max_length=320 train.micro_batch=32 \
    train.global_batch=32 "$@" model.projector.kind=mlp2x_gelu >>"$out" || echo "failed: start $*" >&2
}

# Full finetuning on one GPU takes nearly all of an H200.
finetune_whole() { XLA_PYTHON_CLIENT_MEM_FRACTION=.96 finetune "$@"; }

unrolled=(train.remat=none train.unroll=32)
# 47 tokens of the template before the image, 42 behind it.
prefix=(--tokens 345 data.template=llama_2 train.labelled_positions=48 train.constant_prefix=47)
if [[ $gpus -eq 1 ]]; then
  one=(--mesh-shape data=1)
  fp8=(--precision fp8_delayed)
  start
  start precision.compute=fp8_delayed
  # 100 steps in both precisions, for their losses.
  pretrain "${one[@]}" --tokens 320 --steps 100 "${fp8[@]}"
  pretrain "${one[@]}" --tokens 320 --steps 100
  finetune_whole "${one[@]}" "${unrolled[@]}" --pack 4 --micro-batch 3 --steps 100 "${fp8[@]}"
  finetune_whole "${one[@]}" "${unrolled[@]}" --pack 4 --micro-batch 3 --steps 100
  pretrain "${one[@]}" --layers 8 --tokens 320 --sweep micro-batch=1,4,16,64 train.unroll=8
  pretrain "${one[@]}" --tokens 320 --sweep layers=8,16,32,40 train.remat=dots train.unroll=1
  pretrain "${one[@]}" --tokens 320 train.labelled_positions=64 "${fp8[@]}"
  finetune "${one[@]}" --baseline hf --micro-batch 4
  pretrain "${one[@]}" --layers 8 --micro-batch 4 --sweep tokens=320,512,1024,2048,4096 \
    train.loss_chunk=512 train.unroll=8
  pretrain "${one[@]}" --tokens 345 data.template=llama_2
  pretrain "${one[@]}" --tokens 345 data.template=llama_2 "${fp8[@]}"
  pretrain "${one[@]}" "${prefix[@]}"
  pretrain "${one[@]}" "${prefix[@]}" "${fp8[@]}"
  pretrain "${one[@]}" --tokens 320 train.labelled_positions=64
  pretrain "${one[@]}" --tokens 320 --baseline hf
  pretrain "${one[@]}" --tokens 320 --baseline hf_checkpointing
  for rows in 3 4; do
    finetune_whole "${one[@]}" "${unrolled[@]}" --pack 4 --micro-batch "$rows"
    finetune_whole "${one[@]}" "${unrolled[@]}" --pack 4 --micro-batch "$rows" --precision fp8_delayed
  done
  finetune "${one[@]}" --baseline hf_checkpointing --micro-batch 8
  pretrain "${one[@]}" --tokens 320 "${fp8[@]}" --data jpeg data.workers=8
  bench --config "$root/configs/pretrain_13b.yaml" --tokens 345 --micro-batch 16 "${one[@]}"
  pretrain "${one[@]}" --tokens 320 --precision fp8_current
  pretrain "${one[@]}" --tokens 320 "${fp8[@]}" precision.fp8.backend=xla
  trace=$(mktemp -d)
  pretrain "${one[@]}" --tokens 320 "${fp8[@]}" --profile "$trace"
  pretrain "${one[@]}" --tokens 320 --profile "$trace"
  # What bit-for-bit repetition costs (docs/reliability.md), and the loop without it.
  pretrain "${one[@]}" --tokens 320 train.remat=dots train.unroll=1
  XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true \
    pretrain "${one[@]}" --tokens 320 train.remat=dots train.unroll=1
  finetune_whole "${one[@]}" --micro-batch 2 --sweep layers=8,16,24,32
else
  # Efficiency needs one GPU of the same machine: two of them at a time, on a card each.
  fp8=(--precision fp8_delayed)
  sequence=mesh.sequence_parallel=true
  CUDA_VISIBLE_DEVICES=0 pretrain --mesh-shape data=1 --tokens 320 &
  CUDA_VISIBLE_DEVICES=1 pretrain --mesh-shape data=1 --tokens 320 "${fp8[@]}"
  wait
  trace=$(mktemp -d)
  # The global batches of the workflow.
  sized() { pretrain --tokens 320 --micro-batch "$1" --global-batch "$2" --steps "$3" "${@:4}"; }
  for size in "32 128 10" "64 512 4"; do
    # shellcheck disable=SC2086
    for mesh in fsdp data; do
      sized $size --mesh-shape "$mesh=$gpus"
      sized $size --mesh-shape "$mesh=$gpus" "${fp8[@]}"
    done
    # shellcheck disable=SC2086
    sized $size --mesh-shape "tensor=$gpus"
    # shellcheck disable=SC2086
    sized $size --mesh-shape "tensor=$gpus" "${fp8[@]}" mesh.overlap=true
  done
  pretrain --mesh-shape "fsdp=$gpus" --tokens 320
  pretrain --mesh-shape "fsdp=$gpus" --tokens 320 "${fp8[@]}"
  # Gathers by the copy engines.
  zero_cta=--xla_gpu_experimental_enable_nccl_symmetric_buffers=true
  XLA_FLAGS=$zero_cta NCCL_CTA_POLICY=2 pretrain --mesh-shape "fsdp=$gpus" --tokens 320
  XLA_FLAGS=$zero_cta NCCL_CTA_POLICY=2 finetune --mesh-shape "fsdp=$gpus" "${unrolled[@]}" --micro-batch 4
  pretrain --mesh-shape "fsdp=$gpus" --tokens 320 "${fp8[@]}" --profile "$trace"
  finetune --mesh-shape "fsdp=$gpus" "${unrolled[@]}" --micro-batch 4 --precision fp8_delayed
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 "${fp8[@]}" mesh.overlap=true
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 "${fp8[@]}"
  for mesh in tensor fsdp; do pretrain --mesh-shape "$mesh=$gpus" --tokens 320 --profile "$trace"; done
  for mesh in data tensor; do pretrain --mesh-shape "$mesh=$gpus" --tokens 320 --micro-batch 64; done
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 --micro-batch 64 "${fp8[@]}"
  for mesh in tensor fsdp; do
    pretrain --mesh-shape "$mesh=$gpus" --tokens 345 data.template=llama_2
    pretrain --mesh-shape "$mesh=$gpus" --tokens 345 data.template=llama_2 "${fp8[@]}"
  done
  finetune --mesh-shape "tensor=$gpus" "${unrolled[@]}" --micro-batch 4 --precision fp8_delayed
  # Weights gathered twice, and not kept (docs/parallelism.md).
  finetune --mesh-shape "fsdp=$gpus" train.unroll=32 train.remat=dots --micro-batch 4
  pretrain --mesh-shape "data=$gpus" --tokens 345 data.template=llama_2
  pretrain --mesh-shape "data=$gpus" --tokens 345 data.template=llama_2 "${fp8[@]}"
  pretrain --mesh-shape "data=$gpus" --tokens 320 "${fp8[@]}"
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 "${fp8[@]}" "$sequence"
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 --micro-batch 64 mesh.overlap=true
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 --micro-batch 64 mesh.overlap=true "${fp8[@]}"
  # What hides communication.
  hidden() { pretrain --mesh-shape "${1:-fsdp}=$gpus" --tokens 320 --layers 16 train.unroll=16; }
  hidden
  XLA_FLAGS=$zero_cta NCCL_CTA_POLICY=2 hidden
  # Transfers inside CUDA graphs, which then may hold no conditional (NCCL's issue 1986).
  graphs=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES
  XLA_FLAGS=--xla_gpu_enable_command_buffer=$graphs hidden
  hidden tensor
  XLA_FLAGS=--xla_gpu_enable_command_buffer=$graphs hidden tensor
  XLA_FLAGS=--xla_gpu_experimental_parallel_collective_overlap_limit=4 hidden
  XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=false hidden
  finetune --mesh-shape "data=$gpus" "${unrolled[@]}" --micro-batch 4 mesh.zero1=true
  for mesh in tensor fsdp; do finetune --mesh-shape "$mesh=$gpus" "${unrolled[@]}" --micro-batch 4; done
  for mesh in tensor fsdp data; do
    pretrain --mesh-shape "$mesh=$gpus" --tokens 320 --global-batch $((32 * gpus)) --steps 100
  done
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 "$sequence"
  pretrain --mesh-shape "tensor=$gpus" --tokens 320 --global-batch $((32 * gpus)) --steps 100 run.seed=1235
  finetune --mesh-shape "tensor=$gpus" --micro-batch 4 --sweep layers=16,20,24,30,32
fi
