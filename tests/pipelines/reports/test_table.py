"""The table of a pipeline: missing numbers, percent, signed differences, a damaged result."""

import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ssld.pipelines.config import MOST_SEEDS, TableConfig
from ssld.pipelines.reports.table import _STUDENT, further, gain, table_rows, table_text
from ssld.shared.errors import UserError


def test_table_says_what_is_missing(tmp_path: Path, table: dict[str, Any]) -> None:
    assert table_text(TableConfig(**table), tmp_path).splitlines() == [
        "model              top-1    agreement    detector AP    AP50",
        "teacher                -            -              -       -",
        "SSLD                   -            -              -       -",
        "baseline               -            -              -       -",
        "------------------------------------------------------------",
        "SSLD - baseline        -            -              -       -",
    ]


def test_names_of_any_letters_keep_the_columns(tmp_path: Path, table: dict[str, Any]) -> None:
    """On a terminal, where Chinese letters are two columns wide, an accent of its own none, and control characters are escaped."""
    names = {"teacher": "细胞 检测", "SSLD": "cafe\u0301", "baseline": "a\tb\x1b[1m"}
    table = {
        "rows": {names[name]: row for name, row in table["rows"].items()},
        "gain": [names[n] for n in table["gain"]],
    }
    plain = {"teacher": "x" * 9, "SSLD": "cafe", "baseline": "a?tb?x1b[1m"}  # as wide
    expected = {"rows": dict(zip(plain.values(), table["rows"].values(), strict=True)), "gain": ["cafe", "a?tb?x1b[1m"]}
    got, wanted = (table_text(TableConfig(**one), tmp_path).splitlines() for one in (table, expected))
    assert [line[-20:] for line in got] == [line[-20:] for line in wanted]
    assert [line.rstrip(" -") for line in got[1:4]] == ["细胞 检测", "cafe\u0301", "a\\tb\\x1b[1m"]
    for line, other in zip(got, wanted, strict=True):
        assert len(line) == len(other) - 4 * line.count("细胞") + line.count("\u0301")


def test_table_shows_percent_and_signed_differences(
    tmp_path: Path, table: dict[str, Any], fake_stage: ModuleType
) -> None:
    measured = {
        "student": {"top1": 0.5, "agreement": 1.0},
        "baseline": {"top1": 0.6237},
        "ap": {"AP": 0.0, "AP50": 0.9},
    }
    for name, metrics in measured.items():
        flags = [f"--metrics.{key}={value}" for key, value in metrics.items()]
        assert fake_stage.main([*flags, "--output", str(tmp_path / name)]) == 0
    cells = [line.split() for line in table_text(TableConfig(**table), tmp_path).splitlines()]
    assert cells[2] == ["SSLD", "50.0", "100.0", "0.0", "90.0"]
    assert cells[3] == ["baseline", "62.4", "-", "-", "-"]
    assert cells[5] == ["SSLD", "-", "baseline", "-12.4", "-", "-", "-"]


def test_damaged_result_is_a_user_error(tmp_path: Path, table: dict[str, Any]) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json: not readable"):
        table_text(TableConfig(**table), tmp_path)


def write_result(run: Path, metrics: dict[str, Any], digest: str = "") -> None:
    run.mkdir(parents=True)
    outputs = {"detections.json": digest} if digest else {}
    (run / "result.json").write_text(json.dumps({"metrics": metrics, "outputs": outputs}))


def student_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t, by integration of its density."""
    x = np.linspace(0, t, 100_001)
    factor = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    return 0.5 + float(np.trapezoid(factor * (1 + x**2 / degrees) ** (-(degrees + 1) / 2), x))


def test_quantiles_of_students_t() -> None:
    assert len(_STUDENT) == MOST_SEEDS - 1
    for degrees, quantile in enumerate(_STUDENT, 1):
        assert student_cdf(quantile, degrees) == pytest.approx(0.975, abs=1e-4)


def test_means_and_intervals_over_seeds(tmp_path: Path) -> None:
    tops = {"a": (0.5, 0.6, 0.7), "b": (0.4, 0.55, 0.63)}
    for name, values in tops.items():
        for number, value in enumerate(values):
            write_result(tmp_path / f"{name}{number}", {"top1": value, "images": 10})
    rows = {name: {"classifier": [f"{name}0", f"{name}1", f"{name}2"]} for name in tops}
    table = TableConfig.model_validate({"rows": rows, "gain": ["a", "b"]})
    assert [row.values[0] for row in table_rows(table, tmp_path)] == pytest.approx([0.6, np.mean(tops["b"])])
    difference = gain(table, tmp_path)
    assert difference is not None
    paired = np.subtract(tops["a"], tops["b"])
    half = 4.303 * paired.std(ddof=1) / math.sqrt(3)
    interval = difference.intervals[0]
    assert interval is not None
    assert difference.values[0] == pytest.approx(paired.mean())
    assert (interval.low, interval.high) == pytest.approx((paired.mean() - half, paired.mean() + half))
    assert interval.basis == "Student's t over 3 seeds; does not cover the choice of evaluation images"
    assert interval.images == 10
    text = table_text(table, tmp_path)
    assert "top-1: evaluated on 10 images: too few to tell" in text
    assert "not the training" not in text  # the seeds cover it
    assert "the intervals are over the seeds; they do not cover the choice of evaluation images" in text
    shutil.rmtree(tmp_path / "b1")  # not run yet: the other pairs count
    fewer = gain(table, tmp_path)
    assert fewer is not None
    assert fewer.values[0] == pytest.approx(paired[[0, 2]].mean())


def test_differences_beside_the_gain_have_their_interval_and_their_control(tmp_path: Path) -> None:
    """Three rows: the gain is b over a; c was compared with a as well, d with a run that no row has, e with other detections of a."""
    write_result(tmp_path / "a", {"AP": 0.3}, digest="of a")
    for name, file, digest in (("b", "a", "of a"), ("c", "a", "of a"), ("d", "x", "of x"), ("e", "a", "older a")):
        measured = {"difference": 0.1, "low": 0.04, "high": 0.2}
        compared = {"file": f"runs/{file}/detections.json", "sha256": digest, "images": 64, "AP": measured}
        write_result(
            tmp_path / name,
            {"AP": 0.4, "compared": compared, "at_threshold": {"right": 500, "missed": 9}},
            digest=f"of {name}",
        )
    rows = {f"row {name}": {"detector": name} for name in "abcde"}
    table = TableConfig.model_validate({"rows": rows, "gain": ["row b", "row a"]})
    (pair, row), *others = further(table, tmp_path).items()
    assert others == []
    assert pair == ("row c", "row a")
    interval = row.intervals[2]
    assert interval is not None
    assert (row.name, row.values[2]) == ("row c - row a", pytest.approx(0.1))
    assert (interval.low, interval.high, interval.verdict) == (0.04, 0.2, "better")
    lines = table_text(table, tmp_path).splitlines()
    assert [line.split()[:5] for line in lines if " - " in line] == [["row", x, "-", "row", "a"] for x in "bc"]
    assert sum(line.startswith("95 % interval") for line in lines) == 2
    assert lines[-1] == "AP is measured on 64 images with 509 objects"


@pytest.mark.parametrize(("images", "objects"), [(29, 99), (30, 100), (None, 99)])
def test_few_images_and_objects_are_said_with_several_seeds(images: int | None, objects: int, tmp_path: Path) -> None:
    for name, values in {"a": (0.5, 0.51, 0.52), "b": (0.3, 0.31, 0.325)}.items():
        for number, value in enumerate(values):
            run = tmp_path / f"{name}{number}"
            write_result(run, {"AP": value, "at_threshold": {"right": objects - 9, "missed": 9}})
            if images is not None:  # without a comparison, the number of images is that of the label audit
                record = {"images": images, "labels": 1, "score_threshold": 0.5, "findings": [], "drawn": 0}
                counts = dict.fromkeys(("no_label", "other_class", "other_box", "not_found"), 0)
                (run / "label_audit.json").write_text(
                    json.dumps({**record, "counts": counts, "tide": None, "calibration": None})
                )
    rows = {name: {"detector": [f"{name}{n}" for n in range(3)]} for name in "ab"}
    table = TableConfig.model_validate({"rows": rows, "gain": ["a", "b"]})
    text, difference = table_text(table, tmp_path), gain(table, tmp_path)
    assert difference is not None
    interval = difference.intervals[2]
    assert interval is not None
    assert interval.low > 0
    assert interval.verdict == ("evaluated on 29 images: too few to tell" if images == 29 else "better")
    assert ("detector AP: evaluated on 29 images: too few to tell" in text) == (images == 29)
    size = f"{images} images with {objects} objects" if images else f"{objects} objects"
    assert f"AP is measured on {size}" in text
    assert (f"{size}: too few" in text) == (objects == 99)
    assert "do not cover the choice of evaluation images" in text


def test_intervals_of_one_run(tmp_path: Path) -> None:
    write_result(tmp_path / "a", {"top1": 0.98, "agreement": 0.5, "images": 50})
    write_result(tmp_path / "b", {"top1": 0.8, "images": 50})
    table = TableConfig.model_validate({"rows": {n: {"classifier": n} for n in "ab"}, "gain": ["a", "b"]})
    interval = table_rows(table, tmp_path)[0].intervals[0]
    assert interval is not None
    for bound in (interval.low, interval.high):  # Wilson: the proportions of which 0.98 is just 1.96 deviations away
        assert abs(0.98 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 50))
    assert interval.low < 0.98 < interval.high
    difference = gain(table, tmp_path)
    assert difference is not None
    assert difference.intervals[1] is None
    interval = difference.intervals[0]
    assert interval is not None
    assert interval.low == pytest.approx(0.18 - math.hypot(0.98 - wilson(49, 50)[0], wilson(40, 50)[1] - 0.8))
    assert interval.high == pytest.approx(0.18 + math.hypot(wilson(49, 50)[1] - 0.98, 0.8 - wilson(40, 50)[0]))


def wilson(right: int, images: int) -> tuple[float, float]:
    """Solve (p - q)^2 = z^2 q (1 - q) / n for q."""
    share, z = right / images, 1.96
    low, high = np.sort(np.roots([1 + z**2 / images, -2 * share - z**2 / images, share**2]))
    return float(low), float(high)


@pytest.mark.parametrize(
    ("right", "images", "base_right", "base_images", "low", "high"),
    [  # Newcombe 1998, table II, method 10
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (10, 10, 0, 10, 0.6075, 1.0),
    ],
)
def test_difference_of_proportions_as_published(
    tmp_path: Path, right: int, images: int, base_right: int, base_images: int, low: float, high: float
) -> None:
    write_result(tmp_path / "a", {"top1": right / images, "images": images})
    write_result(tmp_path / "b", {"top1": base_right / base_images, "images": base_images})
    table = TableConfig.model_validate({"rows": {n: {"classifier": n} for n in "ab"}, "gain": ["a", "b"]})
    difference = gain(table, tmp_path)
    assert difference is not None
    assert difference.intervals[0] is not None
    assert (difference.intervals[0].low, difference.intervals[0].high) == pytest.approx((low, high), abs=6e-5)


def test_rows_with_different_runs(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("a_1", 0.7), ("a_2", 0.9), ("b", 0.5), ("b_1", float("nan")), ("b_2", -1)):
        write_result(tmp_path / name, {"top1": value, "images": 100})
    rows = {"x": {"classifier": ["a", "a_1", "a_2"]}, "y": {"classifier": ["b", "b_1", "b_2"]}}
    lines = table_text(TableConfig.model_validate({"rows": rows, "gain": ["x", "y"]}), tmp_path).splitlines()
    assert [line.split() for line in lines[1:3]] == [["x", "70.0"], ["y", "50.0"]]
    assert lines[4].split() == ["x", "-", "y", "+20.0"]
    assert lines[5:] == ["top-1: different numbers of runs: no interval"]


def test_equal_seeds_and_a_stage_twice(tmp_path: Path) -> None:
    for name, value in (("a", 0.51), ("a_1", 0.51), ("b", 0.5), ("b_1", 0.5)):
        write_result(tmp_path / name, {"AP": value})
    rows = {n: {"detector": [n, f"{n}_1"]} for n in "ab"}
    lines = table_text(TableConfig.model_validate({"rows": rows, "gain": ["a", "b"]}), tmp_path).splitlines()
    assert lines[4].split() == ["a", "-", "b", "+1.0"]
    assert lines[5:] == ["detector AP: no spread over the seeds: no interval"]
    with pytest.raises(ValueError, match=r"each stage at most once \(given: a, a\)"):
        TableConfig.model_validate({"rows": {"x": {"detector": ["a", "a"]}}})
    with pytest.raises(ValueError, match="at most 10 items"):
        TableConfig.model_validate({"rows": {"x": {"detector": [f"a{n}" for n in range(11)]}}})


@pytest.mark.parametrize(
    ("images", "own", "conclusions"),
    [
        (30, "other", ["AP50: no difference measured"]),
        (29, "other", ["detector AP, AP50: evaluated on 29 images: too few to tell"]),
        (29, "abc", ["detector AP, AP50: identical detections"]),
    ],
)
def test_intervals_of_detectors_are_those_of_this_comparison(
    images: int, own: str, conclusions: list[str], tmp_path: Path
) -> None:
    compared = {
        "sha256": "abc",
        "images": images,
        "objects": 40,
        "AP": {"difference": 0.1, "low": 0.02, "high": 0.2},
        "AP50": {"difference": 0.1, "low": -0.02, "high": 0.2},
    }
    counts = {"at_threshold": {"right": 10, "wrong": 5, "missed": 30}}
    write_result(tmp_path / "a", {"AP": 0.4, "AP50": 0.6, "compared": compared, **counts}, digest=own)
    write_result(tmp_path / "b", {"AP": 0.3, "AP50": 0.5, **counts}, digest="abc")
    table = TableConfig.model_validate({"rows": {n: {"detector": n} for n in "ab"}, "gain": ["a", "b"]})
    lines = table_text(table, tmp_path).splitlines()
    assert lines[0].split() == ["model", "detector", "AP", "AP50"]  # no row has a classifier
    assert lines[4].split() == ["a", "-", "b", "+10.0", "+10.0"]
    assert lines[5].split() == ["95", "%", "interval", "+2.0", "to", "+20.0", "-2.0", "to", "+20.0"]
    assert lines[6 : 6 + len(conclusions)] == conclusions
    assert lines[-2].startswith("the intervals cover the choice of the images, not the training")
    assert lines[-1].startswith(f"AP is measured on {images} images with 40 objects: too few")
    shutil.rmtree(tmp_path / "b")
    write_result(tmp_path / "b", {"AP": 0.3, "AP50": 0.5, **counts}, digest="another evaluation")
    difference = gain(table, tmp_path)
    assert difference is not None
    assert difference.intervals == (None,) * 4
