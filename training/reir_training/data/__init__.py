"""Training data, for all models: annotations, sampling, augmentation and leakage checks."""
