"""Facts about a base that config, tokenizer and weights may state differently: one function for each.

No other module reads these fields by itself; a test holds that.
"""
