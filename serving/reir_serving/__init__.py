"""The query service (Ray Serve)."""
