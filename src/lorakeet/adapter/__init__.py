"""The adapter's files: ``serialization`` (read, write), ``peft_model`` (methods), ``model_card``, ``inspect``, ``hub``."""
