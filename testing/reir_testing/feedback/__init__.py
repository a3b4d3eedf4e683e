"""Users whose feedback is simulated, since the truth is known."""
