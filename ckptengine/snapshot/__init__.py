"""From tensors to the bytes of an archive: the arena, and the copy into it."""
