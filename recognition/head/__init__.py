"""The classification layer: `PartialFC`, its class rows, and the forms of its reduction."""

from recognition.head.partial_fc import PartialFC

__all__ = ["PartialFC"]
