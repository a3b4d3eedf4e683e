"""The built-in gallery: real photos, and sentences whose answers are known."""
