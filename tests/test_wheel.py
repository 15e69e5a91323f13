"""The wheel: nothing but `ssld`, complete, and a pipeline runs from it in an environment without the repository."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.docs_sandbox import write_coco

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("pipelines", "shared", "stage1_ssld", "stage2_detect")
FOREIGN = "raise ImportError('this package belongs to another project')\n"

pytestmark = [pytest.mark.slow, pytest.mark.process]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that has to succeed, in an environment without the settings of this one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "PIP_"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept | {"PYTHONNOUSERSITE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def pip(*words: str | Path, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *words, cwd=cwd)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Paths of the project's files, as git has them."""
    if find_spec("pip") is None:
        pytest.skip("pip is not installed")
    try:
        return run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    except (OSError, AssertionError):
        pytest.skip("not a git repository: which files belong to the project is not known")


@pytest.fixture(scope="module")
def source(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's files, and no others: building leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def wheel_of(source: Path, folder: Path) -> Path:
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(source, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, tracked: list[str]) -> None:
    own = {name for name in tracked if name.split("/")[0] in PARTS and (ROOT / name).exists()}
    assert names_in(wheel) == {"ssld/__init__.py", "ssld/__main__.py", "ssld/py.typed"} | {
        f"ssld/{name}" for name in own
    }
    with zipfile.ZipFile(wheel) as archive:
        linked = archive.read("ssld/pipelines/run.py")  # a link's text would be a few letters
    assert linked == (ROOT / "pipelines" / "run.py").read_bytes()


def test_the_source_archive_makes_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-W", "ignore", "-c", code, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter="data")
    (unpacked,) = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    assert not (unpacked / "tests").exists()
    (tmp_path / "again").mkdir()
    assert names_in(wheel_of(unpacked, tmp_path / "again")) == names_in(wheel)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(an environment with the wheel, a working folder): both have packages of others with our folders' names."""
    place = tmp_path_factory.mktemp("installed")
    environment, working_folder = place / "environment", place / "working_folder"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=place)
    python = environment / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    (packages,) = environment.glob("lib/python*/site-packages")
    # The dependencies of this environment; as .pth files in there are not read, ssld itself is not among them.
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in sys.path if "site-packages" in path))
    for folder in (packages, working_folder):
        for name in PARTS:
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text(FOREIGN)
    (working_folder / "pipelines" / "toy_data.py").write_text(FOREIGN)
    assert Path(run(python, "-c", "import ssld; print(ssld.__file__)", cwd=working_folder).strip()).is_relative_to(
        packages
    )
    return environment / "bin" / "ssld", working_folder


def test_a_pipeline_runs_from_the_wheel(installed: tuple[Path, Path]) -> None:
    """The shipped quickstart, one stage of each command; beside packages with our folders' names, and from a folder that has them too."""
    command, working_folder = installed
    (shipped,) = command.parents[1].glob("lib/python*/site-packages/ssld/pipelines/quickstart.yaml")
    pipeline = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    stages, names = pipeline["stages"], [*pipeline["stages"]]
    for name in [name for name, stage in stages.items() if "like" in stage]:
        del stages[name]
    stages["ap_baseline"]["set"]["model"] = "${detector_ssld}/detector.safetensors"
    del pipeline["table"]
    (working_folder / "short.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False), encoding="utf-8")
    plan = run(command, "run", "quickstart", "--smoke", "--dry-run", cwd=working_folder)
    assert [name for name in names if name not in plan] == []
    out = run(command, "run", "short.yaml", "--smoke", "--output", "out", cwd=working_folder, OMP_NUM_THREADS="1")
    assert "[6/6] report: " in out
    assert str(ROOT) not in out
    assert (working_folder / "out" / "report" / "report.html").is_file()
    assert {path.name for path in working_folder.iterdir()} == {*PARTS, "out", "short.yaml"}


def test_from_photos_to_a_detector(installed: tuple[Path, Path], tmp_path: Path) -> None:
    """`init` with a real trial, `run`, `predict` and `report`, all from another folder than the pipeline's, which the last run starts from; the time
    that `init` told is that of the dry run."""
    command, _ = installed
    folder = tmp_path / "photos of mine"
    write_coco(tmp_path / "all.json", folder, 0, count=12)
    quiet = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    words: list[str | Path] = [
        "--images",
        folder,
        "--annotations",
        "all.json",
        "--backbone",
        "random:test_resnet",
        "--starts",
        "random",
        "--minutes",
        "600",
    ]
    told = run(command, "init", *words, "--output", "my/mine.yaml", cwd=tmp_path, **quiet)
    assert "trial of detector: 3 steps" in told
    planned = run(command, "run", "my/mine.yaml", "--dry-run", cwd=tmp_path, **quiet)
    time = re.search(r"  detector +(about [^;]+);", told)
    assert time
    assert f"; {time[1]}; " in planned
    shorter = ["--stages.detector.steps", "2", "--stages.detector.evaluate_every", "null"]
    out = run(command, "run", "my/mine.yaml", *shorter, cwd=tmp_path, **quiet)
    assert "results: my/runs/mine, my/runs/mine/report/report.html\n" in out
    again = run(command, "run", "mine.yaml", *shorter, cwd=tmp_path / "my", **quiet)
    assert again.count(": finished earlier\n") == 3
    model, photo = tmp_path / "my/runs/mine/detector/detector.safetensors", next(folder.iterdir())
    run(command, "predict", "--model", model, "--images", photo, "--output", "found", cwd=tmp_path, **quiet)
    assert (tmp_path / "found" / "predictions.json").is_file()
    (tmp_path / "my/runs/mine/report/report.html").unlink()
    run(command, "report", "--runs", "my/runs/mine", cwd=tmp_path, **quiet)
    assert "<html" in (tmp_path / "my/runs/mine/report/report.html").read_text()
