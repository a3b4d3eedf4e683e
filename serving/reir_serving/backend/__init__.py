"""What the HTTP routes call: the service, its workers, models and batching. Knows no HTTP."""
