"""Canonical rows to token ids and labels."""
