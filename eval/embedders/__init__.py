"""Networks as functions from faces to embeddings, and what they read."""
