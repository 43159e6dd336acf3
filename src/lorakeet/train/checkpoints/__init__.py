"""Checkpoints of a training: written whole or absent, verified when read, resumed from exactly."""
