"""Training of `clare-nano` together with the coarse part of its crop network."""
