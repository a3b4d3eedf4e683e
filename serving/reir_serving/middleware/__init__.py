"""What every request passes before it reaches a route: admission, authentication, limits, logs."""
