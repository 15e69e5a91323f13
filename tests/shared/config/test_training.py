"""Lengths in steps or as fractions of the run, and the default interval of log lines."""

from typing import Any

import pytest

from ssld.shared.config.help import choices_of, flags_of
from ssld.shared.config.settings import dump, parse_config, settings_parser
from ssld.shared.config.validation import validate
from ssld.shared.errors import UserError
from ssld.stage2_detect.config import TrainConfig

SETTINGS: dict[str, Any] = {
    "output": "x",
    "backbone": "random:test_resnet",
    "data": {"train_annotations": "a.json", "train_images": "a"},
    "steps": 90,
    "batch_size": 2,
    "optim": {"lr": 0.1, "reference_batch": 8, "warmup_steps": 0.05, "milestones_steps": [0.5, 0.9]},
}


def config(**values: Any) -> TrainConfig:
    return validate(TrainConfig, SETTINGS | values, source="c")


def test_fractions_become_steps_of_the_run() -> None:
    run = config(evaluate_every=0.25, save_every=0.1, log_every=0.001).in_steps(90)
    assert (run.evaluate_every, run.save_every, run.log_every) == (22, 9, 1)  # 22.5 rounds to even; at least a step
    assert run.optim.milestones(30, 90) == [45, 81]
    assert run.optim.total_warmup_steps(90) == 4
    assert config(evaluate_every=7, save_every=1000).in_steps(90).save_every == 1000
    assert config().in_steps(90).evaluate_every is None
    assert config(optim=SETTINGS["optim"] | {"warmup_steps": 0.5}).optim.total_warmup_steps(90) == 9  # a tenth at most
    assert config(optim=SETTINGS["optim"] | {"warmup_steps": 0}).optim.total_warmup_steps(90) == 0


@pytest.mark.parametrize("steps", [1, 19, 20, 59, 400, 999, 1000, 450_000])
def test_a_curve_has_twenty_points(steps: int) -> None:
    every = config().in_steps(steps).log_every
    assert every is not None
    assert steps // every >= min(20, steps)
    assert every == (50 if steps >= 1000 else max(1, steps // 20))
    assert config(log_every=30).in_steps(steps).log_every == 30


def test_a_command_line_has_both_kinds() -> None:
    words = ["--output", "x", "--backbone", "random:x", "--data.train_annotations", "a", "--data.train_images", "b"]
    words += ["--steps", "9", "--batch_size", "2", "--optim.lr", "1", "--optim.reference_batch", "2"]
    more = ["--optim.milestones_steps", "0.7,0.9", "--evaluate_every", "0.5", "--save_every", "3"]
    parsed = parse_config(TrainConfig, [*words, *more], program="train.py")
    assert dump(parsed)["optim"]["milestones_steps"] == [0.7, 0.9]
    assert (parsed.evaluate_every, parsed.save_every, type(parsed.save_every)) == (0.5, 3, int)
    by_key = dict(flags_of(settings_parser(TrainConfig, "train.py")))
    assert choices_of(by_key["save_every"]) == choices_of(by_key["optim.milestones_steps"]) == []


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, "x", None, [3], float("nan"), 2_000_000_000, "1.0"])
def test_what_is_neither_steps_nor_a_fraction(value: Any) -> None:
    with pytest.raises(UserError) as error:
        config(save_every=value)
    line = "c: save_every: has to be a whole number of steps, 1 to 1,000,000,000, or a fraction of the run above 0 and below 1"
    assert str(error.value) == f"{line}, such as 0.7 (given: {value})"


def test_steps_and_fractions_have_no_common_order() -> None:
    optim = SETTINGS["optim"] | {"milestones_steps": [0.7, 90]}
    with pytest.raises(UserError, match="milestones_steps: give all as steps or all as fractions"):
        config(optim=optim)
