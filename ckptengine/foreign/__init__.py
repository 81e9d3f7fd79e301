"""Checkpoints of other libraries as sources: each format gives the loader one description, and nothing is run."""
