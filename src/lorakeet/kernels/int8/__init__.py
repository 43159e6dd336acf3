"""Eight-bit products: ``linear`` (the operation and the choice of back end), ``triton`` (NVIDIA GPUs)."""
