"""Folios split in place through ``split_huge_pages`` of debugfs: made by collapse and split, or trimmed of zeroes."""
