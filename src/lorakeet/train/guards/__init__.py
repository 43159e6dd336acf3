"""Guards of a training: checks before the first step, rehearsals, and checks of every step."""
