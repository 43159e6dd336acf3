"""Calls of tools: the forms that chat templates state, a reader of answers in pieces, and grammars for calls."""
