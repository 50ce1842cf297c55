#!/bin/bash
# Inference on a file of any size, on one machine or several that share a file system. Finished answers are kept when the job ends for any reason.
#   sbatch --nodes 4 examples/slurm_infer.sh data/test.csv runs/answers.csv runs/lora_audio/final --base-dir data
#SBATCH --job-name=mdl_infer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@60
set -euo pipefail
input=${1:?give the file to answer}
output=${2:?give the file to write}
model=${3:?give the model}
shift 3

export OMP_WAIT_POLICY=PASSIVE
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 40000))

srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" --max-restarts 0 --no-python \
    mdl_infer "$input" --output "$output" --model-name "$model" --max-new-tokens 256 "$@" &

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1 # nothing to save: all finished answers are on disk
wait $!
