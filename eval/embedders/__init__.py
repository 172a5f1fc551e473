"""Networks as functions from faces to embeddings, and the images that they read."""
