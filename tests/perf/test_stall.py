"""The device that sleeps, on a clock that only moves when somebody waits."""

import pytest
import torch

from perf import stall

LOADING, PASS = 0.5, 1.0  # seconds of a micro-batch


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    found = Clock()
    monkeypatch.setattr(stall, "time", found)
    monkeypatch.setattr(stall, "WARM_UP", 16)
    return found


def idle_percent(clock, passes_per_step, *, streamed):
    """Of a host that loads by itself, nothing beforehand."""
    device = stall.SleepingDevice(PASS, passes_per_step, reads_late=streamed)
    for _ in range(10):
        if not streamed:
            clock.sleep(LOADING * passes_per_step)
        for _ in range(passes_per_step):
            clock.sleep(LOADING if streamed else 0)
            device(torch.zeros(2), torch.zeros(2))
        device.advance(0, 0, 0)
    return device.idle_percent


def test_a_step_that_is_fetched_before_it_begins_keeps_the_device_waiting(clock):
    """Passes of 16 s per step, looked at after each, then 8 s of loading: a third."""
    assert idle_percent(clock, 16, streamed=False) == pytest.approx(100 / 3)


def test_the_host_looks_at_every_second_step_of_four_passes(clock):
    """2 s of loading after 8 s of passes."""
    assert idle_percent(clock, 4, streamed=False) == pytest.approx(20)


@pytest.mark.parametrize("passes_per_step", [1, 4, 16])
def test_streamed_micro_batches_keep_it_busy(clock, passes_per_step):
    assert idle_percent(clock, passes_per_step, streamed=True) == 0
