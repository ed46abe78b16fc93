"""Detection of tiny objects with a transformer."""
