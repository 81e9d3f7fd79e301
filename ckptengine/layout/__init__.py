"""Boxes, grids and plans: pure functions over shapes, no I/O."""
