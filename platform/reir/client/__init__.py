"""The HTTP client of a server that `reir serve` runs."""
