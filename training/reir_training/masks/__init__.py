"""Trains the mask head of a finished `clare-nano`."""
