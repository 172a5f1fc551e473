"""What every package shares: errors, files, text, locks. It imports nothing else of ours."""
