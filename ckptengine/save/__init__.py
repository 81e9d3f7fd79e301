"""The life of a save, from the user's state to the commit."""
