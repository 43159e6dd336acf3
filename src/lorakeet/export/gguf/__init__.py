"""GGUF, the format of llama.cpp: names and order of the tensors by architecture, vocabulary, and the writing of a file."""
