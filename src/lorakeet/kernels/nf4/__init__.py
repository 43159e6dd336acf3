"""Four-bit products: ``linear`` (the operation), ``format`` (codes and scales), ``triton`` (NVIDIA GPUs)."""
