"""What preflight checks: the machine, its links, its interfaces."""
