"""Attention within packed samples: ``pattern``, ``segment`` (reference and choice), ``backends`` (GPUs), ``cpu``."""
