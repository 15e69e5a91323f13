"""Features of training around the step: moving average, early stop, loss on evaluation images, expected scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.shared.images import stable_seed
from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect import train
from ssld.stage2_detect.config import ExpectedConfig
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.evaluation.scoring import compare_expected
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.rcnn import RCNN
from ssld.stage2_detect.training import validation
from ssld.stage2_detect.training.validation import validation_losses

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


def result(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "result.json").read_text())["metrics"]
    return metrics


# Moving average


def test_the_average_is_what_is_exported(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    settings = train_settings | {"ema": {"decay": 0.6, "warmup": False}, "save_every": 1, "keep_checkpoints": 9}
    settings["optim"] = train_settings["optim"] | {"lr": 0.05}
    assert call(train.main, arguments(settings)) == 0
    run = tmp_path / "run"
    checkpoints = [load_file(path / "model.safetensors") for path in sorted(run.glob("checkpoints/step_*"))]
    assert len(checkpoints) == 6
    exported = load_file(run / "detector.safetensors")
    moved = 0
    for name, tensor in exported.items():
        average = checkpoints[0][name].double()  # the first step is taken over whole
        for weights in checkpoints[1:]:
            average = 0.6 * average + 0.4 * weights[name].double()
        np.testing.assert_allclose(tensor.double(), average, rtol=1e-5, atol=1e-7, err_msg=name)
        moved += not torch.equal(tensor, checkpoints[-1][name])
    assert moved > 10
    assert read_metadata(run / "detector.safetensors")["weights"] == "ema"
    assert load_file(run / "checkpoints/step_00000006/ema.safetensors").keys() == exported.keys()


def test_a_resumed_average_is_the_same_to_the_bit(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, metrics_of: Callable[[Path], Any]
) -> None:
    settings = train_settings | {"ema": {"decay": 0.9}, "evaluate_every": 2, "val_loss": True}
    assert call(train.main, arguments(settings, "whole")) == 0
    assert call(train.main, arguments(settings | {"steps": 3}, "parts")) == 0
    assert call(train.main, arguments(settings, "parts")) == 0
    assert "resumed from step_00000003" in (tmp_path / "parts" / "log.txt").read_text()
    whole, parts = (load_file(tmp_path / name / "detector.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = {line["step"]: line for line in metrics_of(tmp_path / "whole") if "loss" in line}
    assert all(lines[line["step"]] == line for line in metrics_of(tmp_path / "parts") if "loss" in line)


# Early stop and best file


def test_patience_ends_a_run_that_does_not_get_better(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = train_settings | {"steps": 40, "evaluate_every": 2, "patience": 2}
    settings["optim"] = train_settings["optim"] | {"lr": 1e-30, "warmup_steps": 0}
    assert call(train.main, arguments(settings)) == 0
    run = tmp_path / "run"
    # The first evaluation is the best so far, the second and third are no better.
    assert result(run)["steps"] == 6
    assert (
        "step 6: stopped after 2 evaluations in a row without a better AP (patience)" in (run / "log.txt").read_text()
    )
    best = read_metadata(run / "detector_best.safetensors")
    assert best["step"] == 2
    log = (run / "log.txt").read_text()
    assert f"best: step 2, AP {100 * best['metrics']['AP']:.2f}: {run / 'detector_best.safetensors'}\n" in log
    assert read_metadata(run / "detector.safetensors")["step"] == 6
    assert (run / "checkpoints" / "step_00000006" / "COMPLETE").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_AP" in line] == [2, 4, 6], "nothing is evaluated twice"
    capsys.readouterr()
    assert call(train.main, arguments(settings)) == 0
    assert "finished; nothing to do" in capsys.readouterr().out


def test_patience_ends_a_run_by_a_repeated_evaluation_after_the_same_check(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second evaluation dies; the next start repeats it, and then refuses the last update, whose losses are not finite."""
    settings = train_settings | {"steps": 40, "evaluate_every": 2, "patience": 1}
    settings["optim"] = train_settings["optim"] | {"lr": 1e-30, "warmup_steps": 0}
    score, calls = validation.score, [0]

    def dying(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError
        return score(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "score", dying)
        assert call(train.main, arguments(settings)) == 2
    losses = RCNN.losses

    def infinite(*args: Any) -> Any:
        first, *others = losses(*args)
        return {name: loss * torch.inf for name, loss in first.items()}, *others

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RCNN, "losses", infinite)
        assert call(train.main, arguments(settings)) == 2
    assert not (run / "result.json").exists()
    assert not (run / "checkpoints" / "step_00000004").exists()
    assert (run / "checkpoints" / "step_00000002").exists()
    assert call(train.main, arguments(settings)) == 0
    assert result(run)["steps"] == 4


def test_the_last_evaluation_can_be_the_best(
    learning_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    assert call(train.main, arguments(learning_settings | {"evaluate_every": 40})) == 0
    best = read_metadata(tmp_path / "run" / "detector_best.safetensors")
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val_AP"] for line in evaluations if "val_AP" in line}
    assert set(scores) == {40, 60}
    assert best["step"] == max(scores, key=lambda step: scores[step])
    assert best["metrics"]["AP"] == max(scores.values()) > 0


def test_an_evaluation_set_without_objects_gives_no_score_and_no_early_stop(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    content = json.loads(Path(train_settings["data"]["val_annotations"]).read_text())
    (tmp_path / "empty.json").write_text(json.dumps(content | {"annotations": []}))
    settings = train_settings | {"steps": 4, "evaluate_every": 1, "patience": 1}
    settings["data"] = train_settings["data"] | {"val_annotations": str(tmp_path / "empty.json")}
    assert call(train.main, arguments(settings)) == 0
    run = tmp_path / "run"
    log = (run / "log.txt").read_text()
    assert "no objects, so there will be no score" in log
    assert "step 2: no score: the evaluation images have no objects" in log
    assert result(run)["steps"] == 4
    assert result(run)["AP"] is None
    assert not (run / "detector_best.safetensors").exists()


# Data used for training


def test_a_bulk_loss_stops_training_unless_it_is_allowed(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, user_error: Callable[..., str]
) -> None:
    content = json.loads(Path(train_settings["data"]["train_annotations"]).read_text())
    tall = [row for row in content["annotations"] if row["category_id"] == 7]
    for row in tall:
        row["iscrowd"] = 1
    content["annotations"][0]["area"] = -1
    file = tmp_path / "crowds.json"
    file.write_text(json.dumps(content))
    settings = train_settings | {"steps": 1}
    settings["data"] = train_settings["data"] | {"train_annotations": str(file)}
    lost = f"{len(tall)} marked iscrowd (first: annotation {tall[0]['id']})"
    assert user_error(train.main, arguments(settings)) == (
        f"{file}: all boxes of class 'tall' would be left out: {lost}; correct the source, or set data.allow_loss: true to train on the rest"
    )
    assert not (tmp_path / "run").exists()
    settings["data"]["allow_loss"] = True
    assert call(train.main, arguments(settings)) == 0
    first = content["annotations"][0]["id"]
    changed = f"1 box changed: 1 with an area that is no number above 0 (first: annotation {first})"
    message = f"{file}: {len(tall)} boxes dropped: {lost}; {changed}"
    assert message in (tmp_path / "run" / "log.txt").read_text()
    read = json.loads((tmp_path / "run" / "result.json").read_text())["read"]
    boxes = read["data.train_annotations"]["box"]
    assert boxes["dropped"] == {"marked iscrowd": {"count": len(tall), "first": f"annotation {tall[0]['id']}"}}
    assert boxes["kept"] == len(content["annotations"]) - len(tall)
    assert read["data.val_annotations"]["image"]["kept"] == 5
    for row in content["annotations"]:
        row["iscrowd"] = 1
    file.write_text(json.dumps(content))
    assert "no box to train on: all boxes would be left out" in user_error(train.main, arguments(settings, "other"))


# Loss on evaluation images


@pytest.fixture
def trained(train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path) -> Path:
    settings = train_settings | {"steps": 5, "val_loss": True, "val_batch_size": 2}
    assert call(train.main, arguments(settings, "trained")) == 0
    return tmp_path / "trained"


def losses_of_images(trained: Path, data: dict[str, str], numbers: list[int]) -> dict[str, float]:
    """Losses of a batch of the drawn evaluation scenes, from the files, without our loaders."""
    content = json.loads(Path(data["val_annotations"]).read_text())
    pixels = np.stack([np.array(Image.open(Path(data["val_images"]) / f"{number}.png")) for number in numbers])
    boxes, labels = torch.zeros(len(numbers), 2, 4), torch.full((len(numbers), 2), -1)
    for row, number in enumerate(numbers):
        objects = [one for one in content["annotations"] if one["image_id"] == f"val-{number}"]
        for place, one in enumerate(objects):
            x, y, width, height = one["bbox"]
            boxes[row, place] = torch.tensor([x, y, min(64, x + width), min(64, y + height)])
            labels[row, place] = {3: 0, 7: 1}[one["category_id"]]
    count = len(numbers)
    images = ImageBatch(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.full((count, 2), 64), torch.ones(count))
    seeds = torch.tensor([stable_seed("validation", f"val-{number}") for number in numbers])
    model = load_detector(trained / "detector.safetensors").model
    with torch.no_grad():
        losses, _ = model.losses(model.features(images), images.sizes_B2, Targets(boxes, labels, seeds), ONE_RANK)
    return {name: loss.item() for name, loss in losses.items()}


def test_validation_loss_is_the_mean_over_images(trained: Path, train_settings: Settings) -> None:
    parts = [losses_of_images(trained, train_settings["data"], numbers) for numbers in ([0, 1], [2, 3], [4])]
    expected = {name: (2 * parts[0][name] + 2 * parts[1][name] + parts[2][name]) / 5 for name in parts[0]}
    metrics = result(trained)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"] == pytest.approx(sum(expected.values()), rel=1e-5)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val_loss"] == metrics["loss"]
    assert lines[-1]["val_loss_rpn_box"] == metrics["loss_rpn_box"]


def test_validation_loss_leaves_the_model_as_it_was(trained: Path, train_settings: Settings) -> None:
    data = train_settings["data"]
    model = load_detector(trained / "detector.safetensors").model
    assert isinstance(model, RCNN)
    model.ranks = Ranks(7, lambda count: 7 * count)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"batch_size": 2, "workers": 0, "device": torch.device("cpu"), "dtype": torch.float32}
    objects = read_coco(data["val_annotations"], data["val_images"], training=True)
    losses = validation_losses(model, objects, Sizing(64, 64), **options)
    assert losses == validation_losses(model, objects, Sizing(64, 64), **options)
    assert losses["loss_cls"] == pytest.approx(result(trained)["loss_cls"], rel=1e-6), "counts of this rank alone"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


@pytest.mark.slow
def test_two_ranks_measure_the_loss_as_one(
    train_settings: Settings, on_one_and_two: Callable[..., Any], tmp_path: Path
) -> None:
    """Three batches for two ranks: the counts that losses are divided by must not wait for a batch that never comes."""
    settings = train_settings | {"steps": 1, "val_loss": True, "val_batch_size": 2, "ema": {"decay": 0.5}}
    on_one_and_two(train.main, "stage2_detect/train.py", settings)
    one, two = (result(tmp_path / name) for name in ("one", "two"))
    names = [name for name in one if name.startswith("loss")]
    assert len(names) == 5
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-9)


# Expected scores


@pytest.mark.parametrize(
    ("expected", "metrics", "met", "text"),
    [
        ({"AP": 41.4}, {"AP": 0.412}, True, "expected: met: AP 41.20 in bf16 (expected 41.4), tolerance 0.3"),
        ({"AP": 41.4}, {"AP": 0.41}, False, "expected: NOT met: AP 41.00 in bf16 (expected 41.4), tolerance 0.3"),
        ({"AP": 41.4, "tolerance": 0.5}, {"AP": 0.41}, True, "tolerance 0.5"),
        ({"AP": 40, "AP_segm": 36}, {"AP": 0.45, "AP_segm": 0.3}, False, "AP_segm 30.00 in bf16 (expected 36)"),
        ({"AP": 40, "AP_segm": 36}, {"AP": 0.45}, None, "expected: not compared: AP_segm was not measured"),
        ({"AP": 40}, {}, None, "AP was not measured"),
        ({"AP": 40}, {"AP": None}, None, "AP was not measured"),
        ({"AP": 40, "images": 5000}, {"AP": 0.4}, None, "it is for 5000 evaluation images, these are 5"),
    ],
)
def test_expected(expected: Settings, metrics: Settings, met: bool | None, text: str) -> None:
    outcome, line = compare_expected(ExpectedConfig(**expected), metrics, 5, "bf16")
    assert outcome is met
    assert text in line


def test_expected_without_an_evaluation_set() -> None:
    outcome = compare_expected(ExpectedConfig(AP=40, images=5000), {}, 0, "fp32")
    assert outcome == (None, "expected: not compared: there are no evaluation images")


def test_expected_is_compared_after_the_last_evaluation(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    settings = train_settings | {"steps": 1, "expected": {"AP": 50, "images": 5}}
    assert call(train.main, arguments(settings)) == 0
    assert result(tmp_path / "run")["expected_met"] is False
    assert json.loads((tmp_path / "run" / "result.json").read_text())["config"]["precision"] == "fp32"
    assert (
        "expected: NOT met: AP 0.00 in fp32 (expected 50), tolerance 0.3" in (tmp_path / "run" / "log.txt").read_text()
    )


# Backbones without BatchNorm, and invalid settings


def test_freezing_norm_without_batchnorm_is_logged_and_has_no_effect(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    assert call(train.main, arguments(train_settings | {"backbone": "random:test_convnext", "steps": 1})) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "model.freeze_norm: test_convnext has no BatchNorm, so there is nothing to freeze" in log


def test_user_errors(
    train_settings: Settings, arguments: Arguments, user_error: Callable[..., str], tmp_path: Path
) -> None:
    def message(**changes: Any) -> str:
        return user_error(train.main, arguments(train_settings | changes, "bad"))

    blind = {key: value for key, value in train_settings["data"].items() if "val" not in key}
    assert "val_loss needs evaluation images" in message(val_loss=True, data=blind)
    assert "patience counts evaluations: give evaluate_every" in message(patience=2)
    assert "ema.decay" in message(ema={"decay": 1.0})
    assert not (tmp_path / "bad").exists()
