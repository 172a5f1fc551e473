"""Evaluation: protocols that turn embeddings into published numbers."""
