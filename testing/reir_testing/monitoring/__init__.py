"""Runs the whole platform under Prometheus, and evaluates and draws its dashboards."""
