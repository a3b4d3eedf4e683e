#!/bin/bash
# Starts a RayJob of the applied overlay, as a copy named NAME-run: docs/kubernetes.md. The RayJob itself
# stays suspended: `kubectl apply -k` would suspend it again, and KubeRay deletes the cluster of a
# suspended job.
set -euo pipefail
if [[ $# != 1 ]]; then
  echo "usage: k8s/start.sh NAME; the name is reir-index or reir-train" >&2
  exit 2
fi
# What the cluster has added to the RayJob must not be in the copy.
copy='{
  "metadata": {
    "name": "'"$1"'-run",
    "annotations": null, "finalizers": null, "resourceVersion": null, "uid": null
  },
  "spec": {"suspend": false},
  "status": null
}'
kubectl -n reir get rayjob "$1" -o yaml \
  | kubectl patch --local -f - --type merge -p "$copy" -o yaml \
  | kubectl create -f -
