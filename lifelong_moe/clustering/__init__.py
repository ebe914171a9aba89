"""FAISS clusters of tokens and documents: features, k-means, balanced assignment. NumPy in and out."""
