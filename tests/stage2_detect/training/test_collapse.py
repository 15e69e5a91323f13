"""The watch over a moving teacher: what is a collapse, what is none, and that a resumed run knows the lines before."""

import pytest

from ssld.shared.errors import UserError
from ssld.stage2_detect.distill_config import MovingTeacherConfig
from ssld.stage2_detect.training.collapse import CollapseWatch

CONFIG = MovingTeacherConfig.model_validate({"unlabeled": "photos", "burn_in": 10, "collapse": 0.25})


def line(boxes: float, agreement: float = 0.8) -> dict[str, float]:
    return {"loss": 1.0, "pseudo_boxes": boxes, "agreement": agreement}


def test_a_fall_below_the_share_of_the_highest_is_told_once() -> None:
    watch = CollapseWatch(CONFIG, 2)
    assert watch.see(10, {"loss": 2.0}) is None
    assert [watch.see(step, line(boxes)) for step, boxes in ((20, 4.0), (30, 8.0), (40, 2.0))] == [None] * 3
    assert watch.healthy
    warning = watch.see(50, line(1.9))
    assert warning is not None
    assert warning.startswith(
        "warning: step 50: the moving teacher collapses: 1.9 pseudo-boxes per image after up to 8, agreement 0.8 after"
    )
    assert "lower moving_teacher.weight (now 1)" in warning
    assert not watch.healthy
    assert watch.see(60, line(0.0)) is None
    assert watch.see(70, line(6.0)) is None
    assert watch.healthy
    assert watch.see(80, line(0.0)) is not None


def test_agreement_that_falls_is_a_collapse_too() -> None:
    watch = CollapseWatch(CONFIG, 2)
    assert watch.see(20, line(4.0, 0.8)) is None
    assert watch.see(30, line(9.0, 0.1)) is not None


def test_a_resumed_run_knows_the_lines_before() -> None:
    steps = [(20, line(8.0)), (30, line(1.0)), (40, line(1.5)), (50, line(5.0)), (60, line(1.0))]
    whole = CollapseWatch(CONFIG, 2)
    told = [whole.see(*one) for one in steps]
    for cut in range(len(steps)):
        resumed = CollapseWatch(CONFIG, 2, [{"step": step, **values} for step, values in steps[:cut]])
        assert [resumed.see(*one) for one in steps[cut:]] == told[cut:]


def test_zero_switches_the_warning_off() -> None:
    watch = CollapseWatch(CONFIG.model_copy(update={"collapse": 0.0}), 2)
    assert watch.see(20, line(8.0)) is None
    assert watch.see(30, line(0.0, 0.0)) is None
    assert watch.healthy


def test_a_teacher_without_any_box_stops_the_run_after_two_hundred_images() -> None:
    watch = CollapseWatch(CONFIG, 2, threshold=0.7)
    assert watch.see(109, line(0.0, 0.0)) is None
    with pytest.raises(
        UserError,
        match=r"no object with a score of 0.7 or more in the first 200 unlabeled images; .* lower --moving_teacher.score",
    ):
        watch.see(110, line(0.0, 0.0))
    short = CollapseWatch(CONFIG, 2, threshold=0.7).see(12, line(0.0, 0.0), last=True)
    assert short is not None
    assert short.startswith(
        "warning: the teacher has found no object with a score of 0.7 or more in the first 4 unlabeled images; train again"
    )
    found = CollapseWatch(CONFIG, 2)
    assert found.see(30, line(0.1)) is None
    assert found.see(190, line(0.0)) is None  # 4 boxes in 40 images are too few to compare with
    found = CollapseWatch(CONFIG, 2)
    assert found.see(30, line(0.5)) is None
    assert found.see(90, line(0.0)) is not None


def test_few_boxes_show_no_collapse() -> None:
    """Without a burn-in the teacher is the untrained start: its few boxes, and its agreement on none, rise and fall by chance."""
    config = CONFIG.model_copy(update={"burn_in": 0})
    watch = CollapseWatch(config, 2)
    lines = [line(0.0, 0.9), line(0.0, 0.0), line(0.4, 1.0), line(0.0, 0.0), line(0.9, 0.9), line(0.1, 0.0)]
    assert [watch.see(5 * number, one) for number, one in enumerate(lines, 1)] == [None] * 6
    assert watch.healthy
    assert watch.see(50, line(0.1, 0.0)) is not None  # 40 images, in which 36 boxes are expected
    resumed = CollapseWatch(config, 2, [{"step": 5 * number, **one} for number, one in enumerate(lines, 1)])
    assert resumed.see(50, line(0.1, 0.0)) is not None
    assert watch.see(51, line(9.0)) is None
    assert not watch.healthy  # a line of two images, such as the last one, does not undo a collapse
    early = CollapseWatch(CONFIG, 2, [{"step": 10, "loss": 1.0}, {"step": 11, **line(6.0)}])
    assert early.see(14, line(0.1)) is not None  # lines count from the burn-in on


def test_lines_of_few_boxes_are_put_together() -> None:
    """One of two images raises no maximum by itself, and lines that expect few boxes each show a collapse together."""
    watch = CollapseWatch(CONFIG, 2)
    assert watch.see(11, line(0.5, 1.0)) is None
    assert watch.see(21, line(4.0, 0.2)) is None  # together 81 boxes, and an agreement of 0.27
    assert watch.see(31, line(4.0, 0.15)) is None
    assert watch.healthy
    slow = CollapseWatch(CONFIG, 1)
    told = [slow.see(step, line(0.9)) for step in range(20, 60, 10)]
    told += [slow.see(step, line(0.0, 0.0)) for step in range(60, 100, 10)]
    assert [number for number, one in enumerate(told) if one] == [5]
    assert not slow.healthy


def test_a_few_steps_of_many_images_do_not_stop_a_run() -> None:
    """A trial has three steps, and its burn-in is the first of them."""
    watch = CollapseWatch(CONFIG.model_copy(update={"burn_in": 1}), 400, threshold=0.7)
    assert watch.see(2, line(0.0, 0.0)) is None
    warning = watch.see(3, line(0.0, 0.0), last=True)
    assert warning is not None
    assert "in the first 800 unlabeled images" in warning
    assert watch.see(10, line(0.0, 0.0)) is None
    with pytest.raises(UserError, match="in the first 4000 unlabeled images"):
        watch.see(11, line(0.0, 0.0))
