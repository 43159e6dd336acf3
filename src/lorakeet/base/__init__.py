"""Loading of base models: a folder, hub id or GGUF file becomes a frozen model and its tokenizer."""
