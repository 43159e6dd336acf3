"""Fuzzing of everything that reads files of strangers: targets, mutations, the judge, and inputs that are kept."""
