"""One stage from beginning to end: restore, freeze, grow, train, commit."""
