"""Where the bytes of checkpoints lie: an abstract storage, and local and shared file systems."""
