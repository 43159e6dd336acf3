"""Fixtures of short trainings."""

from helpers.training_fixtures import _one_thread, collator, make_args  # noqa: F401
