#!/usr/bin/env bash
# A TPU slice by a queued resource: waits for it, runs the command in the image on every host, gives it back at the end.
# Started again after a preemption, it asks for a new slice and the run goes on from its checkpoint.
# usage: launch/queued_resource.sh PROJECT ZONE IMAGE TPU_TYPE RUNTIME run CONFIG --out gs://BUCKET/FOLDER ...
#        (TPU_TYPE and RUNTIME: for example v5litepod-16 v2-alpha-tpuv5-lite; EXTRA=--spot for spare capacity)
set -euo pipefail
project=$1 zone=$2 image=$3 tpu=$4 runtime=$5
shift 5
name=ip-jax-$(date +%m%d-%H%M)
where=(--project "$project" --zone "$zone")
trap 'gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet' EXIT
gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" --accelerator-type "$tpu" --runtime-version "$runtime" ${EXTRA:-}
until state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format 'value(state.state)') && [ "$state" = ACTIVE ]; do
  case $state in FAILED | SUSPENDED) echo "the queued resource $name is $state" >&2; exit 1 ;; esac
  sleep 30
done
registry=${image%%/*}
gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command \
  "sudo gcloud auth configure-docker $registry --quiet && sudo docker run --rm --privileged --net=host --stop-timeout 120 -e HF_TOKEN=${HF_TOKEN:-} -v /tmp/cache:/cache $image $(printf '%q ' "$@") --distributed"
