"""Bodies of requests: each field is bounded, honoured, or refused by its name."""
