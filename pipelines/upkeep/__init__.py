"""Commands around the store: `gc`, `sync`, `ui`."""
