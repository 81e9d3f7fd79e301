"""torch for the engine; `adapter` registers itself when it is imported."""
