"""Recording and alert rules of Prometheus, by subject; `files.py` has them as YAML."""
