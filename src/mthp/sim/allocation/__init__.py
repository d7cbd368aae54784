"""Where folios come from when few are free: compaction, migration and reclaim; and memory fragmented to order."""
