"""`reir demo` and the small gallery that it makes."""
