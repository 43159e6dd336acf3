"""Initializations of A and B by name (``init_lora_weights``): one file for each method.

- :mod:`.random`: the default, ``gaussian`` and ``orthogonal``; B·A = 0
- :mod:`.pissa` and :mod:`.olora`: from the base's weight, of which they take a part (:mod:`.taken_part`)
- :mod:`.loftq`: from what quantization loses of the weight
- :mod:`.eva`: from the inputs of the layers on data
"""
