"""The query path: from the request of a user to ranked hits, in the order in which it runs."""
