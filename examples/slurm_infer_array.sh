#!/bin/bash
# Inference by independent jobs, each with one GPU: they start whenever there is a GPU for them, share the rows, and may end at any time.
#   sbatch --array 1-64 examples/slurm_infer_array.sh data/test.csv runs/answers.csv runs/lora_audio/final --base-dir data
#SBATCH --job-name=mdl_infer
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
input=${1:?give the file to answer}
output=${2:?give the file to write}
model=${3:?give the model}
shift 3

if [ -e "$output" ]; then
    echo "$output: the others have answered all rows"
    exit 0
fi

export OMP_WAIT_POLICY=PASSIVE
exec mdl_infer "$input" --output "$output" --model-name "$model" --max-new-tokens 256 --join true "$@"
