"""Starts of the detectors of a new pipeline: which are chosen, their stages, and where COCO weights are looked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ssld.pipelines.scaffold.starts import (
    PROPOSED,
    STARTS,
    Init,
    arch_of,
    choose_starts,
    file_init,
    find_init,
    hub_folder,
    in_a_trial,
    main_row,
    published_init,
    read_starts,
    rows_of,
)
from ssld.shared.errors import UserError
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.published import PUBLISHED

COCO = published_init("fasterrcnn_resnet50_fpn_v2")
OTHER = Init("/x/own.safetensors", "resnet18", settings={"model.fpn_channels": 64})


@pytest.mark.parametrize(
    ("given", "init", "backbone", "distills", "expected"),
    [
        (None, None, "timm:resnet18d", False, ("imagenet",)),
        (None, None, "random:resnet18d", False, ("random",)),
        (None, COCO, "timm:resnet18d", False, ("coco", "imagenet")),
        (None, COCO, "timm:resnet18d", True, ("coco", "imagenet", "ssld")),
        (None, COCO, "timm:resnet50.a1_in1k", True, ("coco", "coco_ssld", "imagenet", "ssld")),
        (None, COCO, "timm:resnet50d", True, ("coco", "imagenet", "ssld")),  # another network
        (None, OTHER, "timm:resnet18", True, ("coco", "imagenet", "ssld")),  # a detector file keeps its backbone
        (None, None, "random:resnet18d", True, ("random", "ssld")),
        (("ssld",), None, "timm:resnet18d", True, ("ssld",)),
        (("coco",), COCO, "timm:resnet18d", False, ("coco",)),
        (("imagenet", "random"), None, "timm:resnet18d", False, ("imagenet", "random")),
    ],
)
def test_the_starts_that_are_at_hand(given: Any, init: Any, backbone: str, distills: bool, expected: Any) -> None:
    assert choose_starts(given, init, backbone, None, distills=distills) == expected


def test_starts_that_are_impossible() -> None:
    def message(text: str, backbone: str = "timm:resnet18d", arch: str | None = None) -> str:
        with pytest.raises(UserError) as error:
            choose_starts(read_starts(text), COCO, backbone, arch, distills=True)
        return str(error.value)

    assert message("coco,imagnet") == "--starts coco,imagnet: imagnet; did you mean 'imagenet'?"
    assert message("weights") == "--starts weights: weights; known: coco, coco_ssld, imagenet, random, ssld"
    assert message("coco,,ssld").startswith("--starts coco,,ssld: an empty name; known: ")
    assert message("imagenet", "random:resnet18").endswith("random:resnet18 has none; use random")
    assert "random needs the name of the network; give it by --arch beside hf-hub:a/b" in message(
        "random", "hf-hub:a/b"
    )
    assert message("coco_ssld").endswith(
        "the heads of coco:fasterrcnn_resnet50_fpn_v2 belong to a resnet50, timm:resnet18d is a resnet18d; --backbone timm:resnet50 is one"
    )
    with pytest.raises(UserError, match=r"--init coco:NAME; /x/own.safetensors keeps its backbone"):
        choose_starts(("coco_ssld",), OTHER, "timm:resnet18", None, distills=True)
    assert read_starts("auto") is None
    assert read_starts("ssld, coco") == ("coco", "ssld")


def test_the_name_of_a_network(tmp_path: Path) -> None:
    tensors = {"w": np.zeros(2, np.float32)}
    for name, metadata in (
        ("plain", {"kind": "backbone", "arch": "resnet18.a1_in1k"}),
        ("own", {"kind": "backbone", "arch": "resnet18", "model_args": {"stem_width": 16}}),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors", {"ssld": json.dumps(metadata)})
    save_file(tensors, tmp_path / "nameless.safetensors")
    assert arch_of("timm:resnet50.a1_in1k", None) == arch_of("random:resnet50", None) == arch_of("resnet50", None)
    assert arch_of(f"{tmp_path}/plain.safetensors", None) == "resnet18"
    assert arch_of(f"{tmp_path}/own.safetensors", None) is None  # of another width
    assert arch_of(f"{tmp_path}/nameless.safetensors", None) is None
    assert arch_of(f"{tmp_path}/nameless.safetensors", "resnet34") == "resnet34"
    assert arch_of("hf-hub:a/b", None) is None


@pytest.mark.parametrize("variables", [{}, {"TORCH_HOME": "{0}/torch"}, {"XDG_CACHE_HOME": "{0}/cache"}])
def test_weights_are_looked_for_where_torch_hub_keeps_them(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert hub_folder() == Path(torch.hub.get_dir()) / "checkpoints"


def test_the_best_of_the_weights_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    best, fast = PROPOSED
    for gpu, name in ((True, best), (False, fast)):
        assert find_init(None, None, gpu=gpu) == Init(f"coco:{name}", here=False, optional=True)
    hub_folder().mkdir(parents=True)
    (hub_folder() / PUBLISHED[fast].file).touch()
    assert find_init(None, None, gpu=True) == Init(f"coco:{fast}", optional=True)  # a file that is here comes first
    assert find_init(None, ("coco", "imagenet"), gpu=True) == Init(f"coco:{fast}")
    assert find_init(None, ("imagenet",), gpu=True) is None
    (hub_folder() / PUBLISHED[best].file).touch()
    assert find_init(None, None, gpu=True) == Init(f"coco:{best}", optional=True)
    assert find_init(None, None, gpu=False) == Init(f"coco:{fast}", optional=True)
    assert find_init("coco:retinanet_resnet50_fpn", None, gpu=True) == Init("coco:retinanet_resnet50_fpn", here=False)
    with pytest.raises(UserError, match="--init: coco:x: no published detector of torchvision; known: "):
        find_init("coco:x", None, gpu=True)


def test_a_detector_file_brings_its_settings(tmp_path: Path) -> None:
    """All that differ from the defaults, so that a training builds the same network."""
    config = DetectorConfig.model_validate(PUBLISHED["retinanet_resnet50_fpn_v2"].model)
    file = tmp_path / "own.safetensors"
    metadata: dict[str, Any] = {"kind": "detector", "arch": "resnet18", "model": config.model_dump(mode="json")}
    metadata["resize"] = {"short_side": 300, "interpolation": "bilinear"}
    save_file({"w": np.zeros(2, np.float32)}, file, {"ssld": json.dumps(metadata)})
    init = file_init(file)
    assert (init.reference, init.arch, init.title, init.optional) == (str(file), "resnet18", "own.safetensors", False)
    assert init.settings["resize.interpolation"] == "bilinear"
    assert "resize.short_side" not in init.settings
    model: dict[str, Any] = {}
    for key, value in init.settings.items():
        group = model
        *groups, last = key.split(".")
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = value
    assert DetectorConfig.model_validate(model["model"]) == config
    with pytest.raises(UserError, match=r"--init .*gone.safetensors: no such file$"):
        file_init(tmp_path / "gone.safetensors")
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"weights.pth: not a detector file of this project; ssld convert-detector --weights "
    ):
        file_init(tmp_path / "weights.pth")
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "body.safetensors")
    with pytest.raises(
        UserError, match=r"body.safetensors: not a detector file of this project; give the detector.safetensors"
    ):
        file_init(tmp_path / "body.safetensors")


def test_settings_are_written_once() -> None:
    """The first detector of each kind has the settings of its kind; each other one is `like` it and names its weights alone."""
    rows = rows_of((*STARTS[:3], "ssld"), COCO, "file.safetensors", "resnet50")
    assert [(row.start, row.like, row.leads) for row in rows] == [
        ("coco", None, True),
        ("coco_ssld", "detector_coco", False),
        ("imagenet", "detector_coco", True),
        ("ssld", "detector_imagenet", False),
    ]
    assert [row.backbone for row in rows] == [
        None,
        "${ssld}/student.safetensors",
        "${backbone}",
        "${ssld}/student.safetensors",
    ]
    assert [row.arch for row in rows] == [None, None, "${backbone_arch}", "null"]
    assert [row.baseline for row in rows] == ["ap_imagenet", "ap_imagenet", None, "ap_imagenet"]
    assert main_row(rows).start == "ssld"
    (alone,) = rows_of(("coco",), COCO, "timm:resnet18d", None)
    assert (alone.stage, alone.evaluation, alone.title, alone.like, alone.baseline) == (
        "detector",
        "ap",
        "detector",
        None,
        None,
    )
    own, none = rows_of(("imagenet", "random"), None, "timm:resnet18d.ra2_in1k", None)
    assert (own.baseline, none.baseline, none.backbone) == ("ap_random", None, "random:resnet18d")
    assert main_row([own, none]) is own


@pytest.mark.parametrize(
    ("given", "init", "like", "gain"),
    [
        (("imagenet",), None, "imagenet", "moving"),
        (("coco",), COCO, "coco", "moving"),
        (("imagenet", "ssld"), None, "ssld", "ssld"),
        (("coco", "imagenet"), COCO, "imagenet", "coco"),
        (("imagenet", "random"), None, "imagenet", "imagenet"),
        (("ssld",), None, "ssld", "moving"),
    ],
)
def test_a_moving_teacher_is_compared_with_the_same_detector(given: Any, init: Any, like: str, gain: str) -> None:
    rows = rows_of(given, init, "timm:resnet18d", None, moving=True)
    moving = rows[-1]
    assert [row.moving for row in rows] == [False] * len(given) + [True]
    assert (moving.stage, moving.evaluation, moving.like) == ("detector_moving", "ap_moving", f"detector_{like}")
    assert (moving.baseline, moving.backbone, moving.arch, moving.leads) == (f"ap_{like}", None, None, False)
    assert main_row(rows).evaluation == f"ap_{gain}"


def test_no_detector_of_a_trial_waits_for_stage_1() -> None:
    assert in_a_trial(("coco_ssld", "ssld"), "timm:resnet18d") == ("coco", "imagenet")
    assert in_a_trial(STARTS, "timm:resnet18d") == ("coco", "imagenet", "random")
    assert in_a_trial(("random", "ssld"), "random:resnet18d") == ("random",)
