"""TensorBoard's event files: read back with TensorBoard's own reader."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from ssld.shared.config.settings import CommandConfig, Config
from ssld.shared.run_dir import RunDir
from ssld.shared.training.trackers import start_trackers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of TensorBoard's own imports
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData


class Optim(Config):
    """A group of settings."""

    lr: float = 0.5
    milestones: list[int] = [3, 4]
    decay: float | None = None


class TrackedConfig(CommandConfig):
    """Settings of a command with trackers."""

    steps: int = 4
    name: str = "test_resnet"
    compile: bool = False
    optim: Optim = Optim()
    trackers: list[str] = ["tensorboard"]


def events_of(run: Path) -> EventAccumulator:
    """All events of a run directory, as TensorBoard reads them."""
    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars_of(events: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(one.step, round(one.value, 5)) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def begin(run: Path, **settings: Any) -> RunDir:
    config = TrackedConfig(output=run, **settings)
    opened = RunDir(config, "train")
    start_trackers(Accelerator(cpu=True), config, opened)
    return opened


def test_curves_scores_settings_and_images(tmp_path: Path) -> None:
    run = begin(tmp_path / "runs/quick/ssld")
    for step in (1, 2):
        run.metric(step, loss=1 / step, lr=0.1, images_per_second=9.0)
    run.metric(2, val_AP=0.25, val_per_class={"cat": 0.5}, val_masks=None)
    pixels = np.zeros((30, 2000, 3), dtype=np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(run.path / "batches.jpg", quality=95)
    (run.path / "pictures/deep").mkdir(parents=True)
    Image.fromarray(pixels[:, :40]).save(run.path / "pictures/deep/best_1.png")
    run.finish(
        {
            "AP": 0.25,
            "steps": 4,
            "per_class": {"cat": 0.5},
            "APs": None,
            "best": {"AP": 0.3, "file": "best"},
            "intervals": {"AP": [0, 1]},
        }
    )
    events = events_of(run.path)
    assert scalars_of(events) == {
        "training/loss": [(1, 1.0), (2, 0.5)],
        "training/lr": [(1, 0.1), (2, 0.1)],
        "speed/images_per_second": [(1, 9.0), (2, 9.0)],
        "evaluation/AP": [(2, 0.25)],
        "final/AP": [(4, 0.25)],
        "final/steps": [(4, 4.0)],
        "final/best/AP": [(4, 0.3)],
    }
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    steps: 4\n" in text
    assert "      lr: 0.5\n" in text
    sizes = {tag: (events.Images(tag)[0].width, events.Images(tag)[0].height) for tag in events.Tags()["images"]}
    assert sizes == {"batches": (1024, 15), "pictures/deep/best_1": (40, 30)}
    start = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    values = {
        key: one.WhichOneof("kind") and getattr(one, one.WhichOneof("kind"))
        for key, one in start.session_start_info.hparams.items()
    }
    assert values == {
        "steps": 4.0,
        "name": "test_resnet",
        "compile": False,
        "optim.lr": 0.5,
        "optim.milestones": "[3, 4]",
    }
    # One folder, one run: `tensorboard --logdir runs` names it quick/ssld.
    folders = {file.parent for file in (tmp_path / "runs").rglob("events.out.tfevents*")}
    assert folders == {run.path}


def test_a_second_attempt_replaces_the_steps_of_the_first(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    for step in (1, 2, 3):
        run.metric(step, loss=1.0)
    run.close()
    again = begin(tmp_path / "run")  # from the checkpoint of step 1
    for step in (2, 3, 4):
        again.metric(step, loss=2.0)
    again.finish({"AP": 0.5})
    losses = scalars_of(events_of(tmp_path / "run"))["training/loss"]
    assert losses == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


@pytest.mark.parametrize("trackers", [[], ["tensorboard"]])
def test_nothing_is_written_before_the_first_line(trackers: list[str], tmp_path: Path) -> None:
    """A start that ends by a mistake leaves a folder in which another run may begin."""
    run = begin(tmp_path / "run", trackers=trackers)
    assert not list(run.path.glob("events*"))
    run.finish({"AP": 0.5})
    assert len(list(run.path.glob("events*"))) == len(trackers)
