"""`auto_batch` of a detector: its trial is at least as large as any batch of the run, and the run equals one with explicit `accumulate`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ssld.stage2_detect import train
from ssld.stage2_detect.distillation.moving import SemiSupervised
from ssld.stage2_detect.models.pyramid import TimmPyramid

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


def test_auto_batch_uses_the_passes_that_fit(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, small_memory: Any
) -> None:
    steps = {"steps": 2, "save_every": 2}
    assert call(train.main, arguments(train_settings | steps | {"accumulate": 2}, "explicit")) == 0
    most = train_settings["batch_size"] // 2
    sizes = small_memory(TimmPyramid, most)
    assert call(train.main, arguments(train_settings | steps | {"auto_batch": True})) == 0
    assert sizes == [2 * most, *[most] * (1 + 2 * 2 + 1)]  # the last pass checks the last update
    explicit, automatic = (load_file(tmp_path / name / "detector.safetensors") for name in ("explicit", "run"))
    assert all(torch.equal(explicit[name], automatic[name]) for name in explicit)


def test_the_trial_has_the_views_of_a_moving_teacher(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = train_settings["data"]["val_images"]
    moving = {"unlabeled": images, "score_threshold": 0.2, "burn_in": 1, "ratio": 0.25}
    passes: list[tuple[int, int | None]] = []
    forward = SemiSupervised.forward

    def watched(self: SemiSupervised, images: Any, targets: Any = None, weak: Any = None) -> Any:
        passes.append((len(images.sizes_B2), len(weak.sizes_B2) if weak else None))
        return forward(self, images, targets, weak)

    monkeypatch.setattr(SemiSupervised, "forward", watched)
    data = {key: value for key, value in train_settings["data"].items() if "val" not in key}
    settings = train_settings | {"data": data, "moving_teacher": moving, "auto_batch": True, "steps": 2}
    assert call(train.main, arguments(settings)) == 0
    assert passes == [
        (4, 1),
        (3, None),
        (4, 1),
        (4, 1),
    ]  # the trial, the burn-in, the second step, the check of the last update


def test_the_trial_is_as_large_as_the_largest_batch(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch of training or evaluation is higher or wider than the trial, also if evaluation has the tallest image."""
    files = train_settings["data"]
    content = json.loads(Path(files["val_annotations"]).read_text())
    content["images"].append({"id": "tall", "file_name": "tall.png", "width": 40, "height": 120})
    (tmp_path / "val.json").write_text(json.dumps(content))
    shutil.copytree(files["val_images"], tmp_path / "val")
    Image.new("RGB", (40, 120)).save(tmp_path / "val" / "tall.png")
    val = {"val_annotations": str(tmp_path / "val.json"), "val_images": str(tmp_path / "val")}
    settings = train_settings | {"data": files | val, "auto_batch": True}
    settings["resize"] = train_settings["resize"] | {"long_side": 192}
    shapes: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    forward = TimmPyramid.forward

    def watched(self: TimmPyramid, pixels_BCHW: Tensor) -> Any:
        shapes[self.training].append((pixels_BCHW.shape[2], pixels_BCHW.shape[3]))
        return forward(self, pixels_BCHW)

    monkeypatch.setattr(TimmPyramid, "forward", watched)
    assert call(train.main, arguments(settings)) == 0
    assert len(shapes[True]) == 1 + 6 + 1  # the last pass checks the last update
    for (high, wide), *others in shapes.values():
        assert others
        assert all(h <= high and w <= wide for h, w in others)
