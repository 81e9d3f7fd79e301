"""When a save is due, and what happens when the job is told to end."""
