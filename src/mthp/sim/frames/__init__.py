"""Physical memory: frames and folios, the buddy allocator, the LRU lists' entrance, swap, and memory cgroups."""
