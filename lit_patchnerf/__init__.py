"""A video as a network: neural video representation patch by patch, with words to search it."""
