"""What a person reads about a run: data checks, dry run, calibration, model card."""
