"""The commands of stage 2 on the simulated GPU: training with all that may belong to it, evaluation, prediction, export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export.passes import move_to_device_pass

from ssld.shared.models.model_file import read_tensors
from ssld.stage2_detect import evaluate, export, predict, train
from tests.simulated_cuda.device import Counted, SimulatedCuda
from tests.simulated_cuda.table import LOOPS
from tests.stage2_detect.conftest import TinyCoco, small_settings, tiny_coco, written_again

Settings = dict[str, Any]
Run = Callable[..., Path]
__all__ = ["tiny_coco"]
GFL: Settings = {"kind": "gfl", "fpn_channels": 16, "dense": {"convolutions": 1, "score_threshold": 0.0}}


@pytest.fixture
def settings(tiny_coco: TinyCoco) -> Settings:
    """A small Faster R-CNN on the GPU: 3 steps and an evaluation."""
    return small_settings(tiny_coco) | {"device": "auto", "steps": 3, "log_every": 1, "save_every": 2}


@pytest.fixture
def run(call: Any, arguments: Any, settings: Settings, tmp_path: Path, gpu: SimulatedCuda) -> Run:
    """Trains with changed settings; gives the run directory."""

    def train_with(output: str = "run", **change: Any) -> Path:
        assert call(train.main, arguments(settings | change, output)) == 0
        assert (tmp_path / output / "detector.safetensors").is_file()
        device = "cpu," if change.get("device") == "cpu" else "cuda"
        assert f"{device}" in (tmp_path / output / "log.txt").read_text()
        return tmp_path / output

    return train_with


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_training_is_that_of_the_cpu(run: Run, settings: Settings) -> None:
    on_gpu, on_cpu = run("gpu", precision="fp32"), run("cpu", device="cpu")  # auto is bf16 on a GPU
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-2)
    assert losses(on_gpu)[0] == pytest.approx(losses(on_cpu)[0], rel=1e-4)


def test_auto_batch_on_a_gpu(run: Run) -> None:
    found = json.loads((run(auto_batch=True) / "auto_batch.json").read_text())
    assert found == {"accumulate": 1, "processes": 1}


@pytest.mark.parametrize("precision", ["fp16"])
def test_a_resumed_run_ends_as_one_without_a_break(run: Run, precision: str, settings: Settings) -> None:
    """With an average of the weights and, under fp16, the gradient scaler's state."""
    common: Settings = {
        "precision": precision,
        "channels_last": True,
        "ema": {"decay": 0.9},
        "optim": settings["optim"] | {"milestones_steps": []},
    }
    run("broken", **common, steps=2, save_every=2)
    resumed, whole = run("broken", **common), run("whole", **common)
    assert "checkpoint" in (resumed / "log.txt").read_text()
    one, other = (read_tensors(folder / "detector.safetensors") for folder in (resumed, whole))
    assert all((one[name] == other[name]).all() for name in other)


def test_masks_evaluation_between_steps_and_validation_loss(run: Run, settings: Settings, tmp_path: Path) -> None:
    data = dict(settings["data"])
    for part in ("train", "val"):
        content = json.loads(Path(data[f"{part}_annotations"]).read_text())
        for one in content["annotations"]:
            x, y, w, h = one["bbox"]
            one["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
        data[f"{part}_annotations"] = str(tmp_path / f"{part}.json")
    model = settings["model"] | {"kind": "mask_rcnn", "mask": {"hidden": 8, "convolutions": 1}}
    trained = run(model=model, data=data, evaluate_every=2, val_loss=True, accumulate=2)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_AP_segm" in line and "val_loss_mask" in line] == [2, 3]


def test_distillation_of_both_families(run: Run, settings: Settings, tmp_path: Path) -> None:
    more = written_again(Path(settings["data"]["val_images"]), tmp_path / "more")
    changes: dict[str, Settings] = {"pkd": {"unlabeled": str(more)}, "ld": {"model": GFL}}
    for name, change in changes.items():
        model = change.get("model", settings["model"])
        teacher = run(f"teacher_{name}", model=model, steps=1) / "detector.safetensors"
        student = run(name, **change, precision="bf16", distill={"teacher": str(teacher), "check_ap": 0})
        assert f"loss_{name}" in (student / "metrics.jsonl").read_text()


@pytest.mark.parametrize("kind", ["faster_rcnn", "gfl"])
def test_waits_of_the_loop(kind: str, run: Run, gpu: SimulatedCuda, settings: Settings) -> None:
    """Of one more step, as the difference between runs of two and three steps, logged at the end."""
    counts: list[Counted] = []
    model = settings["model"] if kind == "faster_rcnn" else GFL
    data = {key: value for key, value in settings["data"].items() if not key.startswith("val_")}
    for steps in (2, 3):
        with gpu.count() as counted:
            run(
                f"{kind}_{steps}",
                model=model,
                data=data,
                steps=steps,
                log_every=100,
                save_every=100,
                channels_last=True,
            )
        counts.append(counted)
    more = counts[1] - counts[0]
    expected = LOOPS[f"train.py, {kind}"].of(settings["batch_size"])
    assert (more.waits.total(), more.uploads.total()) == expected, str(more)
    assert more.pageable.total() == 0, str(more)


def test_a_detector_file_is_evaluated_looked_through_and_exported(
    run: Run, call: Any, settings: Settings, tmp_path: Path, gpu: SimulatedCuda
) -> None:
    model, data = run(model=GFL, steps=1) / "detector.safetensors", settings["data"]
    common = ["--model", str(model), "--workers", "0", "--threads", "1"]
    ground_truth = ["--annotations", data["val_annotations"], "--images", data["val_images"]]
    for precision in ("fp32", "bf16", "fp16"):
        line = [*common, *ground_truth, "--precision", precision, "--output", str(tmp_path / precision)]
        assert call(evaluate.main, [*line, "--tta.flip", "true"]) == 0
    found = ["--images", data["val_images"], "--score_threshold", "0"]
    assert call(predict.main, [*common, *found, "--tile", "48", "--output", str(tmp_path / "predicted")]) == 0
    assert len(json.loads((tmp_path / "predicted" / "predictions.json").read_text())["annotations"]) > 5
    assert call(predict.main, [*common, *found, "--pseudo_labels", "true", "--output", str(tmp_path / "pseudo")]) == 0
    line = [
        "--model",
        str(model),
        "--formats",
        "torch",
        "--check_images",
        "2",
        "--missing_tolerance",
        "0.5",
        "--output",
        str(tmp_path / "exported"),
        "--threads",
        "1",
    ]
    with gpu.hidden():  # files are written and checked on the CPU
        assert call(export.main, line) == 0
        program = torch.export.load(tmp_path / "exported" / "detector.pt2")
    detect = move_to_device_pass(program, "cuda").module()
    pixels, sizes = torch.zeros(1, 3, 160, 192, dtype=torch.uint8), torch.tensor([[160, 192]])
    assert {output.device.type for output in detect(pixels.to("cuda"), sizes.to("cuda"))} == {"cuda"}
