"""Plan of a run before its base is read: rows, passes measured on a model cut to a few layers, memory, time and disk."""
