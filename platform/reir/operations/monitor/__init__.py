"""The monitor: measures what no request can, and exports it to Prometheus."""
