"""Collapse: what khugepaged and MADV_COLLAPSE do to PMD ranges, step by step."""
