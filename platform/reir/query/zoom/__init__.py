"""The stage of a query that searches the first photos again by zooming in."""
