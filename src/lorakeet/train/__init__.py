"""The Trainer, exact checkpoints, and a whole run from settings to adapter."""
