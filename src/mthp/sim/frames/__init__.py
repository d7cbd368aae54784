"""Physical memory: frames and folios, the buddy allocator, the LRU lists' batch, swap, and memory cgroups."""
