"""One operation a file: the slow truth in plain torch, its fast paths, and the choice between them."""
