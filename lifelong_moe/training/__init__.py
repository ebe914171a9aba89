"""One stage from beginning to end: restore, grow, freeze, train, commit."""
