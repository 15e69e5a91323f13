"""`export_check`: a detector that cannot be exported is refused before its first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssld.shared.errors import UserError
from ssld.stage2_detect.deploy import writing
from ssld.stage2_detect.train import main

Arguments = Callable[..., list[str]]


def test_soft_nms_is_refused_before_the_first_step(
    user_error: Any, arguments: Arguments, train_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = train_settings | {"export_check": True}
    settings["model"] = settings["model"] | {"roi": settings["model"]["roi"] | {"nms": {"kind": "soft_linear"}}}
    message = user_error(main, arguments(settings))
    assert message.startswith("export_check: export: model.roi.nms.kind lowers scores (soft NMS)")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_it_gets_the_detector_once(
    call: Any, arguments: Arguments, train_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def refuse(model: Any, config: Any, resize: Any, log: Any) -> None:
        tried.append((model.training, config.kind, resize.short_side))
        if len(tried) == 1:
            raise UserError("no operator")

    monkeypatch.setattr(writing, "try_export", refuse)
    settings = train_settings | {"export_check": True, "steps": 2}
    assert call(main, arguments(settings)) == 2
    assert call(main, arguments(settings)) == 0  # the same command goes on once it can be exported
    assert [one[1:] for one in tried] == [("faster_rcnn", 64)] * 2
    assert call(main, arguments(settings | {"export_check": False, "steps": 2}, "without")) == 0
    assert len(tried) == 2
