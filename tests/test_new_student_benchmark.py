"""benchmarks/new_student.py: its settings, its measures, and a run at the smallest size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ssld.shared.config.settings import parse_config
from ssld.stage1_ssld.config import DistillConfig, PrototypesConfig, SoftLabelsConfig
from tests.test_benchmarks import script


def test_every_row_of_a_new_student_is_a_valid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of stage 1, of the store and of the prototypes; all rows have the same views and schedule."""
    benchmark = script("new_student")
    monkeypatch.setattr(benchmark, "paste", lambda *_: None)
    bench = benchmark.Bench(tmp_path, tmp_path / "runs", benchmark.Scale())
    cells = tmp_path / "bccd" / "annotations" / "instances_train.json"
    for folder in (cells.parent, bench.output):
        folder.mkdir(parents=True)
    cells.write_text('{"images": [{"file_name": "b.jpg"}, {"file_name": "a.jpg"}]}')

    def parsed(kind: Any, settings: dict[str, Any]) -> Any:
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(settings))
        return parse_config(kind, ["--config", str(file), "--output", str(tmp_path / "run")], program="run")

    rows = {name: parsed(DistillConfig, bench.student(row)) for name, row in benchmark.ROWS.items()}
    supervised, ssld = rows["supervised"], rows["ssld"]
    on_labels = {name for name, row in rows.items() if row.objective == "labels"}
    assert on_labels == {name for name in rows if name.startswith("supervised")}
    own = rows.pop("own_pooled_spatial")
    assert (own.data.image_size, own.batch_size, own.steps) == (128, 32, ssld.steps)
    assert own.losses == rows["lite0_pooled_spatial"].losses
    assert Path(own.data.train[0].path).read_text() == "a.jpg\nb.jpg\n"
    assert Path(own.data.train[0].root) == cells.parents[1] / "images"
    for name, row in rows.items():
        assert row.data.model_dump(exclude={"train"}) == ssld.data.model_dump(exclude={"train"})
        assert row.optim == ssld.optim.model_copy(update={"lr": float(name.partition("_lr")[2] or 3e-3)})
        assert row.hard_label_weight == 0
        assert row.steps == int(name.partition("_x")[2] or 1) * ssld.steps
    assert [Path(one.path).stem for one in supervised.data.train] == ["labeled"]
    assert [Path(one.path).stem for one in ssld.data.train] == ["labeled", "unlabeled"]
    store = parsed(SoftLabelsConfig, bench.soft_labels()[0])
    assert ssld.store == store.output.parent / "runs" / "soft_labels" / "store"
    assert store.data == ssld.data  # else the store is refused
    assert store.teacher == rows["live"].teacher
    assert rows["lite0_pooled"].teacher.model.endswith("efficientnet_lite0.safetensors")
    made = parsed(PrototypesConfig, bench.prototypes(64)[0])
    assert (made.prototypes, made.image_size) == (64, rows["lite0_prototypes64"].teacher.size)

    rows_of = [{"id": number, "file_name": f"{number}.jpg"} for number in range(9)]
    cells.write_text(json.dumps({"images": rows_of, "annotations": [{"image_id": number} for number in range(9)]}))
    few = benchmark.Bench(tmp_path, tmp_path / "runs", benchmark.Scale(labeled=4))
    chosen = [json.loads(few.annotations("bccd", seed).read_text()) for seed in (0, 0, 1)]
    kept = [sorted(image["id"] for image in one["images"]) for one in chosen]
    assert kept[0] == kept[1] != kept[2]
    for one, ids in zip(chosen, kept, strict=True):
        assert len(ids) == 4
        assert sorted(row["image_id"] for row in one["annotations"]) == ids
    assert few.scores("random", "bccd", False, 0) != bench.scores("random", "bccd", False, 0)


def test_measures_of_embeddings() -> None:
    """The probe is where the gradient of its objective is 0, by float64; the vote finds blobs that are far apart."""
    benchmark = script("new_student")
    draw = np.random.default_rng(0)
    centers = draw.normal(size=(3, 5))
    labels = torch.from_numpy(draw.integers(0, 3, 90))
    bank = torch.from_numpy(centers[labels] + 0.8 * draw.normal(size=(90, 5))).float()
    near = torch.from_numpy(centers + 0.01 * draw.normal(size=(3, 5))).float()
    assert benchmark.nearest(bank, labels, near, neighbors=5).tolist() == [0, 1, 2]
    x = bank.double().numpy()
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    targets, weights, bias, decay = np.eye(3)[labels], np.zeros((5, 3)), np.zeros(3), 0.05
    for _ in range(4000):
        scores = np.exp(x @ weights + bias)
        error = (scores / scores.sum(1, keepdims=True) - targets) / 90
        weights, bias = weights - 0.5 * (x.T @ error + decay * weights), bias - 0.5 * error.sum(0)
    expected = (x @ weights + bias).argmax(1)
    assert 0.05 < (expected != labels.numpy()).mean() < 0.5  # not separable: the place of the borders counts
    assert benchmark.probe(bank, labels, bank, decay).tolist() == expected.tolist()
