"""Hidden states to `Routing`: the interface, capacity, auxiliary losses, the registry."""
