#!/usr/bin/env bash
# Run a recipe on one node of several; start it on each of them.
#
#   NODES=2 NODE=0 MASTER=first-host:29500 recipes/launch/torchrun.sh recipes/sft.py --trainer.strategy fsdp2
#   NODES=2 NODE=1 MASTER=first-host:29500 recipes/launch/torchrun.sh recipes/sft.py --trainer.strategy fsdp2
#
# The folder of the run must be the same on all nodes (a shared file system). When a node dies, the
# others end too; the same commands go on from the last checkpoint, also on fewer or more nodes.
set -euo pipefail

if [[ ${NODES:-1} != 1 && ! ${MASTER:-} =~ .:[0-9]+$ ]]; then
  echo "error: NODES=$NODES needs MASTER=HOST:PORT on every node: node 0 and a free port there" >&2
  exit 1
elif [[ $# = 0 ]]; then
  echo "error: which recipe? recipes/launch/torchrun.sh recipes/sft.py ..." >&2
  exit 1
fi

NODES=${NODES:-1}                       # how many nodes take part
NODE=${NODE:-0}                         # which one this is, from 0
MASTER=${MASTER:-localhost:29500}       # host and free port of node 0
# Devices of this node, the same number on each: its GPUs, or what is given.
DEVICES=${DEVICES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

recipe=$1
shift
exec python -m torch.distributed.run \
  --nnodes="$NODES" --node-rank="$NODE" --nproc-per-node="$DEVICES" \
  --master-addr="${MASTER%:*}" --master-port="${MASTER##*:}" \
  "$recipe" --trainer.num_nodes="$NODES" --trainer.devices="$DEVICES" "$@"
