"""Page tables: finding, removing and splitting the entries that map a frame, and reading them through the seam."""
