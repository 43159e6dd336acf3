"""Generation and prediction with a loaded model: ``generate``, ``predict``, and ``fast_decode`` for 8-bit bases."""
