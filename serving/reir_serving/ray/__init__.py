"""The processes of a server: Ray Serve's deployments, their start, HAProxy and draining."""
