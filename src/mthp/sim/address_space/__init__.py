"""What programs do to their address spaces: accesses with their page faults, and system calls."""
