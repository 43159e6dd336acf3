"""The artefact on disk: ``artefact`` (read, write, check), ``model`` (its verbs), ``card``, ``inspect``, ``push``."""
