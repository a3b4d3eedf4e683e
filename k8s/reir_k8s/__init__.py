"""Generates the files that Kubernetes, Prometheus and Grafana read; not in the wheel."""
