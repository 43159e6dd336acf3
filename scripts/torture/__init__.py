"""Torture of a training run: kills at random moments, full disks, damaged checkpoints; ``python -m torture`` runs it."""
