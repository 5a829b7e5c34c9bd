"""What to do when a batch does not fit the device's memory: take it in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from kvutils.errors import MemoryLimitError

log = logging.getLogger(__name__)
T, R = TypeVar("T"), TypeVar("R")


def in_halves(run: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """run(items), one result per item; where memory does not suffice, the results of its halves, one after the other.

    A smaller batch may change the last bits of a result (as another GPU does), so it is logged. Raises
    MemoryLimitError where a single item does not fit.
    """
    try:
        return run(items)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        said = str(error).splitlines()[0]
    # Out of the handler: it would hold the frames, and with them the tensors, of what has failed.
    clear_device_cache(garbage_collection=True)
    if len(items) == 1:
        raise MemoryLimitError(
            f"one image does not fit the memory that is left ({said}). Free the device of other work, use a smaller model "
            "or a lower resolution (base_view_only=True for LLaVA, max_pixels for Qwen), fewer layers, or a larger device."
        )
    half = len(items) // 2
    log.warning("a batch of %d does not fit the memory: taken in halves (%s)", len(items), said)
    return in_halves(run, items[:half]) + in_halves(run, items[half:])
