"""The command line, and a folder for each group of commands."""
