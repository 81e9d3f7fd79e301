"""What a framework tells the engine about its objects, and the registry of the frameworks that are there."""
