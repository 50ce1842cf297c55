#!/bin/bash
# Training on one machine. Shortly before the time limit, the run saves and stops, and the job is requeued and resumes.
#   sbatch examples/slurm_one_node.sh examples/lora_audio.yaml
#SBATCH --job-name=mdl_train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# USR1 to this script 5 minutes before the end: more than a step and a checkpoint take
#SBATCH --signal=B:USR1@300
set -euo pipefail
config=${1:?give the configuration file of mdl_train}
shift

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270 # seconds that the launcher gives its processes to save
export OMP_WAIT_POLICY=PASSIVE

srun accelerate launch --config_file examples/ddp.yaml --num_processes "${SLURM_GPUS_ON_NODE:-8}" --no_python \
    mdl_train --config "$config" --resume-from-checkpoint true "$@" &
run=$!

# On SIGTERM, srun would kill its tasks; scancel sends the signal to the tasks themselves
again=no
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM # preemption: Slurm signals the tasks and requeues the job

code=0
while kill -0 "$run" 2>/dev/null; do wait "$run" && code=0 || code=$?; done
if [ "$again" = yes ] && [ "$code" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
