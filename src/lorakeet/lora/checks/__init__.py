"""Checks of an adapted model: ``merge_loss`` (what a number format keeps of an update), ``merge_probe`` (outputs)."""
