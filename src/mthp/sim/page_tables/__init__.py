"""Page tables: what maps a frame, how entries are taken away and split, and what the seam sees of them."""
