"""Serving of many adapters on one base: ``engine`` (no HTTP), ``compiled`` (a fast forward), ``http``."""
