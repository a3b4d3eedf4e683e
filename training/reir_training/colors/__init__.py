"""Training of the color head of a frozen `clare-nano`."""
