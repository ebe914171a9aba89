"""Several processes that take training steps together, and the main process that watches over them."""
