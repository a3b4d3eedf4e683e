"""Training of PIZA: a grounding model learns to zoom in on what an expression describes."""
