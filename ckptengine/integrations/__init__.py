"""Checkpoints and exact resume for trainers: one module for each, which imports its own trainer only."""
