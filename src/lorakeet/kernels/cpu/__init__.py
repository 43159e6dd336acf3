"""Compiled loops on a CPU: ``bindings`` compiles and calls ``csrc``; ``memory`` holds short-lived buffers."""
