"""Find the one object that a sentence describes, among millions of photos."""

__version__ = "0.1.0"
