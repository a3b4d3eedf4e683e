#!/bin/bash
# Runs what the manifests of an overlay say on this machine, without Kubernetes: docs/kubernetes.md.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m reir_k8s.rehearsal "$@"
