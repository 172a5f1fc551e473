"""Training: the sharded, sampled classification head, the margin losses, the trainer."""
