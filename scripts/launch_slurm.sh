#!/usr/bin/env bash
# A job of several machines with GPUs under SLURM. Copy it, change the lines that say so, and
#   sbatch scripts/launch_slurm.sh --config configs/finetune_7b.yaml --mesh-shape data=-1,fsdp=8
# It goes on by itself: SIGTERM comes five minutes before the time limit (and when a job of higher priority takes the
# machines); the run saves, ends with status 143, and the job is queued again. The same command continues the run.
# run.dir must lie on a disk that all machines share.

# --- change: machines, GPUs, time; and #SBATCH --account, --partition as your cluster wants them
#SBATCH --job-name=neva_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=04:00:00

# One process per GPU, as above, or one per machine (--ntasks-per-node=1 and --cpus-per-task=96): both work. One per GPU
# gives each its own data workers, so set data.workers to what one GPU needs.

# --- keep: to the job's steps, not to this script
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -uo pipefail
cd -- "${SLURM_SUBMIT_DIR:?start it with sbatch}"

# --- change: where Python is
export PATH=$PWD/.venv/bin:$PATH

trap ':' TERM # a preempted job gets it here too, and waits for its step to save
# Each process finds its number and the address of the first from what srun tells it. A process that ends badly ends the
# others; --wait is for one that cannot be ended so. (--kill-on-bad-exit would take a saved run's 143 for bad.)
srun --wait=120 --cpus-per-task="$SLURM_CPUS_PER_TASK" python -m neva_jax.train "$@" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended only the waiting
  status=0
  wait "$step" || status=$?
done

if ((status == 143)); then
  echo "stopped and saved; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
