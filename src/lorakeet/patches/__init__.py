"""Foreign models made faster, each change held against the model's own forward."""
