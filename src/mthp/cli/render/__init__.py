"""Printing of results on a terminal, apart from the commands that produce them."""
