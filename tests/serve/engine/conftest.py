"""Fixtures of tiny models in folders."""

from helpers.model_fixtures import base, folder, save_model  # noqa: F401
