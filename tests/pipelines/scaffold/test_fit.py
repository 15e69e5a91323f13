"""Settings that fit a time: the seconds of the written pipeline, counted by the runner, against the time given, on machines of known speed."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssld.pipelines.runner.estimate import EVALUATIONS, Rate, seconds
from ssld.pipelines.runner.stages import build_stages, read_pipeline
from ssld.pipelines.scaffold.fit import ENOUGH, LEAST, MOST_TRIALS, REPORT_SECONDS, Fit, fit, lengths_of
from ssld.pipelines.scaffold.pipeline_file import pipeline_text
from ssld.pipelines.scaffold.stage1 import MANY, proposes_stage_1
from ssld.pipelines.scaffold.starts import published_init
from ssld.pipelines.scaffold.suggest import Facts, Settings, Trained, networks_of, shapes, wanted_steps
from ssld.shared.errors import UserError
from tests.pipelines.scaffold.test_suggest import facts

PLACE = Path("x")
CELLS = [0.09, 0.15, 0.21, 0.25, 0.34]
DETECTOR = replace(facts(164, CELLS), val_count=41)
BOTH = replace(
    DETECTOR, unlabeled=PLACE, unlabeled_images=300, pool=PLACE, held_out=PLACE, listing=PLACE, starts=("imagenet", "ssld")
)  # fmt: skip
BACKBONE = replace(
    BOTH, annotations=None, images_folder=None, val_annotations=None, val_images=None, images=0, statistics={}, listing=None, val_count=0, starts=()
)  # fmt: skip
COCO = published_init("fasterrcnn_resnet50_fpn_v2", optional=True)
WITH_COCO = replace(DETECTOR, starts=("coco", "imagenet"), init=COCO)
MOVING = replace(DETECTOR, moving=PLACE, moving_images=205)
ALL_MOVING = replace(BOTH, starts=("coco", "imagenet", "ssld"), init=COCO, moving=PLACE, moving_images=205)
ALL = replace(BOTH, starts=("coco", "coco_ssld", "imagenet", "ssld"), init=COCO)
NETWORKS = networks_of(gpu=False, backbone="timm:student", arch=None, teacher="timm:teacher", teacher_arch=None)


class Machine:
    """A machine whose steps cost what their pixels cost, and a part that does not depend on them, which `fit` does not know.

    A trial has three steps after a start of some seconds, and ends at its limit. `now` is the time on its clock.
    """

    def __init__(self, speed: float, *, fixed: float = 0.2) -> None:
        self.speed, self.fixed, self.tried, self.now = speed, fixed, [], 0.0  # type: ignore[var-annotated]

    def __call__(self, settings: Settings, trained: Trained, limit: float) -> Rate | None:
        rate = self.rate(settings, trained)
        self.tried.append((trained, settings.short_side, settings.networks.channels))
        self.now += min(limit, rate.start + 3 * rate.step)
        return rate if rate.start + rate.step <= limit else None

    def rate(self, settings: Settings, trained: Trained) -> Rate:
        if trained == "ssld":
            return Rate(start=12.0, step=3 / self.speed, images=464, val_images=50)
        width = 4.0 if trained == "coco" else 0.5 + settings.networks.channels / 256
        return Rate(
            start=15.0,
            step=width * (self.fixed + (settings.short_side / 224) ** 2) / self.speed,
            images=164,
            val_images=41,
        )

    def fit(self, facts: Facts, minutes: float) -> Fit:
        return fit(facts, shapes(facts, NETWORKS), minutes, self, lambda: self.now)


def most(facts: Facts, minutes: float) -> float:
    """The seconds that all trials may take."""
    return max(0.15 * 60 * minutes, 30.0 * len(facts.trainings))


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
            coco = getattr(stage.config, "init", None)
            rate = fitting.rates["ssld" if stage.name == "ssld" else "coco" if coco else "detector"]
            if stage.name == "detector_moving":
                rate = replace(rate, step=2.2 * rate.step)
        rates[stage.name] = rate
        time = seconds(stage, rate)
        assert time is not None
        total += time
    return total


def evaluation(rate: Any, config: Any, facts: Facts) -> float:
    return float(rate.start + 0.5 * facts.val_count * rate.step / config.batch_size)


@pytest.mark.parametrize(
    "facts",
    [DETECTOR, BOTH, BACKBONE, WITH_COCO, ALL, MOVING, ALL_MOVING],
    ids=["detector", "both", "backbone", "coco", "all", "moving", "all with moving"],
)
@pytest.mark.parametrize("minutes", [8, 20, 60])
@pytest.mark.parametrize("fixed", [0.0, 1.5])
def test_the_pipeline_takes_the_time_it_was_given(facts: Facts, minutes: float, fixed: float, tmp_path: Path) -> None:
    """Counted by the runner's formulas over all stages of the file, those of each start among them."""
    machine = Machine(16.0 if facts.init else 2.0, fixed=fixed)
    fitting = machine.fit(facts, minutes)
    assert fitting.facts == facts
    total = counted(facts, fitting, minutes, tmp_path)
    assert total == pytest.approx(fitting.seconds)
    assert total <= 0.85 * 60 * minutes
    chosen = fitting.settings
    if chosen.steps < wanted_steps(facts) // 10 * 10 and facts.detectors:
        assert total >= 0.8 * 60 * minutes
    trained = [name for name, *_ in machine.tried]
    assert trained.count("detector") <= (MOST_TRIALS if facts.detectors else 0)
    assert trained.count("ssld") == bool(facts.unlabeled)  # student and teacher are the same at each image size
    assert (chosen.short_side, chosen.networks.channels) in [(side, channels) for _, side, channels in machine.tried]
    assert len(set(machine.tried)) == len(machine.tried)  # no shape is tried twice
    assert machine.now == fitting.tried <= most(facts, minutes)


def test_more_time_never_means_less() -> None:
    def chosen(minutes: float) -> tuple[int, int]:
        settings = Machine(1.0).fit(BOTH, minutes).settings
        return settings.short_side, settings.steps

    sides = [chosen(minutes)[0] for minutes in (12, 20, 40, 80, 160)]
    assert sides == sorted(sides)
    assert sides[0] < sides[-1] == 320
    for minutes in (20, 40):
        assert chosen(minutes)[1] >= ENOUGH
    assert Machine(1.0).fit(BOTH, 10_000).settings.steps == wanted_steps(BOTH) // 10 * 10


@pytest.mark.parametrize("facts", [DETECTOR, BOTH, BACKBONE], ids=["detector", "both", "backbone"])
def test_too_little_time_names_the_fewest_minutes(facts: Facts) -> None:
    def at(minutes: float) -> Fit:
        return Machine(0.5).fit(facts, minutes)

    with pytest.raises(
        UserError, match=r"--minutes 1: too short for .* on this machine; by a trial it takes (\d+) minutes at least"
    ) as error:
        at(1)
    fewest = int(str(error.value).split("it takes ")[1].split()[0])
    assert at(fewest).settings.steps >= (LEAST if facts.detectors else 1)
    with pytest.raises(UserError, match=f"it takes {fewest} minutes"):
        at(fewest - 1)


def test_it_says_why_and_what_more_time_would_buy() -> None:
    small = Machine(1.0).fit(DETECTOR, 8)
    assert small.reason.startswith("the next larger, ")
    assert small.reason.endswith((" only", " would need another trial"))
    assert small.more.startswith("--minutes 24: ")
    assert f" px instead of {small.settings.short_side}" in small.more
    assert re.search(rf" steps instead of {small.settings.steps:,}$", small.more)
    large = Machine(1.0).fit(DETECTOR, 5000)
    assert large.reason == "the largest that is proposed for these photos"
    assert "no change" in large.more


def test_what_more_time_buys_is_what_more_time_gives() -> None:
    small, large = (Machine(1.0, fixed=0.8).fit(DETECTOR, minutes) for minutes in (8, 24))
    assert f"{large.settings.short_side} px instead of {small.settings.short_side}" in small.more
    steps = re.search(r"([\d,]+) steps instead of ([\d,]+)", small.more)
    assert steps
    told, before = (int(text.replace(",", "")) for text in steps.groups())
    assert before == small.settings.steps
    assert told == pytest.approx(large.settings.steps, rel=0.15)  # by the rates of another size

    at_one_size = [Machine(1.0, fixed=0.8).fit(replace(BOTH, unlabeled_images=9000), minutes) for minutes in (240, 720)]
    old, new = (fitting.settings for fitting in at_one_size)
    assert at_one_size[0].more == (
        f"--minutes 720: {new.steps:,} steps of each detector instead of {old.steps:,}, "
        f"{new.distill_steps:,} steps of stage 1 instead of {old.distill_steps:,}"
    )


def test_too_little_time_for_a_moving_teacher_says_what_fits_without_it() -> None:
    with pytest.raises(UserError) as error:
        Machine(0.5).fit(MOVING, 2)
    found = re.search(r"it takes (\d+) minutes at least; without --moving_teacher yes (\d+) minutes$", str(error.value))
    assert found
    fewest, without = map(int, found.groups())
    assert without < fewest
    assert Machine(0.5).fit(DETECTOR, without).seconds
    with pytest.raises(UserError, match="too short"):
        Machine(0.5).fit(DETECTOR, without - 1)
    with pytest.raises(
        UserError, match=r"a trial then tells how many; without --moving_teacher yes more than 1 minute"
    ):
        Machine(0.5).fit(MOVING, 0.2)


def test_absent_coco_weights_are_named_where_they_might_fit() -> None:
    absent = replace(COCO, here=False)

    def notes(minutes: float) -> tuple[str, ...]:
        machine = Machine(1.0)
        return fit(DETECTOR, shapes(DETECTOR, NETWORKS), minutes, machine, lambda: machine.now, absent).notes

    least = next(minutes for minutes in range(2, 100) if Machine(1.0).fit(WITH_COCO, minutes).facts.init)
    assert notes(least - 4) == ()
    (line,) = notes(least + 4)
    assert line.startswith("COCO weights, which may be the better start, are not on this machine")


@pytest.mark.parametrize("facts", [DETECTOR, BOTH, WITH_COCO], ids=["detector", "both", "coco"])
@pytest.mark.parametrize("speed", [1.0, 0.1, 0.03, 0.001])
@pytest.mark.parametrize("minutes", [6, 60, 600])
def test_trials_have_a_part_of_the_time(facts: Facts, speed: float, minutes: float) -> None:
    """However slow the machine is; the settings are those of a shape that was tried, or of a cheaper one."""
    machine = Machine(speed)
    try:
        fitting = machine.fit(facts, minutes)
    except UserError as error:
        assert "too short for" in str(error)  # noqa: PT017 - both ends are right
    else:
        assert fitting.tried == machine.now
        assert fitting.settings.short_side <= max(side for _, side, _ in machine.tried)
        assert fitting.seconds is None or fitting.seconds <= 0.85 * 60 * minutes
    assert machine.now <= most(facts, minutes) + 1e-6


def test_a_larger_size_is_not_tried_where_there_is_no_time_left() -> None:
    """The first trial takes nearly all of 540 seconds on this clock; a second one would take more than the rest."""
    machine = Machine(2.0)
    limited = fit(DETECTOR, shapes(DETECTOR, NETWORKS), 60, machine, lambda: 34 * machine.now)
    assert [side for _, side, _ in machine.tried] == [limited.settings.short_side]
    assert limited.reason.endswith(" would need another trial, and all of them get 9 min")
    assert limited.seconds
    assert limited.seconds <= 0.85 * 3600
    free = Machine(2.0)
    assert free.fit(DETECTOR, 60).settings.short_side > limited.settings.short_side
    assert len(free.tried) > 1


def test_a_machine_too_slow_for_a_trial_gets_the_cheapest(tmp_path: Path) -> None:
    """Not one step ends in the time of the trial: the cheapest settings are written, and their time is unknown."""
    machine = Machine(0.001)
    fitting = machine.fit(BOTH, 20)
    cheapest = min(shapes(BOTH, NETWORKS), key=lambda shape: (shape.networks.weight, shape.short_side))
    assert fitting.seconds is None
    assert (fitting.settings.short_side, fitting.settings.networks) == (cheapest.short_side, cheapest.networks)
    assert (fitting.settings.steps, fitting.settings.distill_steps) == (60, 20)
    assert fitting.reason == (
        "the cheapest that is proposed: in 3 min of trial not one step of stage 1 and a detector ended"
    )
    file = tmp_path / "mine.yaml"
    text = pipeline_text(file, fitting.facts, fitting.settings, 20, fitting.seconds)
    assert "their time is not measured" in text
    file.write_text(text)
    build_stages(read_pipeline(file), file, output=tmp_path)


def test_coco_weights_are_left_out_where_they_do_not_fit() -> None:
    """The line names the minutes at which they fit, by the same trial."""
    fitting = Machine(1.0).fit(WITH_COCO, 5)
    assert (fitting.facts.starts, fitting.facts.init) == (("imagenet",), None)
    (line,) = fitting.notes
    found = re.fullmatch(
        r"COCO weights left out: a step of ResNet50 takes ([\d.]+) s here; they fit in (\d+) minutes \(--minutes \2\)",
        line,
    )
    assert found
    smallest = min(shape.short_side for shape in shapes(WITH_COCO, NETWORKS))
    assert float(found[1]) == pytest.approx(4 * (0.2 + (smallest / 224) ** 2), rel=0.05)
    fewest = int(found[2])
    assert Machine(1.0).fit(WITH_COCO, fewest).facts.starts == ("coco", "imagenet")
    assert Machine(1.0).fit(WITH_COCO, fewest - 1).facts.starts == ("imagenet",)
    asked = replace(WITH_COCO, init=replace(COCO, optional=False))
    with pytest.raises(
        UserError, match=f"--minutes 5: too short for 2 detectors .* it takes {fewest} minutes at least"
    ):
        Machine(1.0).fit(asked, 5)


def test_coco_weights_are_left_out_where_not_one_step_ends() -> None:
    class NoCoco(Machine):
        def rate(self, settings: Settings, trained: Trained) -> Rate:
            rate = super().rate(settings, trained)
            return replace(rate, step=1e4) if trained == "coco" else rate

    fitting = NoCoco(2.0).fit(ALL, 60)
    assert fitting.facts.starts == ("imagenet", "ssld")
    assert fitting.notes == ("COCO weights left out: not one step of ResNet50 ended in its part of the trial's 9 min",)
    assert fitting.seconds


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
    if asked == "auto" and detector:  # beside the number of photos that was measured
        assert re.search(f"{photos:,} (unlabeled )?photos", why)


@pytest.mark.parametrize("facts", [DETECTOR, BACKBONE, WITH_COCO, ALL, ALL_MOVING])
def test_what_no_machine_can_do_is_refused_before_a_trial(facts: Facts) -> None:
    """The report takes 10 s, and 15 % of the time are not planned: 12 s are too short for any pipeline."""
    machine = Machine(1e9)
    with pytest.raises(
        UserError, match=r"--minutes 0.2: too short for .* leave no time for a step; give more than 1; a trial"
    ):
        machine.fit(facts, 0.2)
    assert not machine.tried
    assert machine.fit(facts, 8).settings  # it is the time that is refused
