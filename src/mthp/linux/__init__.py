"""The seam on a live Linux process: procfs, pagemap, kpageflags, sysfs, pidfd, process_madvise."""
