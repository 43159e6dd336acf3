"""PEFT's names for what a model and its layers with adapters are and do, for code that was written for ``peft``."""
