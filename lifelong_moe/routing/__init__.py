"""Hidden states to `Routing`: one file a router, one registry."""
