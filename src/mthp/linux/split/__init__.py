"""Split folios in place with ``split_huge_pages`` of debugfs: to make mTHPs after a collapse, or to trim zeroes."""
