"""Evaluation: protocols that turn embeddings into published numbers.

Letters in all files of the package: N images, n images of a batch, P pairs, T templates, Q probes,
D embedding size, U distinct scores. A file with letters of its own lists them.
"""
