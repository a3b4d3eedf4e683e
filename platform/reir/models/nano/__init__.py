"""`clare-nano`, the CLARE dual stream at a size that runs on two CPU cores."""
