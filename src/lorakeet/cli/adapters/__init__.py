"""Commands on adapters: inspect, rank, compare, combine, extract, push; one file a command."""
