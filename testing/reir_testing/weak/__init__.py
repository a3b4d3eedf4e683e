"""What tests and benchmarks of learning without boxes share."""
