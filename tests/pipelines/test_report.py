"""The report: correct numbers, alternative text for every image, no external resources, unfinished runs marked as such."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ssld.pipelines.config import PipelineConfig, TableConfig
from ssld.pipelines.report import main
from ssld.pipelines.reports import charts
from ssld.pipelines.reports.budget import Budget
from ssld.pipelines.reports.gains import gains
from ssld.pipelines.reports.photos import Photos
from ssld.pipelines.reports.stage_view import view
from ssld.pipelines.reports.table import Interval, Record, Row, table_text, write_record

VOID = {"meta", "link", "br", "img", "path", "use"}


class Page(HTMLParser):
    """Collects tags with their attributes and the text, and checks that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += f" {data.strip()}"


def write_run(run: Path, *, metrics: dict[str, Any] | None, lines: list[dict[str, Any]]) -> None:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 100\nname: <b>&amp;\n")
    environment = {
        "command": run.name,
        "arguments": ["--steps", "100"],
        "versions": {"torch": "2.15.0", "hotcoco": None},
        "machine": "some machine",
        "cores": 2,
        "inputs": {},
    }
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    if metrics is not None:
        (run / "result.json").write_text(json.dumps({"metrics": metrics, "seconds": 90.0}))


@pytest.fixture
def pipeline(tmp_path: Path, chain: dict[str, Any], table: dict[str, Any], fake_kinds: None) -> Path:
    """Pipeline with student and ap finished, baseline unfinished, and the other stages not run."""
    stages = {**chain, "report": {"command": "report"}}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({"output": "unused", "stages": stages, "table": table}, sort_keys=False))
    steps = [{"step": step, "loss": 3 - step / 50, "agreement": step / 200, "lr": 0.1} for step in (50, 100)]
    student = {"top1": 0.691, "agreement": 0.712, "kl": 0.4321, "steps": 100, "images_seen": 12800}
    write_run(tmp_path / "runs/student", metrics=student, lines=[*steps, {"step": 100, "val_top1": 0.691}])
    write_run(tmp_path / "runs/baseline", metrics=None, lines=[{"step": 50, "loss": 2.5, "lr": 0.1}])
    ap = {"AP": 0.2574, "AP50": 0.481, "APs": None, "per_class": {"disc": 0.333, "ring": None}}
    write_run(tmp_path / "runs/ap", metrics=ap, lines=[])
    (tmp_path / "runs/student/quarantine.txt").write_text("a.jpg\nb.jpg\n")
    return file


def arguments(pipeline: Path) -> list[str]:
    runs = pipeline.parent / "runs"
    return ["--pipeline", str(pipeline), "--runs", str(runs), "--output", str(runs / "report")]


@pytest.fixture
def html(pipeline: Path) -> str:
    assert main(arguments(pipeline)) == 0
    return (pipeline.parent / "runs/report/report.html").read_text()


def test_numbers(html: str) -> None:
    text = " ".join(Page(html).text.split())
    assert "model detector AP AP50 top-1 agreement" in text  # a phone would cut off the last columns
    assert "SSLD 25.7 48.1 69.1 71.2" in text
    assert "teacher - - - -" in text
    assert "points of" not in text  # the baseline has no number yet: nothing is compared
    assert "SSLD - baseline - - - -" in text
    assert "KL, nats 0.4321" in text
    assert "steps 100" in text
    assert "AP, % 25.7" in text
    assert "APs, % -" in text
    assert "disc 33.3 ring -" in text
    assert "2 of 5 stages finished, 3 min of work, 12,800 images seen in training" in text
    assert "2 unreadable images" in text
    assert "together 12,800 3 min" in text


def test_status_of_every_stage(html: str) -> None:
    text = " ".join(Page(html).text.split())
    for line in (
        "data toy_data not run - -",
        "student distill finished 12,800 90 s",
        "baseline distill unfinished, at step 50 - -",
    ):
        assert line in text
    assert "report report" not in text  # itself


def test_settings_and_machine(html: str) -> None:
    text = Page(html).text
    assert "name: <b>&amp;" in text  # printed as text, not as markup
    assert "ssld distill --steps 100" in text
    assert "some machine" in text
    assert "torch 2.15.0" in text
    assert "hotcoco" not in text


def test_every_image_has_alternative_text_with_numbers(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag in ("img", "script")]
    words = [attributes["aria-label"] or "" for _, attributes in page.tags if attributes.get("role") == "img"]
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert words[:2] == ["detector AP in %: SSLD 25.7", "top-1 in %: SSLD 69.1"]
    assert words[2] == "loss, stage student: training from 2 at step 50 to 1 at step 100."
    # Named after its curves: the only accuracy, top-1, has a single point.
    assert words[3] == "agreement in %, stage student: training agreement from 25 at step 50 to 50 at step 100."
    assert len(words) == 5  # and the learning rate; single points are no curves


def test_page_is_self_contained(html: str) -> None:
    page = Page(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    anchors = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(anchors) == len(set(anchors))
    links = [attributes["href"] or "" for tag, attributes in page.tags if tag == "a"]
    stages = {"stage-student", "stage-baseline", "stage-ap"}
    assert {link[1:] for link in links} == stages | {"content", "result", "cost"} <= set(anchors)
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html


def test_again_replaces_the_old_page(pipeline: Path, html: str) -> None:
    write_run(pipeline.parent / "runs/teacher", metrics={"top1": 0.876}, lines=[])
    assert main(arguments(pipeline)) == 0
    page = pipeline.parent / "runs/report/report.html"
    assert "87.6" in Page(page.read_text()).text
    assert "87.6" not in Page(html).text


def test_without_table_and_runs(tmp_path: Path, fake_kinds: None) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("output: x\nstages: {a: {command: teach}}\n")
    (tmp_path / "runs").mkdir()
    assert main(arguments(file)) == 0
    html = (tmp_path / "runs/report/report.html").read_text()
    assert "Result" not in Page(html).text
    assert "0 s of work." in html


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--runs", "nowhere"], "runs: nowhere: no such folder"),
        (["--pipeline", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["--run", "x"], "--run: unknown flag; did you mean '--runs'?"),
    ],
)
def test_mistakes_end_in_one_line(pipeline: Path, change: list[str], message: str, capfd: Any) -> None:
    assert main([*arguments(pipeline), *change]) == 2
    assert capfd.readouterr().err == f"error: {message}\n"


def test_another_run_is_not_overwritten(pipeline: Path, capfd: Any) -> None:
    runs = pipeline.parent / "runs"
    assert main(["--pipeline", str(pipeline), "--runs", str(runs), "--output", str(runs / "student")]) == 2
    assert "holds a run with another configuration" in capfd.readouterr().err
    assert (runs / "student/result.json").exists()


def test_charts_without_numbers() -> None:
    assert charts.curves("a", []) == []
    assert charts.curves("a", [{"step": 1, "seconds": 2.0, "loss": None}]) == []
    assert charts.curves("a", [{"step": 1, "loss": 2.0}]) == []


def test_same_curves_give_the_same_bytes() -> None:
    metrics = [{"step": step, "loss": 1 / step} for step in range(1, 5)]
    first, second = charts.curves("a", metrics), charts.curves("a", metrics)
    assert first == second
    assert [chart.title for chart in first] == ["loss"]
    assert first[0].svg.startswith("<svg")
    assert "var(--series-0)" in first[0].svg  # the page's color


def test_class_names_of_any_kind_get_into_a_legend() -> None:
    names = ["$a_b$ and $c", "_hidden", "n" * 80, "<b>&amp;"]
    chart = charts.precision_recall("x", [0.0, 1.0], {name: [1.0, 0.5] for name in names}, [1.0, 0.5])
    words = " ".join(re.findall(r">([^<>]+)</text>", chart.svg))
    for label in ("$a_b$ and $c", "_hidden", "n" * 25 + "…", "&lt;b&gt;&amp;amp;", "mean of the classes"):
        assert label in words
    assert "$a_b$ and $c 75.0" in chart.alt
    many = charts.precision_recall("x", [0.0, 1.0], {str(n): [1.0, 0.5] for n in range(40)}, [1.0, 0.5])
    assert "mean of the classes" in many.svg
    assert "39" not in many.alt


def test_gains() -> None:
    rows = [
        Row("SSLD", (0.5, None, 0.30, None)),
        Row("baseline", (0.4, None, 0.275, None)),
        Row("random", (None, None, 0.31, None)),
    ]
    table = TableConfig.model_validate({"rows": {row.name: {} for row in rows}, "gain": ["SSLD", "baseline"]})
    above, around = Interval(0.01, 0.04, "3 seeds"), Interval(-0.02, 0.22, "binomial, 50 images")
    difference = Row("SSLD - baseline", (0.1, None, 0.025, None), (around, None, above, None))
    ap, top1 = gains(table, rows, difference)
    assert (ap.measure, ap.text, ap.better, ap.base, ap.verdict) == ("detector AP", "+2.5", "SSLD", "baseline", "good")
    assert ap.interval_text == "95 % interval +1.0 to +4.0 (3 seeds)"
    assert ap.others == [("random", pytest.approx(-1.0))]
    assert (top1.measure, top1.text, top1.others, top1.verdict) == ("top-1", "+10.0", [], "none")
    assert top1.interval_text == "95 % interval \N{MINUS SIGN}2.0 to +22.0 (binomial, 50 images)"
    below = Row("", (None, None, -0.025, None), (None, None, Interval(-0.04, -0.01, ""), None))
    assert [(one.text, one.verdict) for one in gains(table, rows, below)] == [("\N{MINUS SIGN}2.5", "bad")]
    pair = ("random", "baseline")
    other = Row("", (0.2, None, 0.035, None), (None, None, above, None))
    more = gains(table, rows, below, {pair: other}, {pair: "stage 1"})
    assert [(one.better, one.base, one.measure, one.brought) for one in more] == [
        ("SSLD", "baseline", "detector AP", None),
        (*pair, "detector AP", "stage 1"),
    ]
    assert more[0].others == []  # it has an interval of its own
    unknown = gains(table, rows, Row("", (None, None, 0.5, None)))[0]
    assert (unknown.verdict, unknown.interval_text) == ("none", "no interval measured")


@pytest.mark.parametrize(
    ("low", "high", "images", "objects", "words"),
    [
        (
            0.01,
            0.09,
            6,
            300,
            "Evaluated on 6 images: too few to tell +5.0 points of detector AP, ap against base 95 % interval +1.0 to +9.0",
        ),
        (
            0.01,
            0.09,
            40,
            300,
            "+5.0 points of detector AP, ap against base 95 % interval +1.0 to +9.0 (paired bootstrap over 40 images; one training",
        ),
        (
            -0.02,
            0.09,
            40,
            99,
            "No difference measured +5.0 points of detector AP, ap against base 95 % interval \N{MINUS SIGN}2.0 to +9.0",
        ),
    ],
)
def test_a_gain_is_claimed_only_outside_its_interval(
    low: float, high: float, images: int, objects: int, words: str, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    counts = {"right": objects - 9, "missed": 9}
    write_run(runs / "base", metrics={"AP": 0.2, "intervals": {"AP": [0.15, 0.3]}, "at_threshold": counts}, lines=[])
    compared = {"sha256": "abc", "images": images, "AP": {"difference": 0.05, "low": low, "high": high}}
    metrics = {"AP": 0.25, "compared": compared, "intervals": {"AP": [0.2, 0.5]}, "at_threshold": counts}
    write_run(runs / "ap", metrics=metrics, lines=[])
    base = json.loads((runs / "base/result.json").read_text()) | {"outputs": {"detections.json": "abc"}}
    (runs / "base/result.json").write_text(json.dumps(base))
    stages = {name: {"command": "evaluate_detector"} for name in ("base", "ap")}
    table = {"rows": {name: {"detector": name} for name in stages}, "gain": ["ap", "base"]}
    write_record(
        runs, Record("x", False, PipelineConfig.model_validate({"output": "x", "stages": stages, "table": table}))
    )
    assert main(["--runs", str(runs)]) == 0
    content = (runs / "report/report.html").read_text()
    text = " ".join(Page(content).text.split())
    assert words in text
    claimed = low > 0 and images >= 30
    assert ('class="points good"' in content) == claimed
    assert ('class="points none soft"' in content) != claimed
    assert "The intervals cover the choice of the images, not the training" in text
    assert (f"{images} images with {objects} objects: too few to tell" in text) == (images < 30 or objects < 100)
    assert "25.0 20.0 to 50.0" in text  # each AP with its own interval
    # Bars begin at 0; the longest interval ends at the right edge.
    assert 'style="display: block; width: 40.0%"' in content
    assert 'class="whisker" style="left: 30.0%; width: 30.0%"' in content
    assert 'class="whisker" style="left: 40.0%; width: 60.0%"' in content


def record_of(pipeline: Path, *, smoke: bool) -> PipelineConfig:
    content = PipelineConfig.model_validate(yaml.safe_load(pipeline.read_text()))
    write_record(pipeline.parent / "runs", Record("small", smoke, content))
    return content


def test_a_folder_of_runs_says_which_pipeline_it_is_of(pipeline: Path, html: str) -> None:
    record_of(pipeline, smoke=False)
    runs = pipeline.parent / "runs"
    assert main(["--runs", str(runs)]) == 0
    again = (runs / "report/report.html").read_text()
    assert Page(again).text.split("Written")[0] == Page(html).text.split("Written")[0]


def test_a_smoke_run_is_called_one(pipeline: Path, html: str) -> None:
    content = record_of(pipeline, smoke=True)
    runs = pipeline.parent / "runs"
    write_run(runs / "teacher", metrics={"top1": 0.9}, lines=[])
    assert main(["--runs", str(runs)]) == 0
    assert "Smoke run." in Page((runs / "report/report.html").read_text()).text
    assert "Smoke run." not in Page(html).text
    assert content.table
    smoke, earnest = (table_text(content.table, runs, smoke=smoke).splitlines() for smoke in (True, False))
    assert smoke[:-1] == earnest
    assert smoke[-1] == "smoke sizes: these numbers only show that everything runs"


def test_runs_without_a_pipeline_and_a_single_run(pipeline: Path, html: str) -> None:
    runs = pipeline.parent / "runs"
    assert main(["--runs", str(runs)]) == 0
    text = " ".join(Page((runs / "report/report.html").read_text()).text.split())
    assert "2 of 3 stages finished" in text
    assert "Result" not in text
    for name in ("ap", "baseline", "student"):
        assert f"{name} {name}" in text  # the command as the run recorded it
    assert main(["--runs", str(runs / "student")]) == 0
    text = " ".join(Page((runs / "student/report/report.html").read_text()).text.split())
    assert "90 s of work, 12,800 images seen in training" in text
    assert "Stages and cost" not in text  # of one there is nothing to list
    assert "69.1" in text
    assert "baseline" not in text


def test_time_of_earlier_starts_counts(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0, "seconds": 100.0} for step in (1, 2)]
    write_run(tmp_path / "a", metrics={}, lines=lines)  # whose last start took 90 s
    write_run(tmp_path / "b", metrics=None, lines=lines[:1])
    write_run(tmp_path / "c", metrics={}, lines=[])
    write_run(tmp_path / "d", metrics=None, lines=[])
    assert [view(name, None, tmp_path / name, Photos(Budget())).seconds for name in "abcd"] == [200, 100, 90, None]


def test_some_of_the_predicted_images_are_shown(tmp_path: Path) -> None:
    drawn = tmp_path / "predicted" / "pictures"
    (drawn / "b").mkdir(parents=True)
    for n in range(13):
        Image.new("RGB", (60, 40), (n, 0, 0)).save(drawn / f"a{n:02d}.png")
    Image.new("RGB", (60, 40)).save(drawn / "b" / "last.jpg")
    (drawn / "a04.png").write_bytes(b"not an image")
    (drawn / "clip.mp4").write_bytes(b"a video")
    images = view("predicted", "predict", tmp_path / "predicted", Photos(Budget())).predicted
    assert [one.title for one in images] == ["a00.png", "a02.png", "a07.png", "a09.png", "a11.png"]
    assert images[1].alt == "a02.png with its detections"
    (drawn / "index.json").write_text("[]")  # marks the images of an evaluation
    assert view("predicted", "predict", tmp_path / "predicted", Photos(Budget())).predicted == []
    assert view("predicted", "predict", tmp_path / "nowhere", Photos(Budget())).predicted == []


def test_a_folder_without_runs(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["--runs", str(tmp_path / "empty")]) == 2
    assert "neither a run directory nor a folder of them" in capfd.readouterr().err
    assert not list((tmp_path / "empty").iterdir())
    (tmp_path / "empty/pipeline.json").write_text("{}")
    assert main(["--runs", str(tmp_path / "empty")]) == 2
    assert "pipeline.json: not readable; delete it and give --pipeline" in capfd.readouterr().err


ODD: list[Any] = [
    None,
    True,
    -1,
    1.5,
    "text\ud800",
    [],
    [[1]],
    {},
    {"a": {"b": [None]}},
    10**400,
    float("nan"),
    float("inf"),
]


@pytest.mark.parametrize(
    "file",
    [
        "result.json",
        "metrics.jsonl",
        "analysis.json",
        "environment.json",
        "outcome.json",
        "pictures/index.json",
        "label_audit.json",
    ],
)
def test_a_damaged_record_leaves_its_part_out(file: str, tmp_path: Path) -> None:
    """With values of a wrong type at any place, the page is written, or one line names the fault."""
    precision = {"recall": [0.0, 1.0], "precision": {"a": [1.0, 0.5], "b": [1.0, 0.2]}}
    rows = [{"class": "a", "AP": 0.5, "precision": 1.0, "recall": 1.0, "f1": 1.0, "objects": 2}]
    confusions = {"names": ["a", "b", "background"], "counts": [[1, 0, 0], [0, 1, 0], [0, 1, 0]]}
    records: dict[str, dict[str, Any]] = {
        "result.json": {"metrics": {"AP": 0.5, "per_class": {"a": 0.5}, "images_seen": 3}, "seconds": 3.0},
        "metrics.jsonl": {"step": 3, "loss": 1.0, "seconds": 2.0},
        "analysis.json": {
            "score_threshold": 0.5,
            "precision_recall": precision,
            "classes": rows,
            "confusions": confusions,
        },
        "environment.json": {"command": "train", "arguments": ["--steps", "3"], "versions": {"a": "1"}, "started": "x"},
        "label_audit.json": {
            "score_threshold": 0.5,
            "images": 1,
            "labels": 1,
            "counts": {"no_label": 1, "other_class": 0, "other_box": 0, "not_found": 0},
            "drawn": 0,
            "findings": [{"file_name": "a.jpg", "reason": "no_label", "agreement": 0.9}],
            "tide": {"AP50": 0.5, "gains": dict.fromkeys(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), 0.1)},
            "calibration": {"error": 0.1},
        },
        "outcome.json": {"examples": [{"title": "t", "images": [1]}]},
        "pictures/index.json": {
            "kind": "best",
            "image": "i",
            "truth": "t.jpg",
            "detections": "f.jpg",
            "right": 1,
            "wrong": 1,
            "missed": 1,
            "lrp": 0.5,
        },
    }
    sound = records[file]
    for odd in ODD:
        variants = [odd] if file != "metrics.jsonl" else []
        variants += [sound | {key: odd} for key in sound]
        for key, value in sound.items():
            if isinstance(value, dict):
                variants += [sound | {key: value | {inner: odd}} for inner in value]
            if isinstance(value, list) and value and isinstance(value[0], dict):
                variants += [sound | {key: [value[0] | {inner: odd}]} for inner in value[0]]
        if file == "analysis.json":  # its curves take long to draw
            variants = [
                {key: value for key, value in one.items() if value is not precision} if isinstance(one, dict) else one
                for one in variants
            ]
            variants += [{"precision_recall": precision | {inner: odd}} for inner in precision]
        run = tmp_path / f"run{ODD.index(odd) if odd == odd else 'nan'}"
        write_run(run, metrics={"AP": 0.5}, lines=[{"step": 1, "loss": 2.0}])
        (run / "pictures").mkdir()
        for number, content in enumerate(variants):
            whole = [content] if file == "pictures/index.json" and isinstance(content, dict) else content
            (run / file).write_text(json.dumps(whole) + "\n")
            stage = view("x", None, run, Photos(Budget()))
            assert stage.status in ("finished", "unfinished", "unfinished, at step 1", "unfinished, at step 3"), number
        assert main(["--runs", str(run), "--output", str(tmp_path / f"page{run.name}")]) in (0, 2)


def test_a_page_embeds_no_image_outside_the_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "private.jpg")
    run = tmp_path / "run"
    write_run(run, metrics={"AP": 0.5}, lines=[])
    (run / "pictures").mkdir()
    entry = {
        "kind": "best",
        "image": "i",
        "detections": "../../private.jpg",
        "right": 1,
        "wrong": 0,
        "missed": 0,
        "lrp": 0.0,
    }
    for name in ("../../private.jpg", str(tmp_path / "private.jpg")):
        (run / "pictures" / "index.json").write_text(json.dumps([{**entry, "truth": name}]))
        stage = view("x", None, run, Photos(Budget()))
        assert (stage.pairs, stage.damaged) == ([], ("pictures/index.json",))
