"""Which samples training uses, in which order, and which it has used."""
