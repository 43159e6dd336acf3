"""Callbacks of the Trainer: progress and metrics, Ctrl-C, and the checks of each step."""
