"""What the mover has to know of each architecture."""
