"""Zooming into a photo with the instances of an encoder: frames, looks, and policies."""
