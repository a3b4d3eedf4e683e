"""Indexing and evaluation on Ray: the cluster, the Ray Data job and its workers."""
