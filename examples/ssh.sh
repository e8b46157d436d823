#!/bin/bash
# Machines that ssh reaches, nothing else:   HOSTS="node0 node1" GPUS=8 ./ssh.sh PHOTOS LABELS ENCODING RUN MODEL [EPOCHS]
# All see the same photos, the same RUN and this folder under the same paths. The first machine holds the rendezvous: the job outlives
# every other one, from MIN machines on (1 unless given); where the first is lost, start the same command again, and the run goes on.
set -u
read -r -a hosts <<< "$HOSTS"
here=$(cd "$(dirname "$0")" && pwd)
port=${PORT:-29500}
args=$(printf ' %q' "$here/my_training.py" "$@")
start="torchrun --nnodes ${MIN:-1}:${#hosts[@]} --nproc-per-node ${GPUS:-8} --max-restarts 3 --rdzv-backend c10d --rdzv-id ${ID:-resnet} \
--rdzv-endpoint ${hosts[0]}:$port"
# Without the second variable a machine that joins later is never told where the others are (seen with PyTorch 2.15)
env="OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 RESNET_FASTAI_TIMEOUT=${RESNET_FASTAI_TIMEOUT:-600}"

pids=()
for host in "${hosts[@]}"; do
    conf=is_host=$([ "$host" = "${hosts[0]}" ] && echo true || echo false)
    ${SSH:-ssh} "$host" "cd $(printf %q "$PWD") && exec env $env $start --rdzv-conf $conf $args" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
