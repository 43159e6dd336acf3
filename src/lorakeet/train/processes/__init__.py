"""Several processes: the launch, agreement at the start, errors that end all of them, and a base sharded over them."""
