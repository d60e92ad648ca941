"""How fast PMC runs, side by side with the plain way of doing it."""
