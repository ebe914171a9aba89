"""Short stories over `lifelong_moe`, one file each, and the command line over them."""
