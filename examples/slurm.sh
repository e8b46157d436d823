#!/bin/bash
# Four machines with eight GPUs each under SLURM:   sbatch slurm.sh PHOTOS LABELS ENCODING RUN MODEL [EPOCHS]
# One task a GPU; each becomes a rank. The job asks for SIGTERM two minutes before its time is over (or on preemption):
# the run writes a checkpoint and ends, and the job goes back into the queue and goes on there, on as many GPUs as it gets then.
#SBATCH --job-name=resnet
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
here=${SLURM_SUBMIT_DIR:-$(dirname "$0")}
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)     # rank 0 runs on the first machine
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))                                # jobs that share it do not collide
export RESNET_FASTAI_TIMEOUT=${RESNET_FASTAI_TIMEOUT:-600}                          # seconds after which a rank that hangs ends the job

srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python "$@"' task "$here/my_training.py" "$@" &
job=$!
stopped=
trap 'stopped=yes; kill -TERM "$job"' TERM                                          # srun passes it on to every rank
wait "$job"; code=$?
if [ -n "$stopped" ]; then
    wait "$job"                                                                     # the checkpoint is being written
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
