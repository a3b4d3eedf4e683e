"""Drawn toys with invented names: photos of a style that no shipped model knows."""
