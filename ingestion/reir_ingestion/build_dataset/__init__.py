"""`reir build-dataset`: writes and filters expressions about the instances of anybody's photos."""
