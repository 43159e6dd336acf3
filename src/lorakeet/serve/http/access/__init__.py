"""Access to the server: keys, and the gate before every route."""
