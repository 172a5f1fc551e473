"""A run: its state, the training loop, and all that surrounds a step."""
