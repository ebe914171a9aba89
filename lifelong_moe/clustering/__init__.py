"""FAISS: features of tokens and documents, k-means, balanced assignment; NumPy in and out."""
