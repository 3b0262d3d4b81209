#!/usr/bin/env bash
# The same by xpk, which writes the JobSet itself, in a cluster made by `xpk cluster create`.
# usage: launch/xpk.sh CLUSTER PROJECT ZONE IMAGE TPU_TYPE run CONFIG --out gs://BUCKET/FOLDER ...
#        (TPU_TYPE: for example v5litepod-16)
set -euo pipefail
cluster=$1 project=$2 zone=$3 image=$4 tpu=$5
shift 5
xpk workload create \
  --cluster "$cluster" --project "$project" --zone "$zone" \
  --workload "ip-jax-$(date +%m%d-%H%M)" --tpu-type "$tpu" --num-slices 1 \
  --docker-image "$image" --max-restarts 50 \
  --env "HF_TOKEN=${HF_TOKEN:-}" \
  --command "ip-jax $(printf '%q ' "$@")"
