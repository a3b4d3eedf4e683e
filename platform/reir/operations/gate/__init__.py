"""The gate of a re-indexing job: compares a candidate version with the live one."""
