"""The life of adapters on a model: its class while it has any, their names, the merged state, and all or nothing."""
