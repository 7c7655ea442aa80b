"""Start here when the batches of a run depend on the thread that reads them ahead, or this thread hides an error."""

import dataclasses
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from fused_megatron.data.batch import Batch
from fused_megatron.data.read_ahead import THREAD_NAME, ReadAhead
from fused_megatron.testing.host_waits import HostWaits

CPU = torch.device("cpu")


class Source:
    """Squares of positions; it notes each read and its thread, and fails at negative positions."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.threads: set[str] = set()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, position: int) -> int:
        self.reads.append(position)
        self.threads.add(threading.current_thread().name)
        self.go_on.wait()
        if position < 0:
            raise OSError(f"no page {position}")
        return position**2


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD_NAME]


def positions(first: int, last: int) -> Iterator[tuple[int, int | None]]:
    return ((i, i + 1 if i < last else None) for i in range(first, last + 1))


def test_each_position_is_read_once_by_the_thread_and_none_beyond_the_end() -> None:
    source = Source()
    with ReadAhead(source, CPU) as values:
        assert [values.take(*each) for each in positions(3, 8)] == [9, 16, 25, 36, 49, 64]
        assert len(threads()) == 1
    assert source.reads == [3, 4, 5, 6, 7, 8] and source.threads == {THREAD_NAME} and not threads()


def test_the_next_value_is_read_while_the_caller_computes() -> None:
    source = Source()
    with ReadAhead(source, CPU) as values:
        values.take(0, 1)
        while source.reads != [0, 1]:  # without another call
            time.sleep(0.001)


def test_a_jump_reads_what_is_asked_for() -> None:
    source = Source()
    with ReadAhead(source, CPU) as values:
        assert [values.take(0, 1), values.take(7, 8), values.take(8, 9), values.take(1, None)] == [0, 49, 64, 1]
        assert values.take(2, None) == 4
    assert values.take(5, 6) == 25 and source.reads[-1] == 5  # outside the context: by the caller, nothing ahead
    assert "MainThread" in source.threads
    with values:  # and again with a thread
        assert values.take(6, None) == 36


def test_an_error_reaches_the_caller_at_its_position() -> None:
    source = Source()
    with ReadAhead(source, CPU) as values:
        assert values.take(2, following=-1) == 4  # read ahead: not raised before it is asked for
        for _ in range(2):
            with pytest.raises(OSError, match="no page -1"):
                values.take(-1, following=3)
        assert values.take(3, following=None) == 9
    assert not threads()


def test_an_error_of_the_caller_ends_the_thread() -> None:
    with pytest.raises(KeyboardInterrupt), ReadAhead(Source(), CPU) as values:
        values.take(0, 1)
        raise KeyboardInterrupt
    assert not threads()


def test_the_run_ends_though_a_read_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_megatron.data.read_ahead._END_S", 0.05)
    source = Source()
    values = ReadAhead(source, CPU)
    with values:
        values.take(0, None)
        source.go_on.clear()
        values._asked.put(1)
        while source.reads != [0, 1]:
            time.sleep(0.001)
    with values:  # a new thread does not get what the old one finds
        source.go_on.set()
        assert [values.take(i, None) for i in (5, 6)] == [25, 36]


def test_a_pinned_batch_is_sent_without_a_wait() -> None:
    """All tensors but the starts of documents, which stay on the host; views with gaps become dense."""
    tokens = torch.arange(20).view(4, 5)
    starts = torch.zeros(4, 4, dtype=torch.bool)
    starts[:, 0] = True
    batch = Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, 1:] > 3, starts, tokens[:, :-1] % 2)
    with HostWaits() as waits:
        pinned = batch.pinned()
        pins = len(waits._pinned)
        again = pinned.microbatches(2, torch.device("meta"))
    assert pins == len(waits._pinned) == 4 and (waits.places, waits.sent) == ([], 4)
    assert len(again[0]) == 2 and pinned.document_starts is starts
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(pinned, field.name), getattr(batch, field.name))
