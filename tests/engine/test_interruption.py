"""The first signal is noted, the second does what it did before."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from unified_lm.engine.interruption import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_second_signal_is_no_longer_caught(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append("before"))
    try:
        with StopRequest(repeat_seconds=0.2) as stop:
            assert stop.number == 0
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # torchrun passes on what the scheduler has sent to every process
            assert (stop.number, seen) == (number, [])
            time.sleep(0.25)
            os.kill(os.getpid(), number)
            assert seen == ["before"]
        with StopRequest():
            pass
        os.kill(os.getpid(), number)
        assert seen == ["before", "before"], "handlers are put back at the end"
    finally:
        signal.signal(number, before)


def test_a_block_inside_another_changes_no_handler():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        with stop:
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # would end the process, had the inner block put the handler back
        assert stop.agree() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_noted():
    numbers = []

    def enter() -> None:
        with StopRequest() as stop:
            numbers.append(stop.number)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert numbers == [0]
