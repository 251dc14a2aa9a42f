#!/usr/bin/env bash
# Two machines, or more. Run the same line on each of them, with another first argument:
#
#   bash torchrun.sh 0 10.0.0.1 --data /shared/flowers --output /shared/runs     # on the first, whose address is 10.0.0.1
#   bash torchrun.sh 1 10.0.0.1 --data /shared/flowers --output /shared/runs     # on the second
#
# NODES, PROCESSES, PORT and RESTARTS can be set before it, say NODES=4 PROCESSES=8. Where a machine has several
# networks, name the one to use: NCCL_SOCKET_IFNAME=eth1, GLOO_SOCKET_IFNAME=eth1.
set -euo pipefail

node=$1
first=$2
shift 2

# A process that dies ends the others; torchrun starts them again up to three times, and train.py goes on at its last
# checkpoint. is_host says who keeps the list of machines, which torchrun can otherwise only guess from host names.
# By itself torchrun hands the started-again processes the addresses of those before them (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
    --nnodes "${NODES:-2}" \
    --nproc-per-node "${PROCESSES:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:${PORT:-29500}" \
    --rdzv-id "${JOB:-train}" \
    --rdzv-conf "is_host=$((node == 0))" \
    --max-restarts "${RESTARTS:-3}" \
    "${TRAIN:-$(dirname "$0")/train.py}" "$@"
