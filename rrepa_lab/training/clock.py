"""How much of a training step is spent waiting for its images."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class StepClock:
    """Measures steps from the request of a batch to the end of the computation; what lies between steps does not count.

    Example:
        >>> clock = StepClock()
        >>> for batch in clock.timed([1, 2, 3]):
        ...     clock.end()
        >>> 0 <= clock.share() <= 1, clock.share()
        (True, None)
    """

    def __init__(self) -> None:
        self.began = self.arrived = self.waited = self.total = 0.0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, each of whose arrival is awaited on the clock."""
        iterator = iter(batches)
        while True:
            self.began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.arrived = time.perf_counter()
            yield batch

    def end(self) -> None:
        """The computation of this step is over."""
        self.waited += self.arrived - self.began
        self.total += time.perf_counter() - self.began

    def share(self) -> float | None:
        """Part of the time of the steps since the last call that was waiting; None if there was no step."""
        share = self.waited / self.total if self.total else None
        self.waited = self.total = 0.0
        return share
