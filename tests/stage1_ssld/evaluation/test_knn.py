"""Nearest neighbors against a search written out in NumPy, and through evaluate.py, on one process and on two."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssld.stage1_ssld.data.batch import Batch
from ssld.stage1_ssld.evaluate import main
from ssld.stage1_ssld.evaluation.knn import knn_accuracy, vote
from tests.tf32 import MatrixProductsInTF32

CPU = torch.device("cpu")


def batches(labels: np.ndarray, size: int, offset: int = 0) -> list[Batch]:
    """Batches whose pixels carry the number of the image."""
    actual = []
    for first in range(0, len(labels), size):
        numbers = np.arange(first, min(first + size, len(labels))) + offset
        pixels = torch.from_numpy(numbers).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        actual.append(Batch(pixels, torch.from_numpy(labels[first : first + size]), [str(n) for n in numbers], []))
    return actual


def lookup(table_ND: np.ndarray) -> Any:
    table = torch.from_numpy(table_ND)
    return lambda pixels: table[pixels[:, 0, 0, 0].long()]


def by_hand(queries: np.ndarray, labels: np.ndarray, bank: np.ndarray, bank_labels: np.ndarray, k: int) -> float:
    """Share of the labeled queries that the weighted vote gets right."""
    bank, bank_labels = bank[bank_labels >= 0], bank_labels[bank_labels >= 0]
    queries, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank))
    right = []
    for query, label in zip(queries, labels, strict=True):
        cosines = bank @ query
        nearest = np.argsort(-cosines, kind="stable")[:k]
        votes = np.zeros(bank_labels.max() + 1)
        np.add.at(votes, bank_labels[nearest], np.exp(cosines[nearest] / 0.07))
        right.append(votes.argmax() == label)
    return float(np.mean(np.array(right)[labels >= 0]))


@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_against_an_exhaustive_search(k: int) -> None:
    generator = np.random.default_rng(k)
    table = generator.standard_normal((100, 6))
    labels = generator.integers(0, 4, 100)
    table += 0.8 * np.eye(6)[labels]  # classes are partly separable
    labels[[3, 50, 90]] = -1
    queries, bank = labels[:40], labels[40:]
    known = int((bank >= 0).sum())
    expected = by_hand(table[:40], queries, table[40:], bank, min(k, known))
    assert 0.3 < expected < 0.95
    for size in (7, 60):
        result = knn_accuracy(
            lookup(table),
            batches(queries, size),
            batches(bank, size, offset=40),
            neighbors=k,
            classes=4,
            device=CPU,
        )
        assert result == {"knn_top1": pytest.approx(expected, abs=1e-9)}


def test_the_vote_is_weighted_by_similarity_and_safe_from_overflow() -> None:
    cosines = torch.tensor([[0.9, 0.5, 0.5], [0.9, 0.88, 0.88], [-1.0, -1.0, float("-inf")]])
    classes = torch.tensor([[0, 1, 1], [0, 1, 1], [2, 2, 0]])
    assert vote(cosines, classes, 3).tolist() == [0, 1, 2]
    assert vote(cosines, classes, 3, temperature=1e-4).tolist() == [0, 0, 2]
    assert vote(cosines, classes, 3, temperature=100.0).tolist() == [1, 1, 2]


def test_of_equal_neighbors_the_earlier_one_votes() -> None:
    table = np.ones((9, 2))
    bank = np.array([1, 0, 0, 0, 0, 0, 0, 0])
    for size in (1, 3, 8):
        result = knn_accuracy(
            lookup(table), batches(np.array([1]), 1), batches(bank, size, offset=1), neighbors=1, classes=2, device=CPU
        )
        assert result == {"knn_top1": 1.0}


def test_the_bank_is_never_held() -> None:
    table = np.random.default_rng(0).standard_normal((120, 4))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def embed(pixels: Tensor) -> Tensor:
        nonlocal most
        vectors: Tensor = lookup(table)(pixels).clone()
        alive.append(weakref.ref(vectors))
        most = max(most, sum(reference() is not None for reference in alive))
        return vectors

    def one_by_one() -> Iterator[Batch]:
        yield from batches(np.zeros(100, np.int64), 2, offset=20)

    knn_accuracy(embed, batches(np.zeros(20, np.int64), 20), one_by_one(), neighbors=3, classes=1, device=CPU)
    assert len(alive) == 51
    assert most <= 3


def test_nothing_to_judge_and_nothing_to_vote() -> None:
    table = np.eye(4)
    some, empty = batches(np.array([0, 1]), 2), Batch(torch.empty(0, 3, 1, 1), torch.empty(0).long(), [], ["broken"])
    reported: list[str] = []
    options: dict[str, Any] = {"neighbors": 1, "classes": 2, "device": CPU, "on_unreadable": reported.extend}
    assert knn_accuracy(lookup(table), [], some, **options) == {}
    assert knn_accuracy(lookup(table), some, [empty], **options) == {}
    assert reported == ["broken"]
    assert knn_accuracy(lookup(table), batches(np.array([-1, -1]), 2), some, **options) == {}


@pytest.mark.slow
def test_evaluate_with_a_bank_on_one_and_two_processes(
    tiny: Any, teacher_file: Path, call: Any, scripts: Any, tmp_path: Path
) -> None:
    argv = ["--model", str(teacher_file), "--data.path", str(tiny.val), "--bank.path", str(tiny.train)]
    argv += ["--threads", "1", "--workers", "0", "--device", "cpu", "--batch_size", "4", "--neighbors", "5"]
    argv += ["--teacher.model", str(teacher_file)]
    assert call(main, [*argv, "--output", str(tmp_path / "one")]) == 0
    metrics = json.loads((tmp_path / "one" / "result.json").read_text())["metrics"]
    assert (metrics["images"], metrics["agreement"]) == (15, 1.0)
    assert "knn_top1" in (tmp_path / "one" / "log.txt").read_text()

    # by hand, from the embeddings of the file
    from ssld.shared.models.backbones import create_classifier
    from ssld.shared.models.references import parse_reference
    from ssld.shared.models.teacher import embed
    from ssld.stage1_ssld.data.loaders import ValViews
    from ssld.stage1_ssld.data.sources import ImageSource
    from ssld.stage1_ssld.data_config import SourceConfig

    net, inputs = create_classifier(parse_reference(str(teacher_file)))
    net.eval()
    parts = []
    for path in (tiny.val, tiny.train):
        source = ImageSource(SourceConfig(path=str(path)), 0)
        views = ValViews(
            source, source.labels, image_size=inputs.size[0], val_crop=0.875, interpolation=inputs.interpolation
        )
        images = torch.stack([pixels for row in range(len(views)) if (pixels := views[row].pixels_CHW) is not None])
        with torch.no_grad():
            parts += [embed(net, images).double().numpy(), np.array(source.labels)]
    assert metrics["knn_top1"] == pytest.approx(by_hand(parts[0], parts[1], parts[2], parts[3], 5))

    process = scripts.run("stage1_ssld/evaluate.py", *argv, "--output", str(tmp_path / "two"), ranks=2)
    assert process.returncode == 0, process.stderr
    again = json.loads((tmp_path / "two" / "result.json").read_text())["metrics"]
    assert again == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_evaluate_on_classes_that_are_not_the_models(
    tiny: Any, teacher_file: Path, call: Any, user_error: Any, tmp_path: Path
) -> None:
    for part in ("train", "val"):
        for kind, name in (("disc", "round"), ("stripes", "other")):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / name).symlink_to(getattr(tiny, part) / kind)
    argv = ["--model", str(teacher_file), "--data.path", str(tmp_path / "val"), "--threads", "1", "--workers", "0"]
    argv += ["--device", "cpu", "--output", str(tmp_path / "run")]
    assert "class 'other' is not among the 3 classes" in user_error(main, argv)
    bank = ["--bank.path", str(tmp_path / "train"), "--neighbors", "3"]
    assert call(main, [*argv, *bank]) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert set(metrics) == {"images", "knn_top1"}
    assert "top-1 is not measured" in (tmp_path / "run" / "log.txt").read_text()


def test_mistakes_with_a_bank(tiny: Any, teacher_file: Path, user_error: Any, tmp_path: Path) -> None:
    def line(data: Path, bank: Path | str, *flags: str) -> str:
        argv = ["--model", str(teacher_file), "--data.path", str(data), "--bank.path", str(bank), *flags]
        message: str = user_error(main, [*argv, "--output", str(tmp_path / "run"), "--threads", "1"])
        assert not (tmp_path / "run").exists()
        return message

    assert f"{tiny.unlabeled}: no labels, which nearest-neighbor accuracy needs" in line(tiny.unlabeled, tiny.train)
    assert f"bank: {tiny.unlabeled}: no labels for its images to vote" in line(tiny.val, tiny.unlabeled)
    assert f"neighbors: 31 is more than the 30 labeled images of {tiny.train}" in line(
        tiny.val, tiny.train, "--neighbors", "31"
    )
    both = f"bank: {tiny.val}/../{tiny.val.name}: 15 images of it are in {tiny.val} too, first {tiny.val}/disc/disc_000.png"
    assert both in line(tiny.val, f"{tiny.val}/../{tiny.val.name}")
    (tmp_path / "bank" / "disc").mkdir(parents=True)
    (tmp_path / "bank" / "disc" / "a.png").write_bytes((tiny.val / "disc" / "disc_000.png").read_bytes())
    assert "class 'ring' is not among the 1 classes of" in line(tiny.val, tmp_path / "bank", "--neighbors", "1")


def test_unlabeled_rows_of_a_named_source_stay_unlabeled() -> None:
    from types import SimpleNamespace

    from ssld.stage1_ssld.data.labels import match_classes

    source: Any = SimpleNamespace(labels=[1, -1, 0], class_names=["a", "b"], path="here", unlabeled_because=None)
    assert match_classes(source, ["b", "a"], 2, "model") == [0, -1, 1]


def test_tf32_does_not_decide_which_image_is_nearest() -> None:
    """The nearer of two images is nearer by less than the rounding of TF32; of equal cosines the other one, the first, would win."""
    angles = np.array([0, 0.50001, 0.5])
    table = np.stack((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)
    queries, bank = batches(np.array([1]), 1), batches(np.array([0, 1]), 2, offset=1)
    with MatrixProductsInTF32() as products:
        torch.eye(2) @ torch.eye(2)  # the embedding network's own products stay in TF32
        result = knn_accuracy(lookup(table), queries, bank, neighbors=1, classes=2, device=CPU)
    assert result == {"knn_top1": 1.0}
    assert products.rounded == 1
