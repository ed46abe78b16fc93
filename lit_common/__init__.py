"""Parts that more than one task stands on: loaders, the learning-rate course, the optimizer, captured steps."""
