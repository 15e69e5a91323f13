"""Communication between ranks, with torch's calls replaced: what is printed while a process waits, and the time limit of the host group."""

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch

from ssld.shared.distributed import ranks
from ssld.shared.errors import UserError


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


def test_a_mistake_on_the_main_rank_ends_every_rank(second_of_two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(box: list[Any], src: int) -> None:
        box[0] = "a: unknown key\nb: unknown key"

    def fail() -> None:
        raise UserError("a: unknown key", "b: unknown key")

    monkeypatch.setattr(ranks.dist, "broadcast_object_list", broadcast)
    with pytest.raises(UserError) as of_the_second:
        ranks.on_main_rank(fail)
    monkeypatch.setattr(ranks, "world_size", lambda: 1)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    with pytest.raises(UserError) as of_the_main:
        ranks.on_main_rank(fail)
    assert str(of_the_second.value) == str(of_the_main.value) == "a: unknown key\nb: unknown key"
    assert ranks.on_main_rank(lambda: 3) == 3
