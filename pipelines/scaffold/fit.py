"""Choice of networks, image sizes and lengths of a new pipeline that fit a time, by trials of a few real steps. Does not import torch.

The cheapest shape (networks and image size) is tried first. Its rate says which is the most expensive shape at which `ENOUGH` steps fit; that one is
tried too, and its own rate decides the lengths. Rates are scaled from one shape to another by a rough rule, so a third trial may follow.

All trials together take at most `TRIAL_SHARE` of the time: on a slow machine they have fewer steps, and larger shapes are not tried. A detector that
starts from COCO weights is left out where its shortest training does not fit, unless the user asked for it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count as counted

from ssld.pipelines.runner.estimate import FORWARD_SHARE, Rate
from ssld.pipelines.scaffold.starts import Init, absence
from ssld.pipelines.scaffold.suggest import (
    RESNET50,
    Facts,
    Settings,
    Shape,
    Trained,
    detector_batch,
    distill_batch,
    settings_of,
    wanted_distill_steps,
    wanted_steps,
)
from ssld.shared.errors import UserError
from ssld.shared.wording import count, duration

Trial = Callable[[Settings, Trained, float], Rate | None]
"""measures the rate of a training with these settings within a number of seconds; None if not one step ended in them"""

USED = 0.85
"""share of the time that is planned; the rest is for the trials, and for what they cannot see"""
TRIAL_SHARE, LEAST_TRIAL = 0.15, 30.0
"""share of the time that all trials together take at most; seconds for each training in any case, since it takes some to start"""
STAGE_1_SHARE = 0.35
"""share of the planned time that stage 1 gets at most where detectors follow"""
ENOUGH, LEAST, LEAST_DISTILL = 300, 60, 20
"""steps from which larger images are preferred to more steps, fewest steps of a detector and of stage 1; on blood cells AP is about 40 after 60 steps
and 47 after 300 (docs/benchmarks/real_small_cpu_2026-11-21.md, detectors_cpu_2026-11-21.md)"""
EVALUATING = 0.15
"""share of a detector's time that its evaluations during training take at most, if they can be made rarer"""
REPORT_SECONDS = 10.0
LEAST_START = 1.0
"""seconds that a training or an evaluation takes to start at least: importing torch takes longer"""
HEADS = 0.8
"""seconds of a detector's step outside the pixels, relative to those of the pixels of a photo with a short side of 224"""
MOVING = 2.2
"""seconds of a detector's run under a moving teacher, relative to those of the same run without one: twice the images per step after the burn-in; 389
against 179 seconds of processor time were measured on 41 labeled photos (docs/benchmarks/few_labels_cpu_2026-12-01.md)"""
MOST_TRIALS, MORE = 3, 3
"""most trials; factor on the time in the line on what more time would change"""
_INTERVALS: tuple[tuple[float | None, int], ...] = ((0.2, 5), (0.5, 2), (None, 1))
"""intervals of evaluation, as fractions of the run, and evaluations per run"""


@dataclass(frozen=True)
class Lengths:
    """Steps of the trainings, the interval of evaluations, and the seconds of the whole pipeline."""

    steps: int
    distill_steps: int
    evaluate_every: float | None
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Settings that fit, the rates of the trainings, and lines on the choice and on what more time would change."""

    facts: Facts
    """the given facts, perhaps without the starts that do not fit"""
    settings: Settings
    rates: dict[Trained, Rate]
    seconds: float | None
    """expected seconds of the whole pipeline; None if unknown"""
    tried: float
    """seconds of the trials"""
    reason: str
    """why no larger shape was chosen"""
    more: str
    """what `MORE` times the time would change"""
    notes: tuple[str, ...]
    """lines on what was left out"""


class _Trials:
    """Trials of the shapes of one pipeline, within a part of its time."""

    def __init__(self, facts: Facts, trial: Trial, minutes: float, clock: Callable[[], float]) -> None:
        self.limit = max(LEAST_TRIAL * len(facts.trainings), TRIAL_SHARE * 60 * minutes)
        self._trial, self._clock, self._begun = trial, clock, clock()
        self._stage_1: dict[tuple[str, str], Rate] = {}

    @property
    def seconds(self) -> float:
        """Seconds since the first trial."""
        return self._clock() - self._begun

    def rates(self, facts: Facts, shape: Shape) -> dict[Trained, Rate]:
        """Return the rates of the trainings of a pipeline with this shape, without those of which not one step ended in their part of the time.

        Stage 1 is tried once for each pair of student and teacher.
        """
        settings = _settings(facts, shape, Lengths(LEAST, LEAST_DISTILL, None, 0.0))
        rates, new = self._known(facts, shape), self._new(facts, shape)
        for number, trained in enumerate(new):
            rate = self._trial(settings, trained, max(0.0, self.limit - self.seconds) / (len(new) - number))
            rates |= {trained: rate} if rate else {}
        if "ssld" in rates:
            self._stage_1[shape.networks.backbone, shape.networks.teacher] = rates["ssld"]
        return rates

    def allow(self, facts: Facts, shape: Shape, expected: dict[Trained, Rate]) -> bool:
        """Return whether there is time for two steps of each training, one of which is no measure."""
        needed = sum(expected[trained].start + 2 * expected[trained].step for trained in self._new(facts, shape))
        return self.seconds + needed <= self.limit

    def _known(self, facts: Facts, shape: Shape) -> dict[Trained, Rate]:
        rate = self._stage_1.get((shape.networks.backbone, shape.networks.teacher))
        return {"ssld": rate} if rate and facts.unlabeled else {}

    def _new(self, facts: Facts, shape: Shape) -> list[Trained]:
        known = self._known(facts, shape)
        return [trained for trained in facts.trainings if trained not in known]


def fit(
    facts: Facts,
    shapes: list[Shape],
    minutes: float,
    trial: Trial,
    clock: Callable[[], float] = time.monotonic,
    absent: Init | None = None,
) -> Fit:
    """Choose the most expensive shape at which enough steps fit, and the lengths.

    Args:
        shapes: shapes to choose from, in any order.
        minutes: time for the whole pipeline, the trials included.
        clock: seconds, from any start.
        absent: a detector trained on COCO whose weights are out of reach; a note says where to put them, if its training might fit too.

    Raises:
        UserError: even the cheapest shape does not fit; names the fewest minutes. Before any trial where not even the starts of the commands fit.
    """
    _check_starts(facts, minutes)
    trials = _Trials(facts, trial, minutes, clock)
    ordered = sorted(shapes, key=_cost, reverse=True)
    shape = ordered[-1]
    rates = trials.rates(facts, shape)
    facts, notes = _without_what_does_not_fit(facts, rates, minutes, trials)
    if missing := [trained for trained in facts.trainings if trained not in rates]:
        return _unmeasured(facts, shape, missing, rates, trials, notes)
    known, untried = {shape: rates}, ""
    for _ in range(MOST_TRIALS - 1):
        best = _best(facts, ordered, shape, rates, minutes)
        if best == shape:
            break
        scaled = _scaled(rates, shape, best)
        new = known.get(best) or (trials.rates(facts, best) if trials.allow(facts, best, scaled) else {})
        if any(trained not in new for trained in facts.trainings):
            untried = f"{' and '.join(_differences(shape, best))} would need another trial, and all of them get {duration(trials.limit)}"
            if ordered.index(best) > ordered.index(shape):
                shape, rates, untried = best, scaled, f"its time is scaled from a trial of {shape.short_side} px"
            break
        shape, rates = best, new
        known[best] = new
    lengths = lengths_of(facts, rates, minutes)
    if lengths is None:
        cheapest = _scaled(rates, shape, ordered[-1])
        fewest = fewest_minutes(facts, cheapest)
        raise UserError(
            f"--minutes {minutes:g}: too short for {_what(facts)} on this machine; by a trial it takes {fewest} minutes at least"
            f"{_without_moving(facts, cheapest)}"
        )
    if absent and _might_fit(facts, absent, ordered[-1], _scaled(rates, shape, ordered[-1]), minutes):
        notes.append(absence(absent))
    return Fit(
        facts,
        _settings(facts, shape, lengths),
        rates,
        lengths.seconds,
        trials.seconds,
        untried or _reason(facts, ordered, shape, rates, minutes),
        _more(facts, ordered, shape, rates, minutes, lengths),
        tuple(notes),
    )


def _check_starts(facts: Facts, minutes: float) -> None:
    """Raise UserError if the report and the starts of the commands take longer than the planned time, whatever a step takes."""
    if facts.init and facts.init.optional:
        kept = tuple(start for start, kind in zip(facts.starts, facts.detector_kinds, strict=True) if kind != "coco")
        facts = replace(facts, starts=kept, init=None) if kept else facts
    rates = {trained: Rate(start=LEAST_START) for trained in facts.trainings}
    if lengths_of(facts, rates, minutes) is None:
        raise UserError(
            f"--minutes {minutes:g}: too short for {_what(facts)}: the starts of the commands and the report leave no time for a step; "
            f"give more than {fewest_minutes(facts, rates)}; a trial then tells how many{_without_moving(facts, rates, 'more than ')}"
        )


def _without_moving(facts: Facts, rates: dict[Trained, Rate], more: str = "") -> str:
    """Return the end of a line on a time that is too short: the fewest minutes without the moving teacher, if there is one."""
    if facts.moving is None:
        return ""
    fewest = fewest_minutes(replace(facts, moving=None, moving_images=0), rates)
    return f"; without --moving_teacher yes {more}{count(fewest, 'minute')}"


def _might_fit(facts: Facts, init: Init, cheapest: Shape, rates: dict[Trained, Rate], minutes: float) -> bool:
    """Whether a detector from `init` might fit beside the others, by the rate of theirs at the cheapest shape and the rough weights of networks."""
    if "detector" not in rates:
        return False
    rate = rates["detector"]
    coco = replace(rate, step=rate.step * max(1.0, RESNET50 / cheapest.networks.weight))
    both = replace(facts, starts=("coco", *facts.starts), init=init)
    return lengths_of(both, rates | {"coco": coco}, minutes) is not None


def _what(facts: Facts) -> str:
    """Name the trainings."""
    detectors = [count(facts.detectors, "detector")] if facts.detectors else []
    return " and ".join([*(["stage 1"] if facts.unlabeled else []), *detectors])


def _without_what_does_not_fit(
    facts: Facts, rates: dict[Trained, Rate], minutes: float, trials: _Trials
) -> tuple[Facts, list[str]]:
    """Return the facts without detectors from COCO weights if these are optional and their shortest training does not fit, and a line about it."""
    if facts.init is None or not facts.init.optional or "coco" not in facts.trainings:
        return facts, []
    kept = tuple(start for start, kind in zip(facts.starts, facts.detector_kinds, strict=True) if kind != "coco")
    without = replace(facts, starts=kept, init=None)
    name = {"resnet50": "ResNet50"}.get(facts.init.arch, facts.init.arch)
    if "coco" not in rates:
        limit = duration(trials.limit)
        return without, [f"COCO weights left out: not one step of {name} ended in its part of the trial's {limit}"]
    if any(trained not in rates for trained in facts.trainings) or lengths_of(facts, rates, minutes):
        return facts, []
    step, fewest = rates["coco"].step, fewest_minutes(facts, rates)
    return without, [
        f"COCO weights left out: a step of {name} takes {step:.2g} s here; they fit in {fewest} minutes (--minutes {fewest})"
    ]


def _unmeasured(
    facts: Facts, shape: Shape, missing: list[Trained], rates: dict[Trained, Rate], trials: _Trials, notes: list[str]
) -> Fit:
    """Return the cheapest settings, whose time is unknown: not one step of a training ended in the time of the trials."""
    steps = min(LEAST, wanted_steps(facts)) // 10 * 10 if facts.detectors else 1
    distill_steps = min(LEAST_DISTILL, wanted_distill_steps(facts)) if facts.unlabeled else 1
    what = " and ".join(dict.fromkeys("stage 1" if trained == "ssld" else "a detector" for trained in missing))
    seconds = trials.seconds
    return Fit(
        facts,
        _settings(facts, shape, Lengths(steps, distill_steps, None, 0.0)),
        rates,
        None,
        seconds,
        f"the cheapest that is proposed: in {duration(seconds)} of trial not one step of {what} ended",
        f"a machine on which nothing else runs; a longer --minutes, of which a trial gets {TRIAL_SHARE:.0%}; or smaller networks, by --backbone",
        tuple(notes),
    )


def lengths_of(facts: Facts, rates: dict[Trained, Rate], minutes: float) -> Lengths | None:
    """Return the longest trainings that fit at these rates, at most the wanted ones; None if the shortest do not fit."""
    left = total = 60 * USED * minutes - REPORT_SECONDS
    distill_steps = steps = 1
    every: float | None = None
    if facts.unlabeled:
        rate = rates["ssld"]
        around = rate.start + FORWARD_SHARE * rate.val_images * rate.step / distill_batch(facts)[0]
        most = (STAGE_1_SHARE if facts.detectors else 1.0) * total
        distill_steps = min(max(LEAST_DISTILL, _fitting(most - around, rate.step)), wanted_distill_steps(facts))
        left -= around + distill_steps * rate.step
    if facts.detectors:
        batch = detector_batch(facts)[0]
        kinds, batches = [rates[kind] for kind in facts.detector_kinds], [batch] * len(facts.detector_kinds)
        if facts.moving_kind:
            kinds, batches = [*kinds, under_moving_teacher(rates[facts.moving_kind])], [*batches, 2 * batch]
        step = sum(rate.step for rate in kinds)  # all detectors have the same number of steps
        forward = sum(rate.step / images for rate, images in zip(kinds, batches, strict=True))
        evaluation = FORWARD_SHARE * facts.val_count * forward
        every, evaluations = next(
            (one for one in _INTERVALS if one[1] * evaluation <= EVALUATING * left), _INTERVALS[-1]
        )
        around = sum(2 * rate.start for rate in kinds) + (evaluations + 1) * evaluation  # the last one is a stage
        steps = min(_fitting(left - around, step), wanted_steps(facts))
        if steps < min(LEAST, wanted_steps(facts)):
            return None
        steps = steps // 10 * 10  # so that the intervals are whole
        left -= around + steps * step
    return Lengths(steps, distill_steps, every, total - left + REPORT_SECONDS) if left >= 0 else None


def under_moving_teacher(rate: Rate) -> Rate:
    """Return the rate of a detector under a moving teacher from that of the same one without it; its checkpoints have the average too."""
    return replace(rate, step=rate.step * MOVING, checkpoint=rate.checkpoint + rate.model)


def fewest_minutes(facts: Facts, rates: dict[Trained, Rate]) -> int:
    """Return the fewest whole minutes that fit the shortest trainings at these rates."""
    return next(minutes for minutes in counted(1) if lengths_of(facts, rates, minutes))


def _fitting(seconds: float, step: float) -> int:
    return max(0, int(seconds / max(step, 1e-6)))


def _settings(facts: Facts, shape: Shape, lengths: Lengths) -> Settings:
    return settings_of(
        facts, shape, steps=lengths.steps, distill_steps=lengths.distill_steps, evaluate_every=lengths.evaluate_every
    )


def _best(facts: Facts, ordered: list[Shape], tried: Shape, rates: dict[Trained, Rate], minutes: float) -> Shape:
    """Return the most expensive shape at which enough steps fit, by the rates of another shape; the cheapest one if there is none."""
    for shape in ordered:
        lengths = lengths_of(facts, _scaled(rates, tried, shape), minutes)
        if lengths and _steps(facts, lengths) >= min(ENOUGH, _wanted(facts)):
            return shape
    return ordered[-1]


def _steps(facts: Facts, lengths: Lengths) -> int:
    return lengths.steps if facts.detectors else lengths.distill_steps


def _wanted(facts: Facts) -> int:
    return wanted_steps(facts) if facts.detectors else wanted_distill_steps(facts)


def _scaled(rates: dict[Trained, Rate], tried: Shape, shape: Shape) -> dict[Trained, Rate]:
    same = shape.networks.backbone == tried.networks.backbone
    factors: dict[Trained, float] = {
        "detector": _cost(shape) / _cost(tried),
        "coco": _pixels(shape) / _pixels(tried),
        "ssld": 1.0 if same else shape.networks.weight / tried.networks.weight,
    }
    return {name: replace(rate, step=rate.step * factors[name]) for name, rate in rates.items()}


def _cost(shape: Shape) -> float:
    """Return the relative seconds of a detector's step."""
    return shape.networks.weight * _pixels(shape)


def _pixels(shape: Shape) -> float:
    """Return the relative seconds of one network's step by image size: a part for the heads, whose number of boxes is the same at any size, and one
    for the pixels."""
    return HEADS + (shape.short_side / 224) ** 2


def _reason(facts: Facts, ordered: list[Shape], shape: Shape, rates: dict[Trained, Rate], minutes: float) -> str:
    """Say why no larger shape was chosen."""
    place = ordered.index(shape)
    if place == 0:
        return "the largest that is proposed for these photos"
    larger = ordered[place - 1]
    lengths = lengths_of(facts, _scaled(rates, shape, larger), minutes)
    steps = _steps(facts, lengths) if lengths else 0
    left = f"leaves time for {count(steps, 'step')} only" if lengths else "does not fit"
    if steps >= min(ENOUGH, _wanted(facts)):
        left = "would need another trial"
    return f"the next larger, {' and '.join(_differences(shape, larger))}, {left}"


def _more(
    facts: Facts, ordered: list[Shape], shape: Shape, rates: dict[Trained, Rate], minutes: float, lengths: Lengths
) -> str:
    """Say what more time would change."""
    longer = MORE * minutes
    best = _best(facts, ordered, shape, rates, longer)
    best = min(best, shape, key=ordered.index)
    more = lengths_of(facts, _scaled(rates, shape, best), longer)
    if more is None:
        return f"--minutes {longer:g} would change nothing"
    parts = _differences(shape, best)
    each = " of each detector" if facts.detectors > 1 else " of the detector" if facts.unlabeled else ""
    pairs = {each: (lengths.steps, more.steps)} if facts.detectors else {}
    pairs |= {" of stage 1": (lengths.distill_steps, more.distill_steps)} if facts.unlabeled else {}
    about = "about " * (best != shape)  # by the rate of this shape
    parts += [f"{about}{new:,} steps{whose} instead of {old:,}" for whose, (old, new) in pairs.items() if new != old]
    return f"--minutes {longer:g}: {', '.join(parts) or 'no change; these are the most steps that are proposed for so many photos'}"


def _differences(shape: Shape, other: Shape) -> list[str]:
    """Name what another shape has instead."""
    parts = []
    if other.short_side != shape.short_side:
        parts.append(f"{other.short_side} px instead of {shape.short_side}")
    if other.networks.backbone != shape.networks.backbone:
        parts.append(f"{other.networks.backbone} instead of {shape.networks.backbone}")
    if other.networks.channels != shape.networks.channels:
        parts.append(f"{other.networks.channels} channels instead of {shape.networks.channels}")
    return parts
