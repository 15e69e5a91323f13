"""The report in a browser: no errors, no network requests, every image shown, valid links, readable at any size and in both color schemes."""

import base64
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ssld.pipelines.report import main
from ssld.pipelines.reports.budget import Budget
from tests.pipelines.browser import Page, browser, find_chromium

PHONE, DESK = 390, 1200
LONG = "a class whose name is longer than any telephone is wide, without an end"
# Of every text that is visible: its contrast with what lies behind it (WCAG 2.2, 1.4.3), if that is below the limit.
CONTRASTS = """
(() => {
  const channels = color => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    canvas.canvas.width = canvas.canvas.height = 1;
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const rgba = channels(getComputedStyle(one).backgroundColor);
      if (rgba[3] > 250) return rgba;
    }
    return channels(getComputedStyle(document.documentElement).colorScheme.includes("dark") ? "black" : "white");
  };
  const bad = [];
  let seen = 0;
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim());
    if (!text.length || !element.getClientRects().length) continue;
    const ink = getComputedStyle(element)[element.closest("svg") ? "fill" : "color"];
    const [a, b] = [luminance(channels(ink)), luminance(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < 4.5) bad.push([text[0].textContent.trim(), ratio]);
  }
  return [seen, bad];
})()
"""


def analysis_of(names: list[str], seed: int) -> dict[str, Any]:
    """An analysis.json with random numbers."""
    draw = np.random.default_rng(seed)
    classes = [
        {"class": name, "AP": 0.5, "precision": 0.75, "recall": 0.5, "f1": 0.6, "objects": 4, "right": 2}
        for name in names
    ]
    counts = draw.integers(0, 9, (len(names) + 1, len(names) + 1))
    counts[0, 1:] = 0  # never mistaken: the deepest shade
    recall = np.linspace(0, 1, 101).round(2).tolist()
    precision = {name: np.sort(draw.uniform(0, 1, 101))[::-1].round(4).tolist() for name in names}
    return {
        "score_threshold": 0.5,
        "iou": 0.5,
        "classes": classes,
        "confusions": {
            "names": [*names, "background"],
            "counts": counts.tolist(),
        },
        "precision_recall": {"recall": recall, "precision": precision},
    }


def write_evaluation(run: Path, names: list[str], ap: float, **more: Any) -> None:
    """Run directory of an evaluation with two pairs of images; `more` metrics."""
    (run / "pictures").mkdir(parents=True)
    (run / "config.yaml").write_text("model: a\n")
    (run / "environment.json").write_text(json.dumps({"command": "evaluate_detector", "arguments": ["--model", "a"]}))
    metrics = {"AP": ap, "AP50": 2 * ap, "per_class": dict.fromkeys(names, ap), **more}
    metrics["intervals"] = {"AP": [ap - 0.05, ap + 0.1], "AP50": [2 * ap - 0.1, 2 * ap + 0.1]}
    outputs = {"detections.json": run.name}  # stands for the digest of its content
    (run / "result.json").write_text(json.dumps({"metrics": metrics, "outputs": outputs, "seconds": 61.0}))
    (run / "analysis.json").write_text(json.dumps(analysis_of(names, len(names))))
    index = []
    for kind in ("best", "worst"):
        files = {side: f"{kind}_1_{side}.jpg" for side in ("truth", "detections")}
        for number, file in enumerate(files.values()):
            pixels = np.random.default_rng(number).integers(0, 256, (60, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(run / "pictures" / file)
        index.append({"kind": kind, **files, "image": '"><b>.jpg', "lrp": 0.25, "right": 3, "wrong": 1, "missed": 0})
    (run / "pictures/index.json").write_text(json.dumps(index))


def write_run(run: Path, metrics: dict[str, Any]) -> None:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 3\n")
    (run / "result.json").write_text(json.dumps({"metrics": metrics, "seconds": 3.0}))


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all its parts: two detectors, a training, a curation, a stage that has not run."""
    folder = tmp_path_factory.mktemp("page")
    runs = folder / "runs"
    names = ["cat", "<i>dog</i>", LONG]
    bounds = {"AP": {"low": 0.02, "high": 0.09}, "AP50": {"low": -0.03, "high": 0.2}}
    compared = {"sha256": "ap_baseline", "images": 40, **bounds}
    counts = {"right": 30, "wrong": 4, "missed": 12}
    write_evaluation(runs / "ap_ssld", names, 0.3, compared=compared, at_threshold=counts)
    gains = dict.fromkeys(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), 0.02)
    found = {"no_label": 1, "other_class": 0, "other_box": 0, "not_found": 0}
    audit = {"score_threshold": 0.5, "images": 40, "labels": 42, "counts": found, "drawn": 1}
    audit |= {"findings": [{"file_name": f"{LONG}.jpg", "reason": "no_label", "agreement": 0.9}]}
    audit |= {"tide": {"AP50": 0.4, "gains": gains}, "calibration": {"error": 0.1}}
    (runs / "ap_ssld/label_audit.json").write_text(json.dumps(audit))
    Image.new("RGB", (480, 300), "grey").save(runs / "ap_ssld/label_audit.jpg")
    write_run(runs / "ssld", {"top1": 0.62, "agreement": 0.7, "images": 300})
    write_run(runs / "baseline", {"top1": 0.6, "agreement": 0.69, "images": 300})
    write_evaluation(runs / "ap_baseline", names, 0.25)
    write_evaluation(runs / "ap_many", [f"class {n}" for n in range(40)], 0.1)
    training = runs / "training"
    training.mkdir()
    lines = [{"step": n, "loss": 1 / n, "agreement": 0.5, "lr": 0.1, "val_AP": n / 100} for n in range(1, 40)]
    (training / "config.yaml").write_text("x: " + "very_long_value_" * 30 + "\n")
    (training / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (1900, 900), "grey").save(training / "batches.jpg")
    curation = runs / "curation"
    curation.mkdir()
    (curation / "config.yaml").write_text("keep: 3\n")
    (curation / "result.json").write_text(json.dumps({"metrics": {"kept": 12}, "seconds": 3.0}))
    rows = [{"title": "kept, the\nworst", "images": [["pool", 1, "cat"]]}, {"title": "like another", "images": []}]
    (curation / "outcome.json").write_text(json.dumps({"examples": rows}))
    Image.new("RGB", (1200, 430), "white").save(curation / "curation.png")
    Image.new("RGB", (900, 2000), "white").save(curation / "examples.png")
    predictions = runs / "predictions"
    (predictions / "pictures/deep").mkdir(parents=True)
    (predictions / "config.yaml").write_text("model: a\n")
    (predictions / "result.json").write_text(json.dumps({"metrics": {"pictures": 10, "boxes": 31}, "seconds": 3.0}))
    for n in range(10):
        Image.new("RGB", (640, 300 + 50 * n), "grey").save(predictions / f"pictures/deep/photo_{n}_{LONG}.jpg")
    stages: dict[str, Any] = {
        "curation": {"command": "curate"},
        "predictions": {"command": "predict"},
        "training": {"command": "train"},
        **{name: {"command": "distill"} for name in ("ssld", "baseline")},
        **{name: {"command": "evaluate_detector"} for name in ("ap_ssld", "ap_baseline", "ap_many")},
        "later": {"command": "train"},
    }
    table = {
        "rows": {name: {"classifier": name.lower(), "detector": f"ap_{name.lower()}"} for name in ("SSLD", "baseline")},
        "gain": ["SSLD", "baseline"],
    }
    file = folder / "all.yaml"
    file.write_text(yaml.safe_dump({"output": "unused", "stages": stages, "table": table}, sort_keys=False))
    assert main(["--pipeline", str(file), "--runs", str(runs)]) == 0
    return runs / "report/report.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if find_chromium() is None:
        pytest.skip("no Chromium here; Debian has it as the package chromium")
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def opened(tab: Page, file: Path, **how: Any) -> Page:
    """The page with all its details open and no errors so far."""
    tab.faults.clear()
    tab.open(file, **how)
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    return tab


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_fits_and_can_be_read(tab: Page, report_page: Path, width: int, scheme: str) -> None:
    opened(tab, report_page, width=width, scheme=scheme)
    assert tab.value("document.documentElement.scrollWidth") <= width
    seen, faint = tab.value(CONTRASTS)
    assert seen > 100
    assert faint == []
    paper = tab.value("getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", paper)[0])
    assert red > 200 if scheme == "light" else red < 60
    assert tab.faults == []


def test_images_are_shown(tab: Page, report_page: Path) -> None:
    opened(tab, report_page, width=DESK)
    sizes = tab.value("[...document.images].map(one => [one.naturalWidth, one.clientWidth, one.alt.length])")
    assert len(sizes) == 2 + 6 + 3 * 4 + 2  # of the curation, six of the prediction, of three evaluations, two sheets
    assert all(natural > 0 and shown > 0 and words > 10 for natural, shown, words in sizes)
    words = tab.value("[...document.images].map(one => one.alt)")
    assert words[0].endswith("the kept images: kept 12.")
    assert words[1] == "Rows of images that were kept or left out. kept, the worst: 1 image"
    charts = tab.value("[...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect().height)")
    assert len(charts) == 8  # loss, agreement, AP and lr of the training; three evaluations; the comparison
    assert min(charts) > 100
    assert '"><b>.jpg' in tab.value("document.body.innerText")  # names are text
    assert LONG in tab.value("document.body.innerText")


def test_links_lead_somewhere_and_keys_are_enough(tab: Page, report_page: Path) -> None:
    opened(tab, report_page, width=DESK)
    dead = "[...document.querySelectorAll('a')].filter(a => !document.getElementById(a.hash.slice(1))).length"
    assert tab.value(dead) == 0
    assert tab.value("document.querySelectorAll('a').length") > 10
    for key in ("keyDown", "keyUp"):
        tab("Input.dispatchKeyEvent", type=key, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert tab.value("document.activeElement.className") == "skip"
    assert tab.value("document.activeElement.getBoundingClientRect().left >= 0")  # seen when it is reached
    tab.value("document.querySelector('a[href=\"#stage-ap_many\"]').click()")
    assert tab.value("Math.abs(document.getElementById('stage-ap_many').getBoundingClientRect().top) < 5")
    unreachable = "[...document.querySelectorAll('.wide, pre')].filter(one => one.tabIndex < 0).length"
    assert tab.value(unreachable) == 0


def test_structure_for_those_who_listen(tab: Page, report_page: Path) -> None:
    opened(tab, report_page, width=DESK)
    assert tab.value("document.documentElement.lang") == "en"
    assert tab.value("['header', 'nav', 'main', 'footer'].map(n => document.querySelectorAll(n).length)") == [
        1,
        1,
        1,
        1,
    ]
    levels = tab.value("[...document.querySelectorAll('h1, h2, h3, h4')].map(one => +one.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert tab.value("[...document.querySelectorAll('th')].filter(one => !one.scope).length") == 0
    assert tab.value("[...document.querySelectorAll('table')].filter(one => !one.querySelector('th')).length") == 0
    tree = tab("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in tree if node.get("role", {}).get("value") in ("image", "img")]
    assert len(images) >= 14 + 8 + 1
    assert all(node["name"]["value"] for node in images)


def test_prints(tab: Page, report_page: Path) -> None:
    """In print: light colors, no navigation, and all details open."""
    tab.open(report_page, width=DESK, scheme="dark", media="print")
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    closed = "document.querySelector('details:not([open]) .matrix')"
    assert tab.value(f"{closed}.checkVisibility()")
    assert not tab.value("document.querySelector('details:not([open]) pre').checkVisibility()")  # settings are long
    tab.open(report_page, width=DESK)
    assert not tab.value(f"{closed}.checkVisibility()")
    pages = tab("Page.printToPDF")["data"]
    assert pages.startswith("JVBERi")  # %PDF-


def test_gain_is_first_and_large(tab: Page, report_page: Path) -> None:
    opened(tab, report_page, width=PHONE)
    assert tab.value("document.querySelector('.points').textContent") == "+5.0"
    top, size = tab.value(
        "[document.querySelector('.points').getBoundingClientRect().top, "
        "parseFloat(getComputedStyle(document.querySelector('.points')).fontSize)]"
    )
    assert top < 600  # on a phone's first screen
    assert size > 40
    heads = "[...document.querySelector('table').querySelectorAll('thead th')]"
    names, rights = tab.value(
        f"[{heads}.map(one => one.innerText), {heads}.map(one => one.getBoundingClientRect().right)]"
    )
    assert names[:2] == ["model", "detector AP"]
    assert rights[1] <= PHONE  # not cut off


def test_gains_and_bars_show_their_intervals(tab: Page, report_page: Path) -> None:
    opened(tab, report_page, width=DESK)
    colors = (
        "[...document.querySelectorAll('.points, .measure')].map(one => [one.innerText, getComputedStyle(one).color])"
    )
    (ap, green), _, (verdict, grey), (top1, _) = tab.value(colors)
    assert (ap, verdict) == ("+5.0", "No difference measured")
    assert top1 == "+2.0 points of top-1, SSLD against baseline"
    soft = tab.value("getComputedStyle(document.querySelector('.soft')).color")
    assert green != soft
    assert grey == soft
    text = tab.value("document.body.innerText")
    assert (
        "95 % interval +2.0 to +9.0 (paired bootstrap over 40 images; one training of each: another seed can change it by more)"
        in text
    )
    assert "AP is measured on 40 images with 42 objects: too few" in text
    boxes = tab.value(
        "[...document.querySelectorAll('.bars')[0].querySelectorAll('.track')].map(one => [one, ...one.children]"
        ".map(part => part.getBoundingClientRect()).map(box => [box.left, box.right]))"
    )
    for ((left, right), bar, whisker), value in zip(boxes, (0.3, 0.25, 0.1), strict=True):
        unit = (right - left) / 0.4  # the end of the longest interval
        assert bar == pytest.approx([left, left + unit * value], abs=1)
        assert whisker == pytest.approx([left + unit * (value - 0.05), left + unit * (value + 0.1)], abs=1)


def test_images_without_room_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(file)
    budget = Budget(100_000)
    whole = budget.embed(file, 640)
    assert whole
    assert budget.left == 100_000 - len(whole.partition(",")[2])
    small = Budget(100_000).embed(file, 100)
    assert small
    assert len(small) < len(whole) / 4
    assert Budget(1000).embed(file, 640) is None
    file.write_bytes(b"not an image")
    assert Budget().embed(file, 640) is None


def test_photos_of_more_than_eight_bits_are_not_white_on_the_page(tmp_path: Path) -> None:
    """As on every other sheet: a gray value of 2048 of 12 bits is a middle gray."""
    file = tmp_path / "deep.tiff"
    Image.fromarray(np.full((8, 8), 2048, np.uint16)).save(file)
    source = Budget().embed(file, 640)
    assert source
    shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert np.abs(np.asarray(shown, np.int16) - 128).max() <= 2
