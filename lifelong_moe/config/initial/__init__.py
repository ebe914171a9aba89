"""The first configuration for somebody's own text. Pure, torch-free."""
