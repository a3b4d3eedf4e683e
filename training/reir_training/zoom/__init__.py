"""Zoom into large photos: mosaics of annotated photos, in which instances are small."""
