"""The embedded store: Milvus Lite in a process of its own, journals, and exact search."""
