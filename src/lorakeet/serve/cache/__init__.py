"""Keys and values of the server: pages, the cache of transformers over them, and prefixes that are found again."""
