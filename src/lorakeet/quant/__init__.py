"""Quantized weights: their contract, the 8-bit format, and how models are loaded in it."""
