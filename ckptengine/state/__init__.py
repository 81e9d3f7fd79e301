"""What a training state is made of: leaves, typed values, per-rank values."""
