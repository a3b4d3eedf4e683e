"""Searches a photo by zooming in."""
END_PROBABILITY = 0.95
