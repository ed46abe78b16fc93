"""Where CLIP embeddings come from: encoders and files, and the table of a video's patches that training aims at."""

from lit_patchnerf.clip.providers import Provider, open_provider
from lit_patchnerf.clip.targets import embedding_table

__all__ = ["Provider", "embedding_table", "open_provider"]
