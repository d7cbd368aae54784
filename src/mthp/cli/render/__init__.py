"""How results look on a terminal, apart from the commands that produce them."""
