"""Page tables: finding, removing, splitting and reading entries."""
