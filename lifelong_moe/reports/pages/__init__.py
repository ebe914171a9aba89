"""Pages for a browser: one file each, without scripts and addresses of others."""
