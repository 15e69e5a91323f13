"""Files of a detector's export that other tests do not cover: leftovers of a kill, and the data on the card."""

from pathlib import Path
from typing import Any

import pytest

from ssld.shared.config.settings import dump
from ssld.shared.errors import UserError
from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.deploy.card import detector_card
from ssld.stage2_detect.export import main


def test_what_a_killed_export_leaves_goes(
    user_error: Any, detector_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_below: Any
) -> None:
    begun: list[Path] = []

    def killed(_: str, path: Path, *__: Any) -> None:
        begun.append(path)
        raise UserError("stopped")

    monkeypatch.setattr("ssld.stage2_detect.deploy.checked_files.write", killed)
    argv = ["--model", str(detector_file), "--output", str(tmp_path / "run"), "--threads", "1", "--check_images", "1"]
    user_error(main, argv)
    clean = files_below(tmp_path / "run")
    begun[0].write_bytes(b"a part")  # a kill leaves no time to delete it
    assert files_below(tmp_path / "run") != clean
    user_error(main, argv)
    assert files_below(tmp_path / "run") == clean


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"unlabeled": "/home/me/street", "distill": {"teacher": "t.safetensors"}},
        {"unlabeled": "/home/me/street", "pseudo": "/home/me/predicted/pseudo_labels.json"},
    ],
)
def test_the_card_names_all_pictures(more: dict[str, Any], detector_file: Path) -> None:
    settings = {
        "output": "runs/x",
        "backbone": "random:test_resnet",
        "data": {"train_annotations": "/home/me/town/train.json", "train_images": "/home/me/town"},
        "steps": 2,
        "batch_size": 2,
        "optim": {"lr": 0.1, "reference_batch": 2},
    }
    recipe = dump(TrainConfig.model_validate(settings | more))
    card = detector_card(read_metadata(detector_file), recipe, push_to_hub=None, parameters=1, checks={})
    data = card.split("## Data\n")[1].split("## ")[0].strip().splitlines()
    unlabeled = ["- and images without annotations: me/street"] if "unlabeled" in more else []
    pseudo = ["- and pseudo-labels of another detector: predicted/pseudo_labels.json"] if "pseudo" in more else []
    assert data == ["- training: town/train.json", *unlabeled, *pseudo, "- evaluation: none"]


def test_the_card_says_that_weights_are_an_average() -> None:
    settings = {
        "output": "runs/x",
        "backbone": "random:test_resnet",
        "data": {"train_annotations": "/home/me/town/train.json", "train_images": "/home/me/town"},
        "steps": 2,
        "batch_size": 2,
        "optim": {"lr": 0.1, "reference_batch": 2},
        "moving_teacher": {"unlabeled": "/home/me/street"},
    }
    recipe = dump(TrainConfig.model_validate(settings))
    metadata = {
        "arch": "resnet18",
        "class_names": ["cat"],
        "mean": [0.5],
        "std": [0.5],
        **{key: recipe[key] for key in ("model", "resize")},
    }
    averages = {"last": "", "ema": "| weights | moving average of the weights over the training steps, "}
    for weights, expected in averages.items():
        card = detector_card(metadata | {"weights": weights}, recipe, push_to_hub=None, parameters=1, checks={})
        assert [row[: len(expected)] for row in card.splitlines() if row.startswith("| weights")] == [expected] * bool(
            expected
        )
    taught = {"weights": "ema", "moving_teacher": recipe["moving_teacher"]}
    card = detector_card(metadata | taught, recipe, push_to_hub=None, parameters=1, checks={})
    assert (
        "| weights | the moving teacher: the moving average of the weights over the training steps, not those of the"
        in card
    )
    assert "- and images without annotations, under a moving teacher: me/street" in card
