#!/bin/bash
# The same command in several processes by torchrun, on one machine or several; processors only, no GPUs.
#
#   trimtab quickstart                                             makes the models that this run begins with
#   PROCESSES=4 bash examples/scale/torchrun.sh                    on one machine
#   NODES=2 NODE=0 HEAD=10.0.0.1 bash examples/scale/torchrun.sh   on the first of two machines, whose address is HEAD
#   NODES=2 NODE=1 HEAD=10.0.0.1 bash examples/scale/torchrun.sh   on the second
#
# Several machines need the same secret in TRIMTAB_GROUP_KEY (openssl rand -hex 32), a directory that all of them see, and
# a network that is theirs: ports 29500 and 29501 of the first, and others that torch chooses.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}             # threads of each process

torchrun --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "${PROCESSES:-2}" \
  --master-addr "${HEAD:-127.0.0.1}" --master-port 29500 \
  -m trimtab run examples/online/grpo.toml --out runs/torchrun
