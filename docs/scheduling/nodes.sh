#!/bin/sh
# A run on two machines by torchrun. On the first: nodes.sh 0 FIRST-MACHINE; on the second: nodes.sh 1 FIRST-MACHINE
cd "${LIFELONG_HOME:-/srv/lifelong-moe}" || exit 2
exec .venv/bin/torchrun --nnodes=2 --node-rank="$1" --master-addr="$2" --master-port=29500 --nproc-per-node=1 --no-python \
  .venv/bin/lifelong-moe run configs/quickstart.yaml trainer.num_nodes=2 trainer.accelerator=cpu trainer.devices=2
