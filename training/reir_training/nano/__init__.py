"""Training of `clare-nano`, from the cached output of its frozen part."""
