"""Runs what the manifests say on this machine: `k8s/rehearse.sh`."""
