"""Fixtures of short trainings."""

from helpers.training_fixtures import _one_thread, base_folder, collator, make_args, settings  # noqa: F401
