"""The same checkpoints in shared memory, on the local disk and in the run's own place."""
