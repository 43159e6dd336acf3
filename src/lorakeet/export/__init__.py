"""Models and adapters made for other tools: merged, quantized, in GGUF, for vLLM and for mlx-lm."""
