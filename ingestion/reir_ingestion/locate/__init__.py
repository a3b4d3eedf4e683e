"""`reir locate`: which photos of a source have a described object, without an index."""
