"""A real system with Prometheus and Alertmanager, and faults that its alerts must report."""
