"""RunConfig to a graph of stage specifications."""
