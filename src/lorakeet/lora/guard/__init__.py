"""Guards of every method that changes adapters: usable names, the merged state, and all or nothing."""
