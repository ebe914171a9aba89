"""`lifelong-moe compare`: arms with several seeds, side by side."""
