"""Rank analysis: the singular values of an adapter's update, the rank that they need, and an adapter of that rank."""
