"""Compression: codes of weights and latents, an entropy coder, and the `.lpn` file."""
