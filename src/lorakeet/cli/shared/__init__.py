"""Flags derived from the settings, the progress bar, and the pages of the reference: parts of several commands."""
