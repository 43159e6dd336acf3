"""Bases held in fewer bits."""
