"""Committed checkpoints on their way from one storage to another."""
