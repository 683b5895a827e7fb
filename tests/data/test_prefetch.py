"""Drawing a batch ahead changes neither batches nor cursors (law 5), and hides no error."""

import threading

import pytest

from tests.data.test_loader import everything, make_loader
from unified_lm.core.errors import DataError
from unified_lm.data.prefetch import PrefetchingLoader

STEPS = 6  # more than an epoch of every stream


def test_batches_and_saved_cursors_are_those_of_the_loader():
    plain, ahead = make_loader(), PrefetchingLoader(make_loader(), STEPS)
    assert ahead.state_dict() == plain.state_dict()
    for _ in range(STEPS):
        assert everything([ahead.next_batch()]) == everything([plain.next_batch()])
        assert ahead.state_dict() == plain.state_dict(), "the cursor is that of the batch handed out, not of the one ahead"


@pytest.mark.parametrize("taken", [0, 2])
def test_a_resume_goes_on_where_the_saved_cursor_stood(taken):
    plain, first, second = make_loader(), PrefetchingLoader(make_loader(), STEPS), PrefetchingLoader(make_loader(), STEPS)
    for _ in range(3):
        plain.next_batch()
        first.next_batch()
    for _ in range(taken):  # what was drawn ahead before is not handed out after
        second.next_batch()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        assert everything([second.next_batch()]) == everything([plain.next_batch()])
    second.reset()
    plain.reset()
    assert everything([second.next_batch()]) == everything([plain.next_batch()])


def test_the_next_batch_is_drawn_in_another_thread_and_none_beyond_the_last():
    ahead = PrefetchingLoader(make_loader(), 2)
    threads = []
    draw = ahead.loader.next_batch
    ahead.loader.next_batch = lambda: threads.append(threading.current_thread().name) or draw()
    ahead.next_batch()
    ahead.next_batch()
    assert threads == ["MainThread", "next batch"]
    assert ahead.loader.num_drawn == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "next batch"]


def test_an_error_of_a_draw_comes_out_of_its_own_step():
    ahead = PrefetchingLoader(make_loader(), STEPS)
    draw = ahead.loader.next_batch

    def broken():
        if ahead.loader.num_drawn == 1:
            raise DataError("row 7 is gone")
        return draw()

    ahead.loader.next_batch = broken
    ahead.next_batch()
    state = ahead.state_dict()
    with pytest.raises(DataError, match="row 7 is gone"):
        ahead.next_batch()
    ahead.load_state_dict(state)  # an error that nobody asked for is dropped with its batch
    ahead.loader.next_batch = draw
    ahead.next_batch()
    assert ahead.loader.num_drawn >= 2
