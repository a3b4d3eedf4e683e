"""A faulty endpoint, and planted faults, for tests and benchmarks of `reir build-dataset`."""
