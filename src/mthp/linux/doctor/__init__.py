"""``mthp doctor``: what this kernel and these rights allow, found out by trials, and how to get the rest."""
