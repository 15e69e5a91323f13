"""Communication between ranks, with torch's calls replaced: what is printed while a process waits, and the time limit of the host group."""

import errno
import pickle
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from ssld.shared.distributed import ranks
from ssld.shared.errors import Stopped, UserError


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This process is rank 1 of 2; gives the lines that it prints."""
    lines: list[str] = []
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "say", lambda text, stream: lines.append(text))
    monkeypatch.setattr(ranks, "_timeout", timedelta(minutes=90))
    return lines


def test_a_rank_that_waits_says_so(second_of_two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, until the value comes."""
    twice = threading.Event()
    monkeypatch.setattr(ranks, "_FIRST_NOTICE", 0.001)
    monkeypatch.setattr(ranks, "_NEXT_NOTICE", 0.001)
    add = second_of_two.append

    def said(text: str, stream: Any) -> None:
        add(text)
        if len(second_of_two) == 2:
            twice.set()

    def broadcast(box: list[Any], src: int) -> None:
        assert twice.wait(60)
        box[0] = "AP"

    monkeypatch.setattr(ranks, "say", said)
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", broadcast)
    assert ranks.from_main_rank("", "COCO scores") == "AP"
    start, end = (
        "[rank 1] waiting for the main process (COCO scores) for ",
        "; process_timeout ends the run after 90 min",
    )
    assert all(line.startswith(start) and line.endswith(end) for line in second_of_two)
    assert not [thread for thread in threading.enumerate() if thread.name == "announce"]


def test_a_value_that_is_there_is_not_waited_for(second_of_two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(parts: list[Any], items: list[int]) -> None:
        parts[:] = [items, [7]]

    monkeypatch.setattr(ranks.dist, "all_gather_object", gathered)
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda box, src: None)
    assert ranks.from_main_rank(3) == 3
    assert ranks.gather_lists([1]) == [1, 7]
    assert second_of_two == []


def test_the_host_group_has_the_timeout_of_the_run(second_of_two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside NCCL a group of its own; its default of 30 minutes would end a run whose main process scores for longer."""
    given: dict[str, Any] = {}

    def new_group(**options: Any) -> str:
        given.update(options)
        return "group"

    monkeypatch.setattr(ranks.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(ranks.dist, "new_group", new_group)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda total, group: total.add_(group == "group"))
    ranks._host_group.cache_clear()
    try:
        assert ranks.any_rank(False)
    finally:
        ranks._host_group.cache_clear()
    assert given == {"backend": "gloo", "timeout": timedelta(minutes=90)}


def test_sums_are_exact() -> None:
    """0.1 as float32, 10 million times, against the product in float64."""
    value = torch.full((10_000_000,), 0.1)
    exact = float(value[0].double()) * len(value)
    assert float(ranks.for_sums(value).sum()) == pytest.approx(exact, rel=1e-9)
    assert ranks.for_sums(value).dtype == torch.float64


def test_ranks_that_share_work_wait_for_all(second_of_two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a broadcast, whose sender goes on before all have received it."""
    called: list[str] = []

    def gathered(parts: list[Any], items: list[int]) -> None:
        parts[:] = [[], items]
        called.append("gathered")

    monkeypatch.setattr(ranks.dist, "all_gather_object", gathered)
    ranks.wait_for_all()
    assert called == ["gathered"]


class Unpicklable(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__(f"{file}: line {line}")


def raised_on_two(
    work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[BaseException | None, BaseException | None]:
    """What `on_main_rank` raises on the main rank, and on the second one."""
    sent: list[Any] = []

    def run() -> BaseException | None:
        try:
            assert ranks.on_main_rank(work) == "result"
        except BaseException as error:
            return error
        return None

    monkeypatch.setattr(ranks, "rank", lambda: 0)
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda box, src: sent.append(pickle.dumps(box[0])))
    of_the_main = run()
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(
        ranks.dist, "broadcast_object_list", lambda box, src: box.__setitem__(0, pickle.loads(sent.pop()))
    )
    of_the_second = run()
    assert sent == []  # one message for each work
    return of_the_main, of_the_second


@pytest.mark.parametrize(
    "error",
    [
        UserError("a: unknown key", "b: unknown key"),
        Stopped("the selection is not finished"),
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device", "runs/a"),
        ZeroDivisionError("division by zero"),
    ],
)
def test_what_ends_the_work_of_the_main_rank_ends_every_rank(
    error: BaseException, second_of_two: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    of_the_main, of_the_second = raised_on_two(fail, monkeypatch)
    assert of_the_main is error
    assert type(of_the_second) is type(error)
    assert str(of_the_second) == str(error)


def test_an_error_that_cannot_be_sent_is_described(second_of_two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Unpicklable("a.json", 3)

    of_the_main, of_the_second = raised_on_two(fail, monkeypatch)
    assert type(of_the_main) is Unpicklable
    assert type(of_the_second) is RuntimeError
    assert str(of_the_second) == "the main process failed: Unpicklable: a.json: line 3"


def test_a_result_that_cannot_be_sent_ends_every_rank(
    second_of_two: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_the_main, of_the_second = raised_on_two(threading.Lock, monkeypatch)
    assert "cannot pickle" in str(of_the_main)
    assert str(of_the_second) == str(of_the_main)


def test_the_result_of_the_main_rank_is_on_every_rank(
    second_of_two: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert raised_on_two(lambda: "result", monkeypatch) == (None, None)
    monkeypatch.setattr(ranks, "world_size", lambda: 1)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    assert ranks.on_main_rank(lambda: 3) == 3
