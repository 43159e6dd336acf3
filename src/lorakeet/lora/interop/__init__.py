"""Other libraries around a model: wrappers that rename its parts, and code that asks for ``peft``'s classes."""
