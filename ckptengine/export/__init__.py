"""Checkpoints written in the formats of other libraries, streamed through a bounded memory."""
