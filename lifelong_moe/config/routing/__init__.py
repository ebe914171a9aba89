"""Routing sections: what every router has, and each router's own settings. Torch-free."""
