"""What each method may spend, and how many epochs that is for it: --budget. No torch, no settings.

    budget = Budget.parse("flops=patches@50")
    budget.epochs_at(20.8, point=25)  # 10: after half of its own 20.8 epochs

A method's epochs are a real number: its last epoch ends at the step at which the budget does. Rounds
before end with whole epochs, those nearest to the wanted shares, since checkpoints bear their number.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, Self

from common.options import MOST_EPOCHS
from mae.masking import METHODS

_FORMS = re.compile(
    r"flops=(?P<method>\w+)@(?P<flops>\d+)|gpu-hours=(?P<hours>\d+(\.\d+)?)|epochs=(?P<epochs>\d+)",
    re.ASCII,
)
_PERCENT = 100  # of hours: the parts in which rounds are counted


@dataclass(frozen=True, kw_only=True)
class Budget:
    """kind: in what. amount: epochs of `method`, hours of all devices together, or own epochs."""

    kind: Literal["flops", "gpu-hours", "epochs"]
    amount: float
    method: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the option. Raises ValueError."""
        found = _FORMS.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"--budget is {text[:80]!r}; give flops=METHOD@EPOCHS, gpu-hours=N or epochs=N")
        kind: Literal["flops", "gpu-hours", "epochs"]
        kind = "gpu-hours" if found["hours"] else "flops" if found["flops"] else "epochs"
        amount = float(found["hours"] or found["flops"] or found["epochs"])
        if kind != "gpu-hours" and not 1 <= amount <= MOST_EPOCHS:
            raise ValueError(f"--budget is {text[:80]!r}; give 1 to {MOST_EPOCHS} epochs")
        if not 0 < amount < 1e9:
            raise ValueError(f"--budget is {text[:80]!r}; give hours above 0")
        if found["method"] and found["method"] not in METHODS:
            raise ValueError(f"--budget is {text[:80]!r}; choose a method of {', '.join(METHODS)}")
        return cls(kind=kind, amount=amount, method=found["method"] or "")

    @property
    def parts(self) -> int:
        """In how many parts --eval-freq and the like count: epochs as given, or percent of the hours."""
        return _PERCENT if self.kind == "gpu-hours" else int(self.amount)

    def epochs_at(self, end: float, point: int) -> int:
        """The whole epochs of a method of `end` epochs, 0 < end, after so many parts of the budget."""
        return epochs_at(end, point, self.parts)

    def check_end(self, method: str, end: float) -> None:
        """Raise ValueError for epochs that cannot be."""
        if not 0 < end <= MOST_EPOCHS:
            raise ValueError(
                f"--budget {self}: that is {end:.3g} epochs of {method}; give more than 0 and at most "
                f"{MOST_EPOCHS}"
            )

    def __str__(self) -> str:
        method = f"{self.method}@" if self.method else ""
        return f"{self.kind}={method}{self.amount:.12g}"


def in_words(asked: str, *, counts_segments: bool) -> str:
    """A budget, and whether making the segments is a part of it."""
    return f"{asked}, segments {'' if counts_segments else 'not '}counted"


def epochs_at(end: float, point: int, parts: int) -> int:
    """See `Budget.epochs_at`; the report asks it of a budget that it reads."""
    last = math.ceil(end)
    return (
        0
        if point == 0
        else last
        if point >= parts
        else min(last, max(1, math.floor(end * point / parts + 0.5)))
    )
