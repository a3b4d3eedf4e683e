"""What tests and benchmarks of training share."""
