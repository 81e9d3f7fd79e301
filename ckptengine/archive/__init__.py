"""The file format: one ZIP archive per rank that is a Zarr v3 store. `docs/format.md` specifies it."""
