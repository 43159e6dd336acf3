"""The adapter's files: ``serialization`` (read, write), ``peft_model`` (its methods), ``model_card``, ``inspect``, ``hub``."""
