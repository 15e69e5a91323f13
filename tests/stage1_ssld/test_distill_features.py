"""Distillation by features: beside soft labels and alone, of teachers with and without classes, and what a user can get wrong about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from ssld.shared.errors import Stopped
from ssld.shared.models.backbones import InputSettings, create_body, save_backbone
from ssld.shared.models.model_file import read_metadata, read_tensors
from ssld.shared.models.references import parse_reference
from ssld.shared.training.training_state import TrainingState
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.evaluate import main as evaluate
from ssld.stage1_ssld.evaluation import better_weights
from ssld.stage1_ssld.write_soft_labels import main as write_soft_labels
from tests.float64 import in_float64

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]
Parts = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT for 64 px without classes, with registers."""
    torch.manual_seed(4)
    args: Settings = {"img_size": 64, "reg_tokens": 2}
    net = timm.create_model("test_vit", num_classes=0, **args)
    inputs = InputSettings((0.5,) * 3, (0.5,) * 3, (64, 64), "bilinear", False)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    facts: Settings = {"model_args": args, "licence": "cc-by-nc-4.0"}
    save_backbone(path, net, arch="test_vit", inputs=inputs, classes=0, **facts)
    return path


@pytest.fixture
def settings(distill_settings: Settings) -> Settings:
    """All terms at 64 px, in 4 steps."""
    data = distill_settings["data"] | {"image_size": 64}
    return distill_settings | {
        "data": data,
        "losses": ["symmetric_kl", "pooled", {"name": "spatial", "weight": 0.5}],
        "steps": 4,
        "save_every": 2,
        "log_every": 1,
    }


def alone(settings: Settings, teacher: Path, **change: Any) -> Settings:
    return settings | {"losses": ["pooled", "spatial"], "teacher": {"model": str(teacher)}} | change


def checkpoint(run: Path, step: int = 4) -> dict[str, Parts]:
    return {file.stem: load_file(file) for file in (run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")}


def equal(one: dict[str, Parts], other: dict[str, Parts]) -> bool:
    return one.keys() == other.keys() and all(
        part.keys() == other[name].keys() and all(torch.equal(tensor, other[name][key]) for key, tensor in part.items())
        for name, part in one.items()
    )


def test_terms_of_features_beside_soft_labels(
    arguments: Arguments, settings: Settings, call: Call, tmp_path: Path, metrics_of: Any
) -> None:
    """They are logged and add up; their heads are trained and stay out of the file, which plain timm loads."""
    assert call(distill, arguments(settings | {"ema": {"decay": 0.9}})) == 0
    lines = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    for line in lines:
        total = line["symmetric_kl"] + line["pooled"] + 0.5 * line["spatial"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert line["pooled"] > 0.01
        assert line["spatial"] > 0.01
    assert lines[-1]["pooled"] < lines[0]["pooled"]
    first, last = checkpoint(tmp_path / "run", 2), checkpoint(tmp_path / "run")
    assert set(last) == {"model", "ema", "optimizer", "heads"}
    for name, tensor in last["heads"].items():
        assert torch.equal(tensor, first["heads"][name]) == name.endswith(("_mean_D", "_deviation_D")), name
    assert last["heads"]["spatial_deviation_D"].std() > 0
    file = tmp_path / "run" / "student.safetensors"
    timm.create_model("test_convnext", num_classes=3).load_state_dict(load_file(file))
    output = (tmp_path / "run" / "log.txt").read_text()
    assert (
        "standardized with 32 views; the statistics are kept in the checkpoints" in output
    )  # no more than the run will see
    assert (
        "pooled in 96 dimensions, spatial in 96 dimensions (c3 at 2 x 2, c4 at 2 x 2, c5 at 2 x 2); heads of" in output
    )
    assert "warning: the first loss" not in output
    order = [
        ", BatchNorm by running statistics",
        "measuring mean and standard deviation of the first 32 views",
        "standardized with 32 views",
    ]
    places = [output.index(part) for part in order]  # a slow measurement is announced before it begins
    assert places == sorted(places)
    result = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert {"top1", "agreement", "kl"} <= set(result)


def test_stopped_and_gone_on_is_the_same_run(
    arguments: Arguments,
    settings: Settings,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vit_file: Path,
) -> None:
    """Bit for bit, statistics and heads too, which are not taken again."""
    settings = alone(
        settings,
        vit_file,
        student={"model": "random:test_resnet"},
        optim={"name": "adamw", "lr": 0.01, "reference_batch": 8},
    )
    assert call(distill, arguments(settings, "whole")) == 0
    saved = TrainingState.save

    def stop_after(self: Any, step: int) -> None:
        saved(self, step)
        if step == 2:
            raise Stopped("for the test")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", stop_after)
        assert call(distill, arguments(settings, "parts")) == 143
    assert call(distill, arguments(settings, "parts")) == 0
    assert equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert (tmp_path / "parts" / "log.txt").read_text().count("standardized with") == 1


def test_accumulation_changes_nothing(
    arguments: Arguments, settings: Settings, call: Call, tmp_path: Path, metrics_of: Any
) -> None:
    settings |= {"data": settings["data"] | {"image_size": 32, "val": None}, "steps": 2}
    with in_float64():
        for passes in (1, 4):
            assert call(distill, arguments(settings | {"accumulate": passes}, str(passes))) == 0
    one, four = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "4")
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    parts, others = checkpoint(tmp_path / "1", 2), checkpoint(tmp_path / "4", 2)
    for name in ("model", "heads"):
        torch.testing.assert_close(parts[name], others[name], rtol=1e-9, atol=1e-12)


def test_a_teacher_without_classes_teaches_its_features(
    arguments: Arguments, settings: Settings, call: Call, tmp_path: Path, vit_file: Path, tiny: Any
) -> None:
    """CNN from ViT: a student without classes, which plain timm loads, nearest neighbors judge, and a detector takes."""
    assert call(distill, arguments(alone(settings, vit_file))) == 0
    file, output = tmp_path / "run" / "student.safetensors", (tmp_path / "run" / "log.txt").read_text()
    assert "M trained parameters, no classes: only features are learned) at 64 px" in output
    assert (
        "feature losses alone train no classifier, so no top-1 and no agreement are measured; use `ssld evaluate --bank`"
        in output
    )
    assert "teacher: not checked, it has no classes" in output
    timm.create_model("test_convnext", num_classes=0).load_state_dict(load_file(file))
    metadata = read_metadata(file)
    assert metadata["num_classes"] == 0
    assert metadata["licence"] == "cc-by-nc-4.0"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"] == {"steps": 4, "images_seen": 32}
    _, line = create_body(parse_reference(str(file)), out_indices=(1, 2, 3))
    assert "backbone tensors, " in line
    argv = ["--model", str(file), "--data.path", str(tiny.val), "--bank.path", str(tiny.train), "--neighbors", "3"]
    argv += ["--output", str(tmp_path / "near"), "--workers", "0", "--device", "cpu", "--threads", "1"]
    assert call(evaluate, argv) == 0
    assert "knn" in str(json.loads((tmp_path / "near" / "result.json").read_text())["metrics"])


def test_the_better_weights_are_kept_without_classes(
    arguments: Arguments,
    settings: Settings,
    call: Call,
    tmp_path: Path,
    vit_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nearest images need no classes: a student that is its own teacher cannot get better by a rate that harms."""
    monkeypatch.setattr(better_weights, "LEAST_IMAGES", 10)
    harm = {"lr": 5.0, "reference_batch": 8}
    given = alone(settings, vit_file, student={"model": str(vit_file)}, losses=["pooled"], optim=harm)
    assert call(distill, arguments(given | {"keep_weights": "better"})) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["neighbors_start"] == 1
    assert metrics["neighbors_last"] < 1
    assert read_metadata(tmp_path / "run" / "student.safetensors")["kept"] == "start"


def test_a_vit_learns_from_a_cnn(
    arguments: Arguments, settings: Settings, call: Call, tmp_path: Path, vit_file: Path
) -> None:
    """Soft labels and features; the ViT's only level is its last blocks, and its size stays in the file."""
    assert call(distill, arguments(settings | {"student": {"model": str(vit_file)}})) == 0
    assert "spatial in 96 dimensions (c4 at 2 x 2)" in (tmp_path / "run" / "log.txt").read_text()
    args = read_metadata(tmp_path / "run" / "student.safetensors")["model_args"]
    net = timm.create_model("test_vit", num_classes=3, **args)
    net.load_state_dict(read_tensors(tmp_path / "run" / "student.safetensors"))


def test_what_no_term_reaches_stays_as_it_is(
    arguments: Arguments, settings: Settings, call: Call, tmp_path: Path, vit_file: Path
) -> None:
    """Layers behind the last compared map are untrained, and a line reports it."""
    optim = settings["optim"] | {"weight_decay": 0.5}
    losses = [{"name": "spatial", "levels": ["c3"]}]
    assert call(distill, arguments(alone(settings, vit_file, losses=losses, optim=optim))) == 0
    first, last = checkpoint(tmp_path / "run", 2)["model"], checkpoint(tmp_path / "run")["model"]
    moved = {name.split(".")[1] for name, tensor in last.items() if not torch.equal(tensor, first[name])}
    assert moved == {"0", "1"}  # of four stages
    assert (
        "of random:test_convnext are not trained: no loss term depends on them"
        in (tmp_path / "run" / "log.txt").read_text()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": ["pooled", "kl", "pooled"]}, "losses: two terms compare pooled features; keep one of them"),
        ({"losses": [{"name": "pooled", "levels": ["c5"]}]}, "pooled has no levels; leave them out, or use spatial"),
        ({"losses": [{"name": "spatial", "levels": []}]}, "losses.0.levels: needs at least 1"),
        ({"losses": [{"name": "spatial", "levels": ["c4", "c5", "c4"]}]}, "each level at most once (given: c4, c5, c4)"),
        ({"losses": [{"name": "spatial", "levels": ["c6"]}]}, "losses.0.levels.0: "),
        ({"losses": [{"name": "spatial", "temperature": 2}]}, "spatial has no temperature; leave it at 1"),
        ({"losses": [{"name": "pooled", "beta": 2}]}, "pooled has no beta; leave it at 1"),
        ({"losses": [{"name": "pooled", "standardize": True}]}, "pooled compares no logits; leave standardize at false"),
        ({"losses": ["kl", "spatial"], "trainable": "classifier"}, "spatial has no effect on frozen features"),
        ({"losses": ["pooled"], "best_by": "agreement"}, "best_by: pooled train no classifier"),
        ({"losses": ["pooled"], "patience": 2, "evaluate_every": 1}, "patience: pooled train no classifier"),
        ({"store": "somewhere"}, "store: contains no features; remove pooled from losses, or leave out store"),
        (
            {"losses": ["pooled"], "teacher": {"model": "random:test_resnet", "ensemble": ["random:test_resnet"]}},
            "teacher.ensemble: feature terms use the first network only; leave it out, or add a term that compares logits",
        ),
        (
            {"losses": ["spatial"], "student": {"model": "VIT"}, "levels": ["c3"]},
            "losses: spatial: VIT has no level c3 (8 pixels), its maps have strides of 16; name others",
        ),
        ({"teacher": {"model": "VIT"}}, "VIT: has 0 classes, a teacher needs several; run `ssld prototypes` first"),
        (
            {"losses": ["pooled"], "teacher": {"model": "VIT"}, "hard_label_weight": 1},
            "hard_label_weight: VIT has no classes that labels could belong to; leave it at 0",
        ),
        ({"teacher": {"global_pool": "max"}}, "needs its own pooling; remove global_pool, or use feature losses only"),
        (
            {"losses": ["pooled"], "teacher": {"model": "VIT", "global_pool": "best"}},
            "teacher.global_pool: test_vit: has no pooling 'best'",
        ),
    ],
)  # fmt: skip
def test_mistakes(
    arguments: Arguments, settings: Settings, user_error: Any, vit_file: Path, change: Settings, message: str
) -> None:
    change = json.loads(json.dumps(change).replace("VIT", str(vit_file)))
    levels = change.pop("levels", None)
    if levels:
        change["losses"] = [{"name": "spatial", "levels": levels}]
    merged = settings | change
    if isinstance(change.get("teacher"), dict):
        merged["teacher"] = settings["teacher"] | change["teacher"]
    line = user_error(distill, arguments(merged))
    assert message.replace("VIT", str(vit_file)) in line


def test_a_store_takes_no_pooling(arguments: Arguments, settings: Settings, user_error: Any) -> None:
    given = {key: settings[key] for key in ("threads", "workers", "device")}
    data = {key: value for key, value in settings["data"].items() if key != "val"}
    given |= {"data": data, "teacher": settings["teacher"] | {"global_pool": "max"}, "views": 1, "top": 2}
    assert "classifier needs its own pooling; remove global_pool" in user_error(write_soft_labels, arguments(given))


def test_human_labels_beside_features(
    arguments: Arguments, settings: Settings, call: Call, tmp_path: Path, metrics_of: Any
) -> None:
    """Without soft labels the classes are learned from labels, in the teacher's numbers; accuracy is measured instead of agreement."""
    assert call(distill, arguments(settings | {"losses": ["pooled"], "hard_label_weight": 0.5})) == 0
    line = metrics_of(tmp_path / "run")[0]
    assert {"loss", "pooled", "cross_entropy", "accuracy"} <= set(line)
    assert line["loss"] == pytest.approx(line["pooled"] + 0.5 * line["cross_entropy"], rel=1e-5)
    assert read_metadata(tmp_path / "run" / "student.safetensors")["num_classes"] == 3
