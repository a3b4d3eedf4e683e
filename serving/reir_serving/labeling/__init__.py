"""A page on this machine that asks a user which objects sentences describe."""
