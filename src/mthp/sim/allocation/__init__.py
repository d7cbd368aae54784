"""Allocation when memory is short, compaction, migration, reclaim, and deliberate fragmentation."""
