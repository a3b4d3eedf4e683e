"""Training of the relation re-ranker on a frozen `clare-nano`."""
