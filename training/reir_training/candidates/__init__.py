"""Training of the candidate head of a finished `clare-nano`."""
