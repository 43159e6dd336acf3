"""Adapters that act on a residual: at their start they took a part of the base's weights (PiSSA, OLoRA)."""
