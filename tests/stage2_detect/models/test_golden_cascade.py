"""Cascade R-CNN against PaddleDetection, end to end; golden.py says how."""

from types import SimpleNamespace

import golden
import pytest


@pytest.fixture(scope="module")
def run() -> SimpleNamespace:
    return golden.run(golden.build("cascade"), "cascade")


def test_features_and_rpn_maps(run: SimpleNamespace) -> None:
    golden.check_features(run)
    golden.check_rpn_maps(run)


@pytest.mark.parametrize("mode", ["test", "train"])
def test_proposals_are_the_same_sets(run: SimpleNamespace, mode: str) -> None:
    golden.check_proposals(run, mode)


def test_losses(run: SimpleNamespace) -> None:
    golden.check_losses(run, golden.STAGE_LOSSES)


def test_gradient_norms(run: SimpleNamespace) -> None:
    golden.check_gradient_norms(run, 54)


def test_what_is_frozen_gets_no_gradient(run: SimpleNamespace) -> None:
    golden.check_frozen(run)


def test_detections_are_the_same_sets(run: SimpleNamespace) -> None:
    golden.check_detections(run)
