"""Labels to look at first on the page of an evaluation, and sheets of images within the page's budget."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssld.pipelines.report import main
from ssld.pipelines.reports.audit_view import read_audit
from ssld.pipelines.reports.budget import Budget
from ssld.shared.training.batch_sheet import SHEET_FILE
from ssld.stage2_detect.evaluation.label_audit import FILE, REASONS, SHEET


def finding(name: str, reason: str, agreement: float) -> dict[str, Any]:
    return {"image_id": 1, "file_name": name, "reason": reason, "agreement": agreement}


def audit(findings: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    counts = {reason: sum(one["reason"] == reason for one in findings) for reason in REASONS}
    gains = {"Cls": 0.02, "Loc": 0.1, "Both": 0.0, "Dupe": 0.0, "Bkg": 0.03, "Miss": 0.04}
    record = {"score_threshold": 0.5, "images": 200, "labels": 1431, "counts": counts, "drawn": min(12, len(findings))}
    return record | {
        "findings": findings,
        "tide": {"AP50": 0.61, "gains": gains},
        "calibration": {"error": 0.084},
        **more,
    }


FINDINGS = [
    finding("a/1.jpg", "no_label", 0.98),
    finding("<b>.jpg", "no_label", 0.97),
    finding("a/1.jpg", "other_box", 0.9),
    finding("c.jpg", "not_found", 0.5),
    finding("d.jpg", "not_found", 0.49),
    finding("e.jpg", "other_class", 0.3),
]


def write_run(run: Path, content: str | None) -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: x\n")
    (run / "result.json").write_text(json.dumps({"metrics": {"AP": 0.5}, "seconds": 1.0}))
    if content is not None:
        (run / FILE).write_text(content)
    return run


def page_of(run: Path) -> str:
    assert main(["--runs", str(run)]) == 0
    return (run / "report/report.html").read_text()


def test_the_section_counts_names_and_shows_the_findings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "ap", json.dumps(audit(FINDINGS)))
    Image.new("RGB", (40, 20), "red").save(run / SHEET)
    html = page_of(run)
    assert "Labels to look at first" in html
    assert (
        "2 confident detections where no label is, 1 confident detection of another class on a label, "
        "1 confident detection that overlaps its label by less than half, 1 label that no detection finds." in html
    )
    assert "Left out: 1 more label that no detection finds" in html
    assert "First images: a/1.jpg, &lt;b&gt;.jpg, c.jpg, e.jpg." in html
    rows = re.findall(r'normal">([^<]*)</th><td>([^<]*)</td>', html)
    assert [value for _, value in rows] == ["+2.0", "+10.0", "0.0", "0.0", "+3.0", "+4.0"]
    assert "in points, from 61.0 (TIDE" in html
    assert "by 8.4 points on average" in html
    assert base64.b64encode((run / SHEET).read_bytes()).decode() in html
    assert "The first 6 findings, with labels and detections" in html


@pytest.mark.parametrize(("AP50", "weak"), [(0.0, True), (0.31, True), (0.499, True), (0.5, False), (0.9, False)])
def test_a_weak_detector_is_said_to_cause_most_findings(AP50: float, weak: bool, tmp_path: Path) -> None:
    tide = {"AP50": AP50, "gains": dict.fromkeys(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), 0.0)}
    html = page_of(write_run(tmp_path / "ap", json.dumps(audit(FINDINGS, tide=tide))))
    assert f"on 200 images; AP50 of the detector on them: {100 * AP50:.1f} %." in html
    assert (f"AP50 of this detector on these images is {100 * AP50:.1f}: so weak a detector" in html) == weak
    none = write_run(tmp_path / "none", json.dumps(audit([], tide=tide)))
    assert "so weak a detector" not in page_of(none)  # nothing is listed


def test_what_the_list_has_no_room_for_is_left_out_with_its_last_ones(tmp_path: Path) -> None:
    more = {"no_label": 2, "other_class": 1, "other_box": 1, "not_found": 40}
    read = read_audit(write_run(tmp_path / "a", json.dumps(audit(FINDINGS, counts=more))))
    assert read is not None
    assert read.left_out == 39
    assert read.counts.endswith(", 1 label that no detection finds")
    read = read_audit(write_run(tmp_path / "b", json.dumps(audit(FINDINGS[:4], counts=more))))
    assert read is not None
    assert (read.left_out, read.counts[-34:]) == (0, ", 40 labels that no detection finds"[-34:])
    read = read_audit(write_run(tmp_path / "c", json.dumps(audit(FINDINGS[4:5]))))
    assert read is not None
    assert (read.left_out, read.counts, read.names, read.drawn) == (1, "", [], 0)
    many = [finding(f"{n}.jpg", "no_label", 0.9) for n in range(30)]
    read = read_audit(write_run(tmp_path / "d", json.dumps(audit(many, tide=None, calibration=None))))
    assert read is not None
    assert (len(read.names), read.more, read.gains, read.calibration) == (12, 18, [], None)


def test_a_training_shows_its_first_images(tmp_path: Path) -> None:
    run = write_run(tmp_path / "detector", None)
    assert "as the network gets them" not in page_of(run)
    Image.new("RGB", (3000, 1500), "red").save(run / SHEET_FILE)
    html = page_of(run)
    assert 'alt="First training images, as the network gets them"' in html
    source = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', html)
    with Image.open(io.BytesIO(base64.b64decode(source[0]))) as shown:
        assert shown.size == (1200, 600)


@pytest.mark.parametrize("content", [None, "", "[1]", "{}", json.dumps(audit([finding("a", "odd", 1.0)]))])
def test_no_section_without_a_sound_file(content: str | None, tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path / "ap", content))
    assert "Labels to look at first" not in html
    assert ("Damaged and left out: label_audit.json" in html) == (content is not None)


def test_sheets_use_up_to_half_of_the_budget(tmp_path: Path) -> None:
    file = tmp_path / "sheet.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
    length = len(base64.b64encode(file.read_bytes()))
    budget = Budget(5 * length)
    assert [budget.embed_sheet(file) is not None for _ in range(3)] == [True, True, False]
    assert budget.left == 3 * length
    assert budget.embed(file, 64) is not None
    (tmp_path / "outside.jpg").write_bytes(file.read_bytes())
    run = write_run(tmp_path / "ap", json.dumps(audit(FINDINGS)))
    (run / SHEET).symlink_to(tmp_path / "outside.jpg")
    assert "The first 6 findings" not in page_of(run)
