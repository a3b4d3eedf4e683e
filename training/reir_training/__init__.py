"""CLARE training in two stages, on Ray Train with DeepSpeed."""
