"""Which checkpoints exist: manifest, commit, generations, leases, listing, retention."""
