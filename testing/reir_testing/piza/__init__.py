"""What tests and benchmarks of PIZA need: large generated scenes, and a small grounding model."""
