"""The README is executed: its set-up commands, the quickstart at smoke size, every other command's flags."""

import base64
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from ssld.pipelines import run
from ssld.pipelines.cli import COMMANDS
from ssld.pipelines.runner.stages import KINDS
from ssld.shared.config.settings import parse_config
from ssld.stage2_detect.detector_file import load_detector
from tests.docs_sandbox import save_random_detector, write_coco

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = "pipelines/quickstart.yaml"


def commands() -> Iterator[str]:
    """The indented command lines of the README, continuation lines joined."""
    for block in re.findall(r"(?:^ {4}\S.*\n?)(?:^ {4,}\S.*\n?)*", README, flags=re.MULTILINE):
        yield from re.sub(r"\\\n\s+", "", block).splitlines()


def test_there_are_exactly_two_set_up_commands() -> None:
    installs = [line.strip() for line in commands() if "pip install" in line]
    assert installs == [
        f'pip install -e ".[test]" && python pipelines/run.py {QUICKSTART}',
        'pip install -e ".[test]" && pytest -n logical',
    ]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m1 '(.*)' README.md", script)
    assert pattern
    expression = re.compile(pattern[1])
    matching = [line for line in README.splitlines() if expression.match(line)]
    assert matching == ['    pip install -e ".[test]" && pytest -n logical']
    assert "pip install" not in script.replace(pattern[1], ""), "the command stands in the README and nowhere else"


@pytest.mark.parametrize("line", [line.strip() for line in commands() if re.match(r"\s+(python stage|ssld )", line)])
def test_every_other_command_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in shlex.split(line) if word != "..."]
    if words[0] == "ssld":
        assert words[1] in COMMANDS
        return
    monkeypatch.chdir(ROOT)
    assert (ROOT / words[1]).is_file()
    parse_config({kind.script: kind.config_type for kind in KINDS.values()}[words[1]], words[2:], program=words[1])


def test_nothing_is_left_to_fill_in() -> None:
    assert re.findall(r"@[A-Z]+@", README) == []


def test_relative_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not re.match(r"[a-z]+:|#", link)]
    assert links
    assert [link for link in links if not (ROOT / link.split("#")[0]).exists()] == []


def test_the_quickstart_dry_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    assert run.main([QUICKSTART, "--dry-run", "--output", str(tmp_path / "dry")]) == 0
    printed = capsys.readouterr().out
    for command in ("toy-data", "teach", "distill", "train", "evaluate", "report"):
        assert f"    ssld {command} " in printed
    assert "--objective labels" in printed
    assert not (tmp_path / "dry").exists() or not any((tmp_path / "dry").iterdir())


@pytest.mark.slow
def test_the_quickstart_and_its_notebook_run(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage at smoke size in real processes, from images to the table; a second start does nothing."""
    output = tmp_path / "quick"
    argv = [str(ROOT / QUICKSTART), "--smoke", "--output", str(output)]
    done = scripts.run("pipelines/run.py", *argv)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    header = next(line for line in lines if line.split()[:2] == ["model", "top-1"])
    start = lines.index(header) + 1
    rows = [line.split()[0] for line in lines[start : start + 4]]
    assert rows == ["teacher", "SSLD", "baseline", "random"]
    assert (output / "report" / "report.html").stat().st_size > 10_000
    ap = json.loads((output / "ap_ssld" / "result.json").read_text())["metrics"]
    assert 0.0 <= ap["AP"] <= ap["AP50"] <= 1.0
    again = scripts.run("pipelines/run.py", *argv)
    assert again.returncode == 0
    assert "teach.py" not in again.stdout.replace("toy_teacher", ""), "a finished pipeline ran a stage again"
    monkeypatch.chdir(ROOT)
    scope = run_notebook(ROOT / "docs" / "quickstart.ipynb", output)
    assert scope["sheet"].size == (4 * 240, 2 * 240)
    assert len(scope["sheet"].resize((8, 4)).getcolors()) > 8  # not an empty image


def run_notebook(file: Path, output: Path) -> dict[str, Any]:
    """Run a notebook's cells on the folder of a finished smoke run of the pipeline; returns the names that they define."""
    code = "\n".join("".join(cell["source"]) for cell in code_cells(file))
    replaced = code.replace('Path("runs/quickstart")', f"Path({str(output)!r})").replace(
        "OPTIONS = []", 'OPTIONS = ["--smoke"]'
    )
    assert replaced.count(str(output)) == replaced.count('= ["--smoke"]') == 1
    scope: dict[str, Any] = {}
    exec(compile(replaced, str(file), "exec"), scope)
    return scope


def code_cells(file: Path) -> list[dict[str, Any]]:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_has_the_outputs_of_one_run() -> None:
    """Every cell was run in order; the AP that the last one prints is that of the table which the first one prints; no path of a machine."""
    file = ROOT / "docs" / "quickstart.ipynb"
    assert file.stat().st_size < 400_000
    cells = code_cells(file)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [cell["outputs"] for cell in cells]
    texts = [
        "".join(text for one in some if one["output_type"] == "stream" for text in one["text"]) for some in outputs
    ]
    table = {words[0]: words for line in texts[0].splitlines() if len(words := line.split()) == 5}
    printed = {line.split()[0]: line.split()[2] for line in texts[-1].splitlines()}
    assert printed == {f"ap_{name.lower()}": table[name][3] for name in ("SSLD", "baseline", "random")}
    data = [one.get("data", {}) for some in outputs for one in some]
    images = [text for one in data for kind, text in one.items() if kind.startswith("image/")]
    for text, width in zip(images, (1760, 960), strict=True):
        with Image.open(io.BytesIO(base64.b64decode("".join(text)))) as image:
            assert image.width == width
            assert len(image.convert("RGB").resize((16, 8)).getcolors() or []) > 8
    assert not any(one["output_type"] == "error" for some in outputs for one in some)
    assert not re.search(r"(/home|/root|/tmp|/work)/", "".join(texts))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_timm_snippet(teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of docs/usage.md, with another file and arch in them."""
    (snippet,) = (block for block in python_blocks(ROOT / "docs" / "usage.md") if "import timm" in block)
    code = (
        snippet.replace("runs/mine/student.safetensors", str(teacher_file))
        .replace("resnet18d", "test_resnet")
        .replace("1000", "3")
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    expected = timm.create_model("test_resnet", num_classes=3)
    from safetensors.torch import load_file

    expected.load_state_dict(load_file(teacher_file))
    pixels = torch.rand(2, 3, 64, 64)
    assert torch.equal(scope["model"].eval()(pixels), expected.eval()(pixels))


def test_the_lines_of_python_print_the_detections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (code,) = python_blocks(ROOT / "README.md")
    file = re.search(r'"(runs/\S+\.safetensors)"', code)
    assert file
    write_coco(tmp_path / "train.json", tmp_path / "photos", 0)
    save_random_detector(tmp_path / file[1], "gfl", tmp_path / "train.json")
    shutil.copy(tmp_path / "photos" / "train_0.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code.replace('["photo.jpg"]', '["photo.jpg"], score_threshold=0.002'), {})
    printed = capsys.readouterr().out.splitlines()
    expected = load_detector(tmp_path / file[1]).predict([tmp_path / "photo.jpg"], score_threshold=0.002)[0]
    assert printed
    assert [line.split()[0] for line in printed] == expected.names
    assert [float(line.split()[1]) for line in printed] == [round(score, 2) for _, score, _ in expected]


def test_it_is_short_and_begins_with_what_a_newcomer_asks() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    words = [
        re.search(pattern, README)
        for pattern in (r"!\[", r"\*\*teacher\*\*", r"does not", r"git clone ", r"ssld init ")
    ]
    places = [word.start() for word in words if word]
    assert len(places) == len(words)
    assert places == sorted(places)
    commands_of_ones_own = README.split("## Your own images")[1].split("```python")[0]
    first = re.search(r"^ {4}(\S.*)$", commands_of_ones_own, flags=re.MULTILINE)
    assert first
    assert first[1].startswith("ssld init ")
    assert len(re.findall(r"^ {4}ssld ", commands_of_ones_own, flags=re.MULTILINE)) == 3


def test_images_are_small_and_each_has_its_command() -> None:
    """Images that the pages show are there, are small, and stand beside the command that made them."""
    folder = ROOT / "docs" / "images"
    about = (folder / "README.md").read_text(encoding="utf-8")
    files = sorted(file for file in folder.iterdir() if file.suffix in (".png", ".jpg", ".webp"))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    linked = {(page.parent / link).resolve() for page in pages for link in
              re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))}  # fmt: skip
    assert linked
    assert linked == {file.resolve() for file in files}
    assert [file.name for file in files if f"`{file.name}`" not in about] == []
    assert [file.name for file in files if file.stat().st_size > 200_000] == []
    assert sum(file.stat().st_size for file in files) < 1_000_000
