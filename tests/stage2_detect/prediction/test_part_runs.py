"""What a prediction says while it works."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ssld.shared.training import progress
from ssld.stage2_detect.prediction.files import Parts
from ssld.stage2_detect.prediction.part_runs import PartProgress


def test_a_slow_part_tells_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    lines: list[str] = []
    run = cast(Any, SimpleNamespace(main=False, log=lines.append))
    pace = PartProgress(run, cast(Parts, SimpleNamespace(records=[range(4)])), [0])
    for _ in range(4):
        now += progress.SILENCE / 2
        pace.add()
    pace.follow([0])
    assert lines == [
        "2 of 4 images, 0.1 per second, 20 s to go",
        "part 1 of 1 done, 0 left: 4 of 4 images, 0.1 per second",
    ]
    pace.add()  # a frame of a video, whose number is unknown before
    pace.follow([0])
    assert lines[-1].startswith("part 1 of 1 done, 0 left: 5 images and frames, ")
