"""benchmarks/gpu.py: a row that fails or hangs does not stop the next, the page has the outcome of each, and every command runs on the CPU."""

import re
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu

ABOUT = {"device": "cuda", "name": "NVIDIA Z9 PCIe", "versions": "torch 9.9"}
SCRIPTS = {
    "good": "print('a / b' + ' ' * 60 + '0.500  (0.400 to 0.600)'); print('chatter')",
    "bad": "print('half', flush=True); raise SystemExit('error: no such thing')",
    "hangs": "import time; print('begun', flush=True); time.sleep(600)",
}
RUN_ELSEWHERE = ("compile", "memory", "faster", "mask", "retinanet", "ld", "distill")
ROWS = [gpu.Row(name, "<= 0.5 | or so", ["-c", script], 60) for name, script in SCRIPTS.items()]


def test_a_row_that_fails_or_hangs_is_reported(tmp_path: Path) -> None:
    begun = time.monotonic()
    good, bad, hangs = (
        gpu.run(row, tmp_path, 2.0 if row.name == "hangs" else 60.0, {"PATH": "/usr/bin"}) for row in ROWS
    )
    assert time.monotonic() - begun < 100
    assert (good.ended, good.lines) == ("ran", [f"a / b{' ' * 60}0.500  (0.400 to 0.600)"])
    assert (bad.ended, bad.lines) == ("failed", ["error: no such thing"])
    assert (hangs.ended, hangs.lines) == ("out of time", ["begun"])
    text = gpu.page([good, bad, hangs], [gpu.Row("late", "none", [], 1)], ABOUT, "python benchmarks/gpu.py", tiny=False)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[2] == f"| good | ran | {good.seconds:.0f} | <= 0.5 \\| or so | a / b 0.500 (0.400 to 0.600) |"
    assert table[3].startswith("| bad | failed |")
    assert table[-1] == "| late | not run: no time was left | - | none | - |"
    assert text.count("```text") == 3
    assert "error: no such thing" in text
    assert "**Run" not in text
    assert "**Run on the CPU at the smallest size" in gpu.page([good], [], ABOUT | {"device": "cpu"}, "", tiny=True)


def test_a_row_says_what_it_did_not_do(tmp_path: Path) -> None:
    scaler = gpu.Row("fp16", "", ["-c", "print('wrote x')", "--precision", "bf16"], 60, gpu.TRAINING, "wrote .*")
    skipped, passed = (
        gpu.Row("tests", "", ["-c", f"print('{text}')"], 60, ".*(passed|skipped).*", ".*(passed|skipped).*")
        for text in ("2 skipped in 1 s", "1 passed, 1 skipped in 1 s")
    )
    outcomes = [gpu.run(row, tmp_path, 60.0, {"PATH": "/usr/bin"}) for row in (scaler, skipped, passed)]
    assert [one.ended for one in outcomes] == ["ran (bf16, no scaler)", "all skipped", "ran"]
    table = [line.split("|")[-2] for line in gpu.page(outcomes, [], ABOUT, "", tiny=False).splitlines() if "| " in line]
    assert table[-3:] == [" wrote x ", " 2 skipped in 1 s ", " 1 passed, 1 skipped in 1 s "]


def test_the_page_has_the_command_without_its_output() -> None:
    assert gpu.without_output(["--images", "/photos", "--output", "x", "--tiny"]) == ["--images", "/photos", "--tiny"]
    assert gpu.without_output(["--output=x", "--rows", "ld"]) == ["--rows", "ld"]


def test_rows_fit_their_time_and_name_files_that_are_there(tmp_path: Path) -> None:
    for tiny in (True, False):
        rows = gpu.rows(tmp_path, tmp_path, tiny=tiny, gpu=not tiny)
        assert sum(row.seconds for row in rows) <= 590  # of the budget of 600; drawing the data takes seconds
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            scripts = [word for word in row.line if word.endswith(".py")]
            assert scripts
            assert all((gpu.ROOT / script).is_file() for script in scripts)
            assert 0 < row.seconds <= 120
            re.compile(row.shows)
            re.compile(row.cell)


def test_mistakes_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "about", lambda _: ABOUT | {"device": "cpu"})
    for line, message in (
        (["--tiny"], "torch finds no GPU here"),
        (["--device", "cpu", "--rows", "slower"], "--rows: slower: no such row; there are doctor, auto_batch"),
    ):
        with pytest.raises(SystemExit, match="2"):
            gpu.main([*line, "--output", str(tmp_path)])
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_row_runs_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], forking_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those that other tests run: by their lines (test_benchmarks.py, test_dense_benchmark.py), compiling, and the measurement of memory."""
    monkeypatch.setattr(sys, "executable", str(forking_python))
    names = [row.name for row in gpu.rows(tmp_path, tmp_path, tiny=True, gpu=False)]
    chosen = [name for name in names if name not in RUN_ELSEWHERE]
    line = ["--device", "cpu", "--tiny", "--budget", "1200", "--output", str(tmp_path), "--rows", *chosen]
    assert gpu.main(line) == 0, capsys.readouterr().out
    (file,) = tmp_path.glob("gpu_cpu_*.md")
    text = file.read_text(encoding="utf-8")
    assert "**Run on the CPU at the smallest size" in text
    assert re.findall(r"^\| (\w+) \| ([^|]+) \|", text, re.MULTILINE) == [
        ("row", "outcome"),
        *((name, {"fp16": "ran (bf16, no scaler)", "tests": "all skipped"}.get(name, "ran")) for name in chosen),
    ]
    assert "see below" not in text
    for expected in ("waits not reported by a CPU", "20 images in", "wrote "):
        assert expected in text
