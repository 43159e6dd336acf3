"""Eight-bit products: ``linear`` (the operation), ``format`` (weights and scales), ``registry`` (the back ends)."""
