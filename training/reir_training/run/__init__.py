"""A training run: workers, training loop, schedule, saved states and metrics."""
