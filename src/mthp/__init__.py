"""khugepaged with multi-size transparent huge pages, in user space."""
