"""A run on disk, readable without torch."""
