"""Which weights a student keeps: the last ones, those of its start, or their mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssld.shared.models.backbones import Classifier, InputSettings, input_settings, save_backbone
from ssld.shared.models.model_file import read_metadata
from ssld.shared.models.teacher import FrozenTeacher
from ssld.shared.run_dir import read_result
from ssld.stage1_ssld.data.batch import Batch
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.evaluation import better_weights
from ssld.stage1_ssld.evaluation.better_weights import choose_weights, nearest_images, neighbors_in_common, weights
from tests.tf32 import MatrixProductsInTF32

IMAGES = 60


@pytest.fixture
def batches() -> Callable[[], list[Batch]]:
    """Noise in blocks of 8 pixels, 60 images of 32 pixels, in batches of 25; one batch without an image."""
    draw = np.random.default_rng(0)
    blocks = torch.from_numpy(draw.integers(0, 256, (IMAGES, 3, 4, 4), dtype=np.uint8))
    pixels = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    parts = [*pixels.split(25), pixels[:0]]
    return lambda: [Batch(part, torch.zeros(len(part), dtype=torch.int64), [], []) for part in parts]


def network(seed: int) -> Classifier:
    torch.manual_seed(seed)
    net = timm.create_model("test_resnet", num_classes=3)
    return Classifier(net, mean=(0.5,) * 3, std=(0.5,) * 3).eval()


@pytest.fixture
def teacher(tmp_path: Path) -> FrozenTeacher:
    """Network 0."""
    file = tmp_path / "network.safetensors"
    net = network(0).net
    save_backbone(file, net, arch="test_resnet", inputs=input_settings(net, {}), classes=3)
    return FrozenTeacher(str(file))


def copied(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_tf32_does_not_decide_about_neighbors() -> None:
    """Eleven images whose cosines with the first differ by less than the rounding of TF32; the farthest stands first and is none of ten."""
    angles = 0.5 + 1e-5 * torch.tensor([11.0, *range(1, 11)], dtype=torch.float64)
    angles = torch.cat((torch.zeros(1, dtype=torch.float64), angles))
    embeddings_ND = torch.stack((angles.cos(), angles.sin()), dim=1).float()
    with MatrixProductsInTF32():
        assert nearest_images(embeddings_ND)[0].tolist() == list(range(2, 12))


def test_neighbors_against_numpy() -> None:
    draw = np.random.default_rng(1)
    result = []
    embeddings = [draw.normal(size=(40, size)) for size in (5, 9)]
    for one in embeddings:
        unit = one / np.linalg.norm(one, axis=1, keepdims=True)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        result.append([set(row) for row in np.argsort(-cosines, axis=1)[:, : better_weights.NEIGHBORS]])
    expected = np.mean([len(a & b) / better_weights.NEIGHBORS for a, b in zip(*result, strict=True)])
    actual = [nearest_images(torch.from_numpy(one)) for one in embeddings]
    assert [[set(row.tolist()) for row in one] for one in actual] == result
    assert neighbors_in_common(*actual) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1
    assert neighbors_in_common(actual[0], actual[0]) == 1


def test_the_three_sets_of_weights() -> None:
    start, last = copied(network(0).net), copied(network(1).net)
    counter = "bn1.num_batches_tracked"
    last[counter], last["bn1.running_var"] = torch.tensor(7), 3 * last["bn1.running_var"]
    assert weights("last", last, start) == last
    assert weights("start", last, start) == start
    mean = weights("mean", last, start)
    assert mean[counter] == 7
    for name in ("conv1.0.weight", "bn1.running_var"):
        torch.testing.assert_close(mean[name].double(), (start[name].double() + last[name].double()) / 2)


@pytest.mark.parametrize(("trained", "began", "which"), [(1, 0, "start"), (0, 1, "last"), (0, 0, "last")])
def test_the_weights_nearest_to_the_teacher_are_chosen(
    trained: int, began: int, which: str, batches: Callable[[], list[Batch]], teacher: FrozenTeacher
) -> None:
    """The teacher is network 0."""
    net, start = network(trained), copied(network(began).net)
    before = copied(net.net)
    reported = choose_weights(net, start, teacher, batches, better=False)
    choice = choose_weights(net, start, teacher, batches, better=True)
    assert choice
    assert reported
    assert (reported.which, reported.shares) == ("last", choice.shares)
    assert choice.which == which
    assert choice.images == IMAGES
    assert choice.shares[choice.which] == 1
    if trained != began:
        assert min(choice.shares.values()) < 0.9
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.net.state_dict().items())
    assert f"on {IMAGES} held-out images: last " in choice.describe()


def test_few_images_decide_nothing(batches: Callable[[], list[Batch]], teacher: FrozenTeacher) -> None:
    few = [batches()[0]]
    assert choose_weights(network(1), copied(network(0).net), teacher, lambda: few, better=True) is None


def test_a_stage_that_spoils_its_student_leaves_the_start(
    teacher_file: Path,
    distill_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    call: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A student that begins as its teacher cannot get better; at this rate it gets worse."""
    monkeypatch.setattr(better_weights, "LEAST_IMAGES", 15)
    began = load_file(teacher_file)
    settings = distill_settings | {"student": {"model": str(teacher_file), "batchnorm": "batch"}}
    settings["optim"] = {"lr": 0.5, "reference_batch": 8, "warmup_steps": 0}
    for name in ("better", "last"):
        assert call(distill, arguments(settings | {"keep_weights": name}, name)) == 0
    kept, last = (load_file(tmp_path / name / "student.safetensors") for name in ("better", "last"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in began.items())
    assert not torch.equal(last["conv1.0.weight"], began["conv1.0.weight"])
    results = [read_result(tmp_path / name) for name in ("better", "last")]
    assert results[0]
    assert results[1]
    assert results[0]["metrics"]["agreement"] == results[0]["metrics"]["neighbors_start"] == 1
    assert results[0]["metrics"]["neighbors_last"] < 1
    assert results[1]["metrics"]["agreement"] < 1
    for result in results:  # the teacher's own weights agree with it
        assert result
        assert result["metrics"]["start_agreement"] == 1
        assert result["metrics"]["start_kl"] == pytest.approx(0, abs=1e-6)
    for which in ("last", "mean", "start"):
        assert results[1]["metrics"][f"neighbors_{which}"] == results[0]["metrics"][f"neighbors_{which}"]
    assert read_metadata(tmp_path / "better" / "student.safetensors")["kept"] == "start"
    log = (tmp_path / "better" / "log.txt").read_text()
    assert "start 100.0 %; the file holds the initial weights (keep_weights: better)" in log
    log = (tmp_path / "last" / "log.txt").read_text()
    assert "start 100.0 %; the file holds the weights of the last step (keep_weights: last)" in log
    share = 100 * results[1]["metrics"]["agreement"]
    worse = "warning: training took the student away from its teacher"
    assert worse in log
    assert f"both give the same class to {share:.1f} %, with the initial weights to 100.0 % (KL " in log
    assert worse not in (tmp_path / "better" / "log.txt").read_text()


def test_a_start_with_classes_in_another_order_has_no_classifier(
    teacher_file: Path,
    distill_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    call: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(better_weights, "LEAST_IMAGES", 15)
    facts, tensors = read_metadata(teacher_file), load_file(teacher_file)
    turned = {name: tensor.roll(1, 0) if name.startswith("fc.") else tensor for name, tensor in tensors.items()}
    inputs = InputSettings(tuple(facts["mean"]), tuple(facts["std"]), (32, 32), facts["interpolation"], False)
    names = [facts["class_names"][-1], *facts["class_names"][:-1]]
    began = tmp_path / "began.safetensors"
    save_backbone(began, turned, arch=facts["arch"], inputs=inputs, classes=len(names), class_names=names)
    settings = distill_settings | {"student": {"model": str(began), "batchnorm": "batch"}}
    settings["optim"] = {"lr": 0.5, "reference_batch": 8, "warmup_steps": 0}
    for name in ("better", "last"):
        assert call(distill, arguments(settings | {"keep_weights": name}, name)) == 0
    kept, last = (load_file(tmp_path / name / "student.safetensors") for name in ("better", "last"))
    assert read_metadata(tmp_path / "better" / "student.safetensors")["kept"] == "start"
    assert torch.equal(kept["conv1.0.weight"], turned["conv1.0.weight"])
    assert torch.equal(kept["fc.weight"], last["fc.weight"])
    log = (tmp_path / "better" / "log.txt").read_text()
    assert "classifier re-initialized: different classes or class order" in log


def test_what_is_missing_for_a_comparison_is_said(
    teacher_file: Path,
    distill_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    call: Callable[..., int],
    tmp_path: Path,
) -> None:
    settings = distill_settings | {"student": {"model": str(teacher_file)}, "steps": 1}
    assert call(distill, arguments(settings, "few")) == 0
    assert (
        "data.val: too few images to compare the student with its start" in (tmp_path / "few" / "log.txt").read_text()
    )
    data = {name: value for name, value in settings["data"].items() if name != "val"}
    assert call(distill, arguments(settings | {"data": data}, "none")) == 0
    line = "data.val: not given, so the trained weights are not compared with the initial ones"
    assert line in (tmp_path / "none" / "log.txt").read_text()
    assert call(distill, arguments(settings | {"data": data, "student": {"model": "random:test_resnet"}}, "new")) == 0
    assert "data.val:" not in (tmp_path / "new" / "log.txt").read_text()
