"""Evaluation protocols, and the commands that run them."""
