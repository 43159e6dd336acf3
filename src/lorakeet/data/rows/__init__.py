"""Records to canonical rows of one kind of data; mixing and splitting."""
