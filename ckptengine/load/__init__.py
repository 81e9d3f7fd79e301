"""The life of a load, from a committed checkpoint back into the user's state."""
