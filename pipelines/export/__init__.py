"""`lifelong-moe export`: a model as a folder that others read."""
