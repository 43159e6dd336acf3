"""Operations, one a file: the reference in plain torch, its fast paths, and the choice between them."""
