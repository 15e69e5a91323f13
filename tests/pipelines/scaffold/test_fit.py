"""Settings that fit a time: the seconds of the written pipeline, counted by the runner, against the time given, on machines of known speed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssld.pipelines.runner.estimate import EVALUATIONS, Rate, seconds
from ssld.pipelines.runner.stages import build_stages, read_pipeline
from ssld.pipelines.scaffold.fit import ENOUGH, LEAST, MOST_TRIALS, REPORT_SECONDS, Fit, Trained, fit, lengths_of
from ssld.pipelines.scaffold.stage1 import MANY, proposes_stage_1
from ssld.pipelines.scaffold.suggest import Facts, Settings, networks_of, pipeline_text, shapes, wanted_steps
from ssld.shared.errors import UserError
from tests.pipelines.scaffold.test_suggest import facts

PLACE = Path("x")
CELLS = [0.09, 0.15, 0.21, 0.25, 0.34]
DETECTOR = replace(facts(164, CELLS), val_count=41)
BOTH = replace(DETECTOR, unlabeled=PLACE, unlabeled_images=300, pool=PLACE, held_out=PLACE, listing=PLACE)
BACKBONE = replace(
    BOTH, annotations=None, images_folder=None, val_annotations=None, val_images=None, images=0, statistics={}, listing=None, val_count=0
)  # fmt: skip
NETWORKS = networks_of(gpu=False, backbone="timm:student", arch=None, teacher="timm:teacher", teacher_arch=None)


class Machine:
    """A machine whose steps cost what their pixels cost, and a part that does not depend on them, which `fit` does not know."""

    def __init__(self, speed: float, *, fixed: float = 0.2) -> None:
        self.speed, self.fixed, self.tried = speed, fixed, []  # type: ignore[var-annotated]

    def __call__(self, settings: Settings, trained: Trained) -> Rate:
        self.tried.append((trained, settings.short_side, settings.networks.channels))
        if trained == "ssld":
            return Rate(start=12.0, step=3 / self.speed, images=464, val_images=50)
        width = 0.5 + settings.networks.channels / 256
        return Rate(
            start=15.0,
            step=width * (self.fixed + (settings.short_side / 224) ** 2) / self.speed,
            images=164,
            val_images=41,
        )


def counted(facts: Facts, fitting: Fit, minutes: float, folder: Path) -> float:
    """The seconds of the written pipeline, by the runner's own formulas."""
    file = folder / "mine.yaml"
    file.write_text(pipeline_text(file, facts, fitting.settings, minutes, fitting.seconds))
    stages = build_stages(read_pipeline(file), file, output=folder / "runs")
    total = REPORT_SECONDS
    rates: dict[str, Rate] = {}
    for stage in stages:
        if stage.kind.script.endswith("report.py"):
            continue
        if isinstance(stage.config, EVALUATIONS):
            model = Path(stage.config.model).parent.name
            trained = next(one for one in stages if one.name == model)
            rate = Rate(start=evaluation(rates[model], trained.config, facts))
        else:
            rate = fitting.rates["ssld" if stage.name == "ssld" else "detector"]
        rates[stage.name] = rate
        time = seconds(stage, rate)
        assert time is not None
        total += time
    return total


def evaluation(rate: Any, config: Any, facts: Facts) -> float:
    return float(rate.start + 0.5 * facts.val_count * rate.step / config.batch_size)


@pytest.mark.parametrize("facts", [DETECTOR, BOTH, BACKBONE], ids=["detector", "both", "backbone"])
@pytest.mark.parametrize("minutes", [8, 20, 60])
@pytest.mark.parametrize("fixed", [0.0, 1.5])
def test_the_pipeline_takes_the_time_it_was_given(facts: Facts, minutes: float, fixed: float, tmp_path: Path) -> None:
    machine = Machine(2.0, fixed=fixed)
    fitting = fit(facts, shapes(facts, NETWORKS), minutes, machine)
    total = counted(facts, fitting, minutes, tmp_path)
    assert total == pytest.approx(fitting.seconds)
    assert total <= 0.85 * 60 * minutes
    chosen = fitting.settings
    if chosen.steps < wanted_steps(facts) // 10 * 10 and facts.detectors:
        assert total >= 0.8 * 60 * minutes
    trained = [name for name, *_ in machine.tried]
    assert trained.count("detector") <= (MOST_TRIALS if facts.detectors else 0)
    assert trained.count("ssld") == bool(facts.unlabeled)  # student and teacher are the same at each image size
    assert machine.tried[-1][1:] == (chosen.short_side, chosen.networks.channels)


def test_more_time_never_means_less() -> None:
    def chosen(minutes: float) -> tuple[int, int]:
        settings = fit(BOTH, shapes(BOTH, NETWORKS), minutes, Machine(1.0)).settings
        return settings.short_side, settings.steps

    sides = [chosen(minutes)[0] for minutes in (12, 20, 40, 80, 160)]
    assert sides == sorted(sides)
    assert sides[0] < sides[-1] == 320
    for minutes in (20, 40):
        assert chosen(minutes)[1] >= ENOUGH
    assert fit(BOTH, shapes(BOTH, NETWORKS), 10_000, Machine(1.0)).settings.steps == wanted_steps(BOTH) // 10 * 10


@pytest.mark.parametrize("facts", [DETECTOR, BOTH, BACKBONE], ids=["detector", "both", "backbone"])
def test_too_little_time_names_the_fewest_minutes(facts: Facts) -> None:
    def at(minutes: float) -> Fit:
        return fit(facts, shapes(facts, NETWORKS), minutes, Machine(0.5))

    with pytest.raises(
        UserError, match=r"--minutes 1: too short for .* on this machine; by a trial it takes (\d+) minutes at least"
    ) as error:
        at(1)
    fewest = int(str(error.value).split("it takes ")[1].split()[0])
    assert at(fewest).settings.steps >= (LEAST if facts.detectors else 1)
    with pytest.raises(UserError, match=f"it takes {fewest} minutes"):
        at(fewest - 1)


def test_it_says_why_and_what_more_time_would_buy() -> None:
    small = fit(DETECTOR, shapes(DETECTOR, NETWORKS), 8, Machine(1.0))
    assert small.reason.startswith("the next larger, ")
    assert small.reason.endswith(" only")
    assert small.more.startswith("--minutes 24: ")
    assert f" px instead of {small.settings.short_side}" in small.more
    assert "times the detector's steps" in small.more
    large = fit(DETECTOR, shapes(DETECTOR, NETWORKS), 5000, Machine(1.0))
    assert large.reason == "the largest that is proposed for these photos"
    assert "no change" in large.more


def test_what_more_time_buys_is_what_more_time_gives() -> None:
    small, large = (fit(DETECTOR, shapes(DETECTOR, NETWORKS), minutes, Machine(1.0, fixed=0.8)) for minutes in (8, 24))
    assert f"{large.settings.short_side} px instead of {small.settings.short_side}" in small.more


def test_evaluations_do_not_take_the_time_of_the_training() -> None:
    rates: dict[Trained, Rate] = {"detector": Rate(start=10.0, step=1.0)}
    few, many = (lengths_of(replace(DETECTOR, val_count=number), rates, 60) for number in (40, 5000))
    assert few
    assert few.evaluate_every == 0.2
    assert many
    assert many.evaluate_every is None


@pytest.mark.parametrize(
    ("asked", "backbone", "photos", "detector", "expected"),
    [
        ("auto", "timm:resnet18d", 500, True, False),
        ("auto", "timm:resnet18d", MANY, True, True),
        ("auto", "weights.safetensors", MANY - 1, True, False),
        ("auto", "random:resnet18d", 10, True, True),
        ("yes", "timm:resnet18d", 10, True, True),
        ("no", "random:resnet18d", MANY, True, False),
        ("auto", "timm:resnet18d", 10, False, True),
    ],
)
def test_stage_1_is_proposed_where_it_was_measured_to_help(
    asked: Any, backbone: str, photos: int, detector: bool, expected: bool
) -> None:
    proposed, why = proposes_stage_1(asked, backbone, photos, detector=detector)
    assert proposed is expected
    assert "--distill yes" in why or proposed or asked == "no"
