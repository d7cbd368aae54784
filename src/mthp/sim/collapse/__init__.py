"""Collapse: the steps of khugepaged and MADV_COLLAPSE in PMD ranges."""
