"""Attention within packed samples: ``segment`` (reference and choice), ``cpu``, ``backends`` (GPUs)."""
