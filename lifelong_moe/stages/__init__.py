"""The content-addressed stage store: keys, manifests, atomic commit, lock, lineage."""
