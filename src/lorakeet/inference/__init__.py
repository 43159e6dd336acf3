"""Generation and prediction with a loaded model: ``generate``, ``predict``, and ``fast_decode`` for quantized bases."""
