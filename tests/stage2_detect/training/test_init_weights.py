"""Start of a run from a detector file: head rows by class name, all other tensors unchanged, other architectures are errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssld.shared.models.model_file import read_metadata, save_model_file
from ssld.stage2_detect import train
from ssld.stage2_detect.models.class_rows import carry_rows, permute_classes
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.retinanet import RetinaNet

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


def rows(classes: int, offset: int, agnostic: bool = False) -> dict[str, torch.Tensor]:
    """Head tensors whose values identify their origin."""
    logits, masks = torch.arange(classes + 1.0), torch.arange(float(classes))
    deltas = torch.arange(4.0 if agnostic else 4.0 * classes)
    return {
        "roi_heads.heads.0.logits.weight": offset + logits[:, None].repeat(1, 3),
        "roi_heads.heads.0.logits.bias": offset + logits,
        "roi_heads.heads.1.deltas.bias": offset + deltas,
        "mask_head.logits.weight": offset + masks[:, None, None, None].repeat(1, 2, 1, 1),
        "roi_heads.heads.0.fc1.bias": offset + torch.arange(float(classes + 1)),
    }


def test_rows_go_by_name_and_background_stays_last() -> None:
    carried = carry_rows(
        rows(3, 100), rows(4, 900), old=["a", "b", "c"], new=["x", "c", "a", "y"], class_agnostic=False
    )
    assert carried["roi_heads.heads.0.logits.bias"].tolist() == [900, 102, 100, 903, 103]
    assert carried["roi_heads.heads.0.logits.weight"][:, 0].tolist() == [900, 102, 100, 903, 103]
    deltas = [900, 901, 902, 903, 108, 109, 110, 111, 100, 101, 102, 103, 912, 913, 914, 915]
    assert carried["roi_heads.heads.1.deltas.bias"].tolist() == deltas
    assert carried["mask_head.logits.weight"][:, 0, 0, 0].tolist() == [900, 102, 100, 903]
    assert carried["roi_heads.heads.0.fc1.bias"].tolist() == [100, 101, 102, 103], "no class rows, however many"


def test_class_agnostic_deltas_belong_to_no_class() -> None:
    """With one class the two kinds have the same shape."""
    for agnostic, expected in ((True, [100, 101, 102, 103]), (False, [900, 901, 902, 903])):
        carried = carry_rows(rows(1, 100, agnostic), rows(1, 900, agnostic), old=["a"], new=["b"], class_agnostic=agnostic)  # fmt: skip
        assert carried["roi_heads.heads.1.deltas.bias"].tolist() == expected
        assert carried["roi_heads.heads.0.logits.bias"].tolist() == [900, 101]


def test_a_model_in_another_class_order_gives_equal_outputs() -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.roi_heads = torch.nn.Module()
            head = torch.nn.Module()
            head.logits, head.deltas = torch.nn.Linear(5, 4), torch.nn.Linear(5, 12)
            self.roi_heads.heads = torch.nn.ModuleList([head])

    model, inputs = Holder(), torch.randn(6, 5)
    head: Any = model.roi_heads.heads[0]  # type: ignore[index]
    logits, deltas = head.logits(inputs), head.deltas(inputs).unflatten(1, (3, 4))
    permute_classes(model, old=["a", "b", "c"], new=["c", "a", "b"], class_agnostic=False)
    torch.testing.assert_close(head.logits(inputs), logits[:, [2, 0, 1, 3]])
    torch.testing.assert_close(head.deltas(inputs).unflatten(1, (3, 4)), deltas[:, [2, 0, 1]])


@pytest.mark.parametrize("kind", ["gfl", "retinanet"])
def test_a_one_stage_head_has_a_row_for_each_anchor_and_class(kind: str) -> None:
    torch.manual_seed(0)
    dense: GFL | RetinaNet = GFL(classes=3, channels=8) if kind == "gfl" else RetinaNet(classes=3, channels=8)
    holder, maps = torch.nn.Module(), [torch.randn(2, 8, 3, 4)]
    holder.dense = dense
    torch.nn.init.normal_(dense.head.logits.bias)  # type: ignore[arg-type]
    logits, values = dense.head(maps)
    permute_classes(holder, old=["a", "b", "c"], new=["c", "a", "b"], class_agnostic=False)
    permuted, kept = dense.head(maps)
    torch.testing.assert_close(permuted, logits[..., [2, 0, 1]])
    assert torch.equal(kept, values)

    shapes = 9 if kind == "retinanet" else 1
    old, new = (offset + torch.arange(shapes * classes * 1.0) for offset, classes in ((100, 3), (900, 2)))
    name = "dense.head.logits.bias"
    carried = carry_rows({name: old}, {name: new}, old=["a", "b", "c"], new=["x", "b"], class_agnostic=False)
    expected = [value for shape in range(shapes) for value in (900.0 + 2 * shape, 101.0 + 3 * shape)]
    assert carried[name].tolist() == expected


@pytest.fixture
def trained(train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path) -> Path:
    """A detector of the classes "wide" and "tall", every parameter of which has moved."""
    settings = train_settings | {"steps": 2}
    settings["model"] = train_settings["model"] | {"freeze_norm": False}
    assert call(train.main, arguments(settings, "first")) == 0
    return tmp_path / "first" / "detector.safetensors"


def other_classes(settings: Settings, tmp_path: Path) -> Settings:
    """The same scenes: "tall" first, "wide" is "flat" now."""
    data = dict(settings["data"])
    for part in ("train", "val"):
        content = json.loads(Path(data[f"{part}_annotations"]).read_text())
        content["categories"] = [{"id": 7, "name": "tall"}, {"id": 3, "name": "flat"}]
        file = tmp_path / f"other_{part}.json"
        file.write_text(json.dumps(content))
        data[f"{part}_annotations"] = str(file)
    return settings | {"data": data}


def test_fine_tuning_keeps_rows_by_class_name(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, trained: Path
) -> None:
    settings = other_classes(train_settings, tmp_path) | {"init": str(trained), "steps": 1}
    settings["optim"] = settings["optim"] | {"lr": 1e-30}  # the step changes nothing
    assert call(train.main, arguments(settings)) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "rows of 1 classes kept (tall), 1 new, at random (flat), 1 dropped (wide)" in log
    assert "backbone: random:test_resnet is unused, since init has a backbone" in log
    before, after = load_file(trained), load_file(tmp_path / "run" / "detector.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if "roi_heads" in name and ".logits." in name:
            assert torch.equal(tensor[0], before[name][1]), name  # tall
            assert torch.equal(tensor[2], before[name][2]), name  # background
            assert not torch.equal(tensor[1], before[name][0]) or "bias" in name, name
        elif "roi_heads" in name and ".deltas." in name:
            assert torch.equal(tensor[:4], before[name][4:]), name
            assert not torch.equal(tensor[4:], before[name][:4]), name
        elif "num_batches" not in name:
            assert torch.equal(tensor, before[name]), name
    metadata = read_metadata(tmp_path / "run" / "detector.safetensors", kind="detector")
    assert metadata["class_names"] == ["tall", "flat"]
    assert metadata["init"] == str(trained)
    assert metadata["backbone"]["reference"] == "random:test_resnet"


def test_init_needs_no_backbone_and_the_same_classes_keep_all_rows(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, trained: Path
) -> None:
    settings = {key: value for key, value in train_settings.items() if key != "backbone"}
    settings |= {"init": str(trained), "steps": 1, "optim": train_settings["optim"] | {"lr": 1e-30}}
    assert call(train.main, arguments(settings)) == 0
    before, after = load_file(trained), load_file(tmp_path / "run" / "detector.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "rows of 2 classes kept (wide, tall)\n" in (tmp_path / "run" / "log.txt").read_text()


def test_user_errors(
    train_settings: Settings, arguments: Arguments, user_error: Callable[..., str], tmp_path: Path, trained: Path
) -> None:
    def message(**changes: Any) -> str:
        settings = train_settings | {"init": str(trained)} | changes
        return user_error(train.main, arguments(settings, "bad"))

    model = train_settings["model"]
    narrow = message(model=model | {"fpn_channels": 8})
    assert f"init: {trained}: another architecture than this run's model" in narrow
    assert "model.fpn_channels (file: 16, run: 8)" in narrow
    assert "model.roi.hidden (file: 32, run: 16)" in message(model=model | {"roi": model["roi"] | {"hidden": 16}})
    assert "no such file" in message(init=str(tmp_path / "nowhere.safetensors"))
    pickle = _pickle(tmp_path)
    convert = "makes one of a detector of another project"
    assert f"{pickle}: is a pickle, which can run code when opened" in message(init=pickle)
    (tmp_path / "theirs.pth").write_bytes(Path(pickle).read_bytes())
    theirs = f"init: {tmp_path}/theirs.pth: not a detector file; `ssld convert-detector --weights {tmp_path}/theirs.pth --output DIR`"
    assert f"{theirs} {convert}" in message(init=str(tmp_path / "theirs.pth"))
    earlier, metadata = tmp_path / "earlier.safetensors", read_metadata(trained, kind="detector")
    save_model_file(earlier, load_file(trained), metadata | {"model": metadata["model"] | {"rpn": {"samples": 9}}})
    assert "was written by an earlier version of this project (model.rpn.samples" in message(init=str(earlier))
    without = {key: value for key, value in train_settings.items() if key != "backbone"}
    assert "backbone: missing; give a backbone file" in user_error(train.main, arguments(without, "bad"))
    assert not (tmp_path / "bad" / "result.json").exists()


def _pickle(folder: Path) -> str:
    torch.save({"weight": torch.zeros(1)}, folder / "weights.safetensors")
    return str(folder / "weights.safetensors")
