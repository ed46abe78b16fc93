"""Deep-supervision U-Nets for volumes."""
