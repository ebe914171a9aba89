"""One file a router."""
