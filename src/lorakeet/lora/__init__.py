"""The method: ``config`` (settings), ``linear`` (the equation), ``layer`` (its contract), ``inject``, ``model``, ``merge``."""
