"""What a program does to its address space: accesses and their faults, and system calls."""
