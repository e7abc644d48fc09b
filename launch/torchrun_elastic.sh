#!/usr/bin/env bash
# One agent of an elastic job. The same command on every node; nodes may be lost and come back while it runs.
#
#   HEAD=10.0.0.1 NODES=1:4 launch/torchrun_elastic.sh run lm/pretrain data.train=/shared/text.jsonl --name mine
#
# HEAD is the address of one of the nodes, which must outlive the others: it keeps what the agents know. NODES is
# LEAST:MOST. After a loss the rest starts again from the newest checkpoint, on as many processes as there are. The
# run folder stands on a disk that all nodes see. Also: PORT (29500), PROCESSES on a node (one for each GPU), RESTARTS
# (10), JOB (the same on all, if several jobs share HEAD and PORT).
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # seconds in which ranks save
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else a node that comes later waits for an address in vain

exec torchrun --nnodes "${NODES:-1:2}" --nproc_per_node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-10}" \
  --rdzv_backend c10d --rdzv_endpoint "${HEAD:?the address of one of the nodes}:${PORT:-29500}" \
  --rdzv_id "${JOB:-scaletrain}" -m scaletrain "$@"
