"""Processes of a run: runtime, collectives, watchdog, preemption."""
