"""PEFT's functions and classes beside the model: state dicts, injection, auto classes, classes of a task."""
