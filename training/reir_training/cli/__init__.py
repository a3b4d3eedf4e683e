"""The commands `reir train`, `reir calibrate` and `reir data check`."""
