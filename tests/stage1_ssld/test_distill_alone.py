"""Distillation without a recipe: what is chosen, that a second start chooses the same, and images held out without labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.shared.config.settings import parse_config
from ssld.shared.errors import UserError
from ssld.stage1_ssld import distill
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage1_ssld.data.held_out import hold_out
from ssld.stage1_ssld.data.sources import open_sources
from ssld.stage1_ssld.data_config import SourceConfig


def settings(*words: str) -> DistillConfig:
    given = ["--data.train", "x", "--student", "random:test_resnet", "--teacher", "timm:resnet18", "--output", "o"]
    return parse_config(DistillConfig, [*given, *words], program="distill.py")


def test_the_network_of_teach_has_a_short_form_too() -> None:
    words = ["--data.train", "x", "--steps", "2", "--batch_size", "2"]
    rate = ["--optim.lr", "1", "--optim.reference_batch", "2"]
    network = ["--model", "weights.safetensors", "--model.arch", "resnet18", "--output", "o"]
    config = parse_config(TeachConfig, [*words, *rate, *network], program="teach.py")
    assert (config.model.model, config.model.arch) == ("weights.safetensors", "resnet18")


@pytest.mark.parametrize(
    ("images", "gpu", "batch", "steps"),
    [
        (10, False, 10, 20),  # at least 20 steps
        (1000, False, 32, 312),  # 10 passes
        (100_000, False, 32, 500),  # at most 500 steps
        (1000, True, 256, 391),  # 100 passes
        (50_000, True, 256, 7812),  # two million images
        (10_000_000, True, 256, 390_625),  # 10 passes
    ],
)
def test_length_and_batch(images: int, gpu: bool, batch: int, steps: int) -> None:
    fitted = settings().fitted(images, 160, gpu=gpu)
    assert (fitted.batch_size, fitted.steps, fitted.data.image_size, fitted.auto_batch) == (batch, steps, 160, gpu)
    assert fitted.is_fitted
    assert settings().fitted(1000, 160, gpu=True, ranks=3).batch_size == 255


def test_rate_by_the_student() -> None:
    rates = [settings("--student", name).fitted(100, 160, gpu=False).optim.lr for name in ("random:x", "timm:x")]
    assert rates == [4e-3, 5e-5]


def test_what_is_given_stays() -> None:
    given = ["--optim.lr", "1", "--optim.reference_batch", "8", "--batch_size", "4", "--train_epochs", "2"]
    config = settings(*given)
    assert config.is_fitted
    assert config.data.image_size == 224  # the default of recipes and of earlier records
    assert settings("--data.image_size", "64").fitted(100, 160, gpu=False).data.image_size == 64
    assert settings("--train_epochs", "2").fitted(100, 160, gpu=False).steps is None
    assert settings("--optim", "null").fitted(100, 160, gpu=False) == settings().fitted(100, 160, gpu=False)
    with pytest.raises(UserError, match="give at most one of steps, train_epochs"):
        settings("--train_epochs", "2", "--steps", "3")
    with pytest.raises(UserError, match="give batch_size, and steps or train_images"):
        settings("--data.streaming", "true")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.val", "y"), "held_out replaces val: give one of them"),
        (("--store", "s"), "store: has the rows of all images"),
        (("--data.streaming", "true", "--steps", "1", "--batch_size", "1"), "held_out: images of streams"),
    ],
)
def test_mistakes_with_held_out_images(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings("--data.held_out", "0.1", *words)


def test_held_out_images_are_never_trained_on_and_stay_the_same(tiny: Any) -> None:
    configs = [SourceConfig(path=str(tiny.train)), SourceConfig(path=str(tiny.unlabeled))]
    sources = open_sources(configs, "data.train")
    notes: list[str] = []
    training, held = hold_out(sources, 0.3, notes)
    keys = {source.key(row) for source in sources for row in range(len(source))}
    trained = {source.key(row) for source in training for row in range(len(source))}
    out = {held.rows.name(row) for row in range(len(held))}
    assert trained | out == keys
    assert not trained & out
    assert len(out) == len(held)
    assert notes == [f"data.held_out: {len(held)} of {len(keys)} images held out, {len(keys) - len(held)} to train on"]
    assert held.labels is None
    whole = {source.key(row): source.read(row) for source in sources for row in range(len(source))}
    assert all(bool((held.read(row) == whole[held.rows.name(row)]).all()) for row in range(len(held)))
    label_of = {sources[0].key(row): (sources[0].labels or [])[row] for row in range(len(sources[0]))}
    assert [label_of[training[0].key(row)] for row in range(len(training[0]))] == training[0].labels
    fewer, _ = hold_out(sources, 0.2, [])
    assert trained < {
        source.key(row) for source in fewer for row in range(len(source))
    }  # by the name, not by its place
    with pytest.raises(UserError, match="holds out none of"):
        hold_out(sources, 1e-9, [])


def test_distilling_without_a_recipe(
    tiny: Any, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data.train", str(tiny.unlabeled), "--student.model", "random:test_resnet", "--workers", "0"]
    words += ["--teacher.model", "random:test_resnet", "--output", str(tmp_path / "run"), "--data.held_out", "0.3"]
    words += ["--steps", "1", "--batch_size", "2"]
    assert call(distill.main, words) == 0
    printed = capsys.readouterr().out
    assert (
        "chosen, since not given: optim adamw, lr 0.004 for batch 256 (random student); data.image_size 160 (the student's)"
        in printed
    )
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["optim"]["lr"] == 4e-3
    assert recorded["data"]["image_size"] == 160
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert {"agreement", "kl"} <= metrics.keys()
    assert "top1" not in metrics
    assert call(distill.main, words) == 0
    assert "this run is finished" in capsys.readouterr().out
    plain = [word if word != "--data.held_out" else "--data.val" for word in words]
    plain[plain.index("0.3")] = str(tiny.unlabeled)
    plain[plain.index(str(tmp_path / "run"))] = str(tmp_path / "val")
    plain += ["--data.image_size", "32"]
    assert call(distill.main, plain) == 0
    metrics = json.loads((tmp_path / "val" / "result.json").read_text())["metrics"]
    assert {"agreement", "kl"} <= metrics.keys()
    assert "top1" not in metrics
