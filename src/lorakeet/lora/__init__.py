"""The method: ``config`` (settings), ``linear`` (the equation), ``layer`` (contract), ``inject``, ``model``, ``merge``."""
