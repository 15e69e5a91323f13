"""Choice of networks, image sizes and lengths of a new pipeline that fit a time, by trials of a few real steps. Does not import torch.

The cheapest shape (networks and image size) is tried first. Its rate says which is the most expensive shape at which `ENOUGH` steps fit; that one is
tried too, and its own rate decides the lengths. Rates are scaled from one shape to another by a rough rule, so a third trial may follow.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count as counted
from typing import Literal

from ssld.pipelines.runner.estimate import FORWARD_SHARE, Rate
from ssld.pipelines.scaffold.suggest import (
    Facts,
    Settings,
    Shape,
    detector_batch,
    distill_batch,
    settings_of,
    wanted_distill_steps,
    wanted_steps,
)
from ssld.shared.errors import UserError
from ssld.shared.wording import count

Trained = Literal["detector", "ssld"]
Trial = Callable[[Settings, Trained], Rate]
"""measures the rate of a training with these settings"""

USED = 0.85
"""share of the time that is planned; the rest is for what a trial cannot see"""
STAGE_1_SHARE = 0.35
"""share of the planned time that stage 1 gets at most where detectors follow"""
ENOUGH, LEAST, LEAST_DISTILL = 300, 60, 20
"""steps from which larger images are preferred to more steps, fewest steps of a detector and of stage 1; on blood cells AP is about 40 after 60 steps
and 47 after 300 (docs/benchmarks/real_small_cpu_2026-11-21.md, detectors_cpu_2026-11-21.md)"""
EVALUATING = 0.15
"""share of a detector's time that its evaluations during training take at most, if they can be made rarer"""
REPORT_SECONDS = 10.0
HEADS = 0.8
"""seconds of a detector's step outside the pixels, relative to those of the pixels of a photo with a short side of 224"""
MOST_TRIALS, MORE = 3, 3
"""most trials; factor of time for which the gain is told"""
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

    settings: Settings
    rates: dict[Trained, Rate]
    seconds: float
    """expected seconds of the whole pipeline"""
    reason: str
    more: str


def fit(facts: Facts, shapes: list[Shape], minutes: float, trial: Trial) -> Fit:
    """Choose the most expensive shape at which enough steps fit, and the lengths.

    Args:
        shapes: shapes to choose from, in any order.
        minutes: time for the whole pipeline.

    Raises:
        UserError: even the cheapest shape does not fit; names the fewest minutes.
    """
    ordered = sorted(shapes, key=_cost, reverse=True)
    shape = ordered[-1]
    known: dict[tuple[str, str], Rate] = {}
    rates = _tried(facts, shape, trial, known)
    for _ in range(MOST_TRIALS - 1):
        best = _best(facts, ordered, shape, rates, minutes)
        if best == shape:
            break
        shape, rates = best, _tried(facts, best, trial, known)
    lengths = lengths_of(facts, rates, minutes)
    if lengths is None:
        fewest = fewest_minutes(facts, _scaled(rates, shape, ordered[-1]))
        what = " and ".join(
            [
                *(["stage 1"] if facts.unlabeled else []),
                *([count(facts.detectors, "detector")] if facts.detectors else []),
            ]
        )
        raise UserError(
            f"--minutes {minutes:g}: too short for {what} on this machine; by a trial it takes {fewest} minutes at least"
        )
    return Fit(
        _settings(facts, shape, lengths),
        rates,
        lengths.seconds,
        _reason(facts, ordered, shape, rates, minutes),
        _more(facts, ordered, shape, rates, minutes, lengths),
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
        distill_steps = min(max(LEAST_DISTILL, _fitting(most - around, rate)), wanted_distill_steps(facts))
        left -= around + distill_steps * rate.step
    if facts.detectors:
        rate, each = rates["detector"], left / facts.detectors
        evaluation = FORWARD_SHARE * facts.val_count * rate.step / detector_batch(facts)[0]
        every, evaluations = next(
            (one for one in _INTERVALS if one[1] * evaluation <= EVALUATING * each), _INTERVALS[-1]
        )
        around = 2 * rate.start + (evaluations + 1) * evaluation  # the last evaluation is a stage of its own
        steps = min(_fitting(each - around, rate), wanted_steps(facts))
        if steps < min(LEAST, wanted_steps(facts)):
            return None
        steps = steps // 10 * 10  # so that the intervals are whole
        left -= facts.detectors * (around + steps * rate.step)
    return Lengths(steps, distill_steps, every, total - left + REPORT_SECONDS) if left >= 0 else None


def fewest_minutes(facts: Facts, rates: dict[Trained, Rate]) -> int:
    """Return the fewest whole minutes that fit the shortest trainings at these rates."""
    return next(minutes for minutes in counted(1) if lengths_of(facts, rates, minutes))


def _fitting(seconds: float, rate: Rate) -> int:
    return max(0, int(seconds / max(rate.step, 1e-6)))


def _tried(facts: Facts, shape: Shape, trial: Trial, known: dict[tuple[str, str], Rate]) -> dict[Trained, Rate]:
    """Try the trainings of a pipeline with this shape; stage 1 once for each pair of student and teacher, whose rates are `known`."""
    settings = _settings(facts, shape, Lengths(LEAST, LEAST_DISTILL, None, 0.0))
    rates: dict[Trained, Rate] = {}
    if facts.unlabeled:
        pair = shape.networks.backbone, shape.networks.teacher
        known[pair] = rates["ssld"] = known.get(pair) or trial(settings, "ssld")
    if facts.detectors:
        rates["detector"] = trial(settings, "detector")
    return rates


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
    factors = {
        "detector": _cost(shape) / _cost(tried),
        "ssld": 1.0 if same else shape.networks.weight / tried.networks.weight,
    }
    return {name: replace(rate, step=rate.step * factors[name]) for name, rate in rates.items()}


def _cost(shape: Shape) -> float:
    """Return the relative seconds of a detector's step. Its heads see the same number of boxes at any image size."""
    return shape.networks.weight * (HEADS + (shape.short_side / 224) ** 2)


def _reason(facts: Facts, ordered: list[Shape], shape: Shape, rates: dict[Trained, Rate], minutes: float) -> str:
    """Say why no larger shape was chosen."""
    place = ordered.index(shape)
    if place == 0:
        return "the largest that is proposed for these photos"
    larger = ordered[place - 1]
    lengths = lengths_of(facts, _scaled(rates, shape, larger), minutes)
    left = f"leaves time for {count(_steps(facts, lengths), 'step')} only" if lengths else "does not fit"
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
    pairs = {"detector's": (lengths.steps, more.steps)} if facts.detectors else {}
    pairs |= {"stage 1's": (lengths.distill_steps, more.distill_steps)} if facts.unlabeled else {}
    parts += [f"{new / old:.2g} times the {whose} steps" for whose, (old, new) in pairs.items() if new != old]
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
