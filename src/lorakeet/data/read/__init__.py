"""Bytes of files and hub data sets to records, each with its location."""
