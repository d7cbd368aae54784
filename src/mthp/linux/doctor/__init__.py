"""``mthp doctor``: what this kernel and these rights allow, found by trials, and how to get the rest."""
