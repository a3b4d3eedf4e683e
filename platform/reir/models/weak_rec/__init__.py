"""Weakly supervised referring expression comprehension: the parts of RefCLIP and CMA."""
