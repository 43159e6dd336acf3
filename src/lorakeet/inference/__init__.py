"""Generation and prediction with an opened model: ``generate``, ``predict``, and ``fast_decode`` for 8-bit bases."""
