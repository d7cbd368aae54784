"""The program that `mthp demo` works on: a separate process with a real library and a realistic heap."""
