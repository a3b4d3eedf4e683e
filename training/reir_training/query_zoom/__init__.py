"""Training of the zoom policy of a frozen `clare-nano`."""
