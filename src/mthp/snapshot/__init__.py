"""The seam on a file: a recorded address space, stored as Parquet."""
