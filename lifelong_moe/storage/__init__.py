"""Files, folders and tables that are whole or absent, locks, and content addresses."""
