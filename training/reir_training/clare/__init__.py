"""Training of the published CLARE: data, losses, matching, and the task that combines them."""
