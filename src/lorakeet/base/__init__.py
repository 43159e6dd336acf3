"""A model directory, hub id or GGUF file becomes a frozen model and its tokenizer."""
