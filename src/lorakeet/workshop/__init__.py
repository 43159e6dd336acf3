"""Workshop of trained adapters: combine them into a new one, and compare two by their updates and on data."""
