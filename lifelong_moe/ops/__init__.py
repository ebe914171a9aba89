"""Pure tensor functions: dispatch and combine, router losses, cross-entropy and KL in chunks."""
