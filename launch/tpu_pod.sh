#!/usr/bin/env bash
# Training on a TPU pod slice: launch/tpu_pod.sh create | setup | train | status | delete, in this order.
# After a preemption: delete, create, setup, train again; training goes on where it stopped.
set -euo pipefail
# ==== edit from here ==================================================================================================
NAME=rice
ZONE=us-west4-a
TYPE=v5litepod-256                # 64 hosts of 4 chips
RUNTIME=v2-alpha-tpuv5-lite
SHARE=10.0.0.2:/share             # an NFS export (Filestore) that every host mounts at /mnt/rice
WORKDIR=/mnt/rice/runs/rice
DATA=/mnt/rice/data/lpr4m         # a converted set
CONFIG=pod:b32                    # a batch of 32,768: docs/scaling.md has what fits on which slice
INIT_FROM=/mnt/rice/ViT-B-32.pt   # CLIP's weights: docs/weights.md
# ==== to here =========================================================================================================
queue() { gcloud compute tpus queued-resources "$@" --zone "$ZONE"; }
on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }

case "${1:-}" in
  create) queue create "$NAME" --node-id "$NAME" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot ;;
  setup)
    tar -C "$(dirname "$0")/.." --exclude .git --exclude '.venv*' --exclude build -czf "/tmp/$NAME.tar.gz" .
    gcloud compute tpus tpu-vm scp "/tmp/$NAME.tar.gz" "$NAME:" --zone "$ZONE" --worker=all
    on_all "set -e; sudo apt-get install -y nfs-common; sudo mkdir -p /mnt/rice
      mountpoint -q /mnt/rice || sudo mount $SHARE /mnt/rice; sudo chmod a+w /mnt/rice
      mkdir -p rice_jax; tar -C rice_jax -xzf $NAME.tar.gz
      pip3 install --user --quiet uv; python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
      python3 -m uv pip install --quiet --python .venv/bin/python './rice_jax[tpu]'"
    ;;
  # Which worker this is, of how many, the machine's metadata say. It runs on when the connection breaks. The secret is
  # made anew for each job: no other process can join the run.
  train)
    secret=$(mktemp)
    head -c 32 /dev/urandom | base64 > "$secret"
    gcloud compute tpus tpu-vm scp "$secret" "$NAME:$NAME.secret" --zone "$ZONE" --worker=all
    rm "$secret"
    on_all "nohup .venv/bin/python -m rice_jax.train --config $CONFIG --workdir $WORKDIR \
      --config.data.path=$DATA --config.init_from=$INIT_FROM --secret-file $NAME.secret --wait 120 >> train.log 2>&1 < /dev/null &"
    ;;
  status) on_all "tail -n 3 train.log" && queue describe "$NAME" --format "value(state.state)" ;;
  delete) queue delete "$NAME" --force --quiet ;;
  *) sed -n '2,3s/^# //p' "$0" >&2 && exit 2 ;;
esac
