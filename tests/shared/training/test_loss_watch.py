"""Averages of the losses, and the stop at the first one that is not finite."""

import math

import pytest
import torch

from ssld.shared.training.loss_watch import LossWatch, NotFinite


def part(value: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(value), "hits": torch.tensor(2)}


def test_means_over_steps_of_sums_over_micro_batches() -> None:
    watch = LossWatch()
    for step in (0, 1):
        for value in (1.0, 2.0):
            watch.add(step, part(value + step), ["a"])
    watch.check()
    watch.add(2, part(6.0), ["a"])
    assert watch.averages() == {"loss": (3 + 5 + 6) / 3, "hits": (4 + 4 + 2) / 3}
    watch.add(3, part(1.0), ["a"])
    assert watch.averages()["loss"] == 1


def test_state_goes_on() -> None:
    one, two = LossWatch(), LossWatch()
    for watch in (one, two):
        watch.add(0, part(1.0), ["a"])
        watch.check()
    three = LossWatch()
    three.load_state(two.state())
    for watch in (one, three):
        watch.add(1, part(4.0), ["a"])
    assert three.averages() == one.averages() == {"loss": 2.5, "hits": 2}


def test_state_of_an_earlier_version_goes_on() -> None:
    watch = LossWatch()
    watch.load_state({"sums": {"loss": 3.0, "hits": 6}, "steps": 3})
    watch.add(3, part(5.0), ["a"])
    assert watch.averages() == {"loss": 2.0, "hits": 2}


def test_a_part_is_averaged_over_the_steps_that_have_it() -> None:
    watch = LossWatch()
    watch.add(0, part(1.0), ["a"])
    for value in (2.0, 4.0):
        watch.add(1, part(value) | {"more": torch.tensor(value)}, ["a"])
    watch.add(2, part(8.0) | {"more": torch.tensor(10.0)}, ["a"])
    assert watch.latest("more") == 10
    assert watch.averages() == {"loss": (1 + 6 + 8) / 3, "hits": 8 / 3, "more": 8.0}
    watch.add(3, part(1.0), ["a"])
    assert watch.averages() == {"loss": 1, "hits": 2}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float) -> None:
    watch = LossWatch()
    watch.add(0, part(1.0), ["0:a.jpg"])
    watch.add(1, part(value), ["0:b.jpg", "0:c.jpg"])
    watch.add(2, part(math.nan), ["0:d.jpg"])
    with pytest.raises(
        NotFinite, match=r"not finite at step 2: loss (nan|inf|-inf), hits 2; images 0:b.jpg, 0:c.jpg$"
    ) as e:
        watch.check()
    assert e.value.step == 2
    assert "\n" not in str(e.value)
    assert "0:a.jpg" not in str(e.value)


def test_infinities_that_cancel_are_noticed() -> None:
    watch = LossWatch()
    watch.add(0, part(math.inf), ["a"])
    watch.add(1, part(-math.inf), ["b"])
    with pytest.raises(NotFinite, match="at step 1"):
        watch.check()


def test_values_stay_where_they_are_until_asked() -> None:
    """No step waits for the device: a tensor that is changed later has been copied, and keeps no graph."""
    watch, loss = LossWatch(), torch.ones((), requires_grad=True)
    watch.add(0, {"loss": loss * 3}, [])
    assert not watch._pending[0][2].requires_grad
    assert watch.averages() == {"loss": 3}
