"""The rows that forwards have used since the last optimiser step, and what their backwards left."""

from __future__ import annotations

from recognition.rows import SampledRows, merge


class MicroSteps:
    """Union and sum over the micro-steps of one optimiser step. At most one gradient of the rows
    stands beside the sum, and none where all rows are sampled: there they share it."""

    def __init__(self) -> None:
        self.open: list[SampledRows] = []  # of forwards since the last optimiser step
        self.done: SampledRows | None = None  # union and sum of their backwards

    def add(self, rows: SampledRows) -> None:
        """A forward that learns has begun.

        Raises:
            RuntimeError: it is the second of a step whose backward updates the rows.
        """
        if rows.sink is not None and self.open:
            raise RuntimeError(
                "update_in_backward keeps no gradient to add to: one forward for each step, no "
                "accumulation"
            )
        self._collect()
        if rows.index is None and self.done is not None:
            rows.grad = self.done.grad  # all rows: later backwards add in place
        self.open.append(rows)

    def sampled(self) -> SampledRows:
        """Union and sum so far.

        Raises:
            RuntimeError: there was no backward.
        """
        self._collect()
        if self.done is None:
            raise RuntimeError("no gradient of sampled classes: call loss.backward() first")
        return self.done

    def clear(self) -> None:
        self.open.clear()
        self.done = None

    def _collect(self) -> None:
        """Add what backwards have left in the open forwards to the sum."""
        for rows in self.open:
            if rows.sink is not None:
                self.done = rows if rows.is_finished else None
            if rows.grad is None or (self.done is not None and rows.grad is self.done.grad):
                continue
            grad, rows.grad = rows.grad, None
            part = rows.with_gradient(grad)
            self.done = part if self.done is None else merge(self.done, part)
