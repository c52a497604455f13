"""Reading a device's values without waiting for it."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


class LateReads:
    """Values [N] of a device on their way to the host, first in, first out.

    A host that asks a GPU for a number waits until everything before it is computed, and the GPU
    then waits for the host's next order. So what is pushed is copied in the background, and read
    when the next comes: by then it has long arrived.
    """

    def __init__(self, *, is_late: bool) -> None:
        """is_late: False where nothing is gained by it, on a CPU."""
        self.is_late = is_late
        self.waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def push(self, values: Tensor) -> None:
        """Begin to copy."""
        if values.device.type != "cuda":
            self.waiting.append((values, None))
            return
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.waiting.append((on_host, arrived))

    def pop(self, *, everything: bool) -> Iterator[list[float]]:
        """What was pushed, but for the newest, unless everything is wanted."""
        while len(self.waiting) > (self.is_late and not everything):
            values, arrived = self.waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield values.tolist()
