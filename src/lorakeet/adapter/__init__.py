"""The artefact on disk: ``artefact`` (read, write, check), ``model`` (the verbs on a model), ``card``, ``inspect``, ``push``."""
