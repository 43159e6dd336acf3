"""Algebra of adapters: their updates decomposed, pruned, added up, and cut to a rank."""
