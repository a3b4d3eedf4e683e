"""The published CLARE model, one module for each part of the architecture."""
