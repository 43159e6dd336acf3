"""The method: ``config`` (settings), ``layer`` (the equation), ``inject`` (plan, then act), ``model`` (verbs), ``merge``."""
