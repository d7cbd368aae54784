"""What `mthp demo` shows its work on: a process of its own, with a real library and a realistic heap in it."""
