"""Patches that make models of transformers faster, each verified against the model's own forward."""
