"""Shared fixtures: tiny drawn images, a tiny teacher, commands in this process and in their own, and the folder of the real data."""

import gc
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ssld.shared.run_dir import SPEED

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("disc", "ring", "stripes")
# One thread and no network, in this process and in those it starts.
QUIET = {
    "OMP_NUM_THREADS": os.environ.get("SSLD_TEST_THREADS", "1"),
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
os.environ.update(QUIET)
# Imported modules stay in memory to the end. Python's garbage collector would search them repeatedly, in a fifth of the time of collecting the tests.
gc.disable()


def pytest_collection_finish() -> None:
    """Let Python's collector see what the tests make, and not what was imported for them."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as `process` that use a fixture that starts processes; others are marked by hand. Long files go first, then those with a long test.

    A long file that starts last leaves the other workers without work.
    """
    for item in items:
        if {"forking_python", "tab"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.process)
    with_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not _is_long(item), item.path not in with_slow))


def _is_long(item: pytest.Item) -> bool:
    """Whether the file of a test is marked `slow` as a whole."""
    module = item.getparent(pytest.Module)
    return module is not None and any(mark.name == "slow" for mark in module.own_markers)


@pytest.fixture(scope="session", autouse=True)
def full_savefig() -> Iterator[Any]:
    """matplotlib's own `Figure.savefig`, in whose place figures are sketched (sketches.py)."""
    from matplotlib.figure import Figure

    from tests import sketches

    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        sketches.install(patch.setattr)
        yield save


@pytest.fixture
def drawn_figures(full_savefig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out and rendered, as for users."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_savefig)


def draw(kind: str, seed: int, size: tuple[int, int] = (40, 44)) -> Image.Image:
    """Draw a noisy image of one kind of shape in a random color; `size` is (height, width)."""
    generator = np.random.default_rng([seed, CLASSES.index(kind) if kind in CLASSES else 9])
    rows, columns = np.mgrid[: size[0], : size[1]]
    away = np.hypot(rows - size[0] / 2, columns - size[1] / 2)
    mask = {"disc": away < 12, "ring": abs(away - 12) < 4, "stripes": rows // 4 % 2 == 0}.get(kind, rows > columns)
    pixels = np.where(mask[..., None], generator.integers(120, 256, 3), generator.integers(0, 120, 3))
    return Image.fromarray((pixels + generator.integers(-15, 16, pixels.shape)).clip(0, 255).astype(np.uint8))


def save_images(folder: Path, kind: str, count: int, seed: int, suffix: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw(kind, seed + number).save(folder / f"{kind}_{number:03d}.{suffix}")


@dataclass(frozen=True)
class TinyData:
    """Folders of drawn images: three classes of 10 (train) and 5 (val), 12 unlabeled nested ones; and Parquet of the 30 training images."""

    train: Path
    val: Path
    unlabeled: Path
    parquet: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    import datasets

    folder = tmp_path_factory.mktemp("tiny")
    rows: list[dict[str, Any]] = []
    for label, kind in enumerate(CLASSES):
        save_images(folder / "train" / kind, kind, 10, seed=0)
        save_images(folder / "val" / kind, kind, 5, seed=1000)
        save_images(folder / "unlabeled" / "deeper" / kind[:2], kind, 4, seed=2000)
        for number in range(10):
            rows.append({"image": draw(kind, number), "label": label, "id": 100 + len(rows)})
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)), id=datasets.Value("int64")
    )
    save_images(folder / "unlabeled", "other", 2, seed=3000)
    columns = {key: [row[key] for row in rows] for key in ("image", "label", "id")}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return TinyData(folder / "train", folder / "val", folder / "unlabeled", folder / "train.parquet")


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone file of `test_resnet` with three classes: random weights whose soft labels are far from uniform."""
    import timm
    import torch

    from ssld.shared.models.backbones import input_settings, save_backbone

    torch.manual_seed(7)
    net: Any = timm.create_model("test_resnet", num_classes=3)
    with torch.no_grad():
        net.get_classifier().weight.mul_(100)
        images = [np.array(draw(kind, seed).resize((32, 32))) for kind in CLASSES for seed in range(10)]
        pixels_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        net.get_classifier().bias.sub_(net.eval()(pixels_BCHW).mean(0))  # no class wins for every image
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    facts: dict[str, Any] = {
        "class_names": list(CLASSES),
        "licence": "apache-2.0",
        "step": 12,
        "metrics": {"top1": 0.5},
    }
    save_backbone(path, net, arch="test_resnet", inputs=input_settings(net, {}), classes=3, **facts)
    return path


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A function from a data set's name to its folder; the test skips where it is absent."""
    root = Path(os.environ.get("SSLD_TEST_DATA") or ROOT.parent / "shared" / "data")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"{name} is not in {root}; set SSLD_TEST_DATA to the folder that holds it")
        return root / name

    return folder


@pytest.fixture
def distill_settings(tiny: TinyData, teacher_file: Path) -> dict[str, Any]:
    """Settings of a small distillation without `output`: 6 steps of 8 images at 32 px, LayerNorm student."""
    return {
        "threads": 1,
        "workers": 0,
        "device": "cpu",
        "steps": 6,
        "batch_size": 8,
        "save_every": 4,
        "log_every": 2,
        "data": {"train": [str(tiny.train), str(tiny.unlabeled)], "val": str(tiny.val), "image_size": 32},
        "student": {"model": "random:test_convnext"},
        "teacher": {"model": str(teacher_file)},
        "optim": {"lr": 0.02, "reference_batch": 8, "warmup_steps": 2},
    }


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes settings to a YAML file and returns the command line that uses it; `output` is a name below the test's folder."""

    def write(settings: dict[str, Any], output: str = "run", *flags: str) -> list[str]:
        file = tmp_path / f"{output}.yaml"
        file.write_text(yaml.safe_dump(settings | {"output": str(tmp_path / output)}), encoding="utf-8")
        return ["--config", str(file), *flags]

    return write


Main = Callable[[list[str]], int]


@pytest.fixture(scope="session")
def call() -> Callable[[Main, list[str]], int]:
    """Runs an entry's `main(argv)` in this process and returns its exit code."""

    def run(main: Main, argv: list[str]) -> int:
        # Accelerate keeps one state a Python process, and refuses another precision in it.
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        return main(argv)

    return run


@pytest.fixture
def user_error(call: Callable[[Main, list[str]], int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an entry's `main(argv)`, which must fail with exit code 2 and one line; returns the line without its prefix."""

    def run(main: Main, argv: list[str]) -> str:
        capsys.readouterr()
        assert call(main, argv) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


class Scripts:
    """Starts entry scripts as users do: real processes, one thread each."""

    def __init__(self, python: Path) -> None:
        self._python = python

    def start(
        self, *command: str, ranks: int = 1, new_python: bool = False, **environment: str
    ) -> "subprocess.Popen[str]":
        """`command` is the script below the project's root and its flags; several ranks go through torch's launcher.

        With `new_python` in an interpreter that imports everything, as at a user's; else in a fork of one that has (forking.py).
        """
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        script = [str(ROOT / command[0]), *command[1:]]
        python = sys.executable if new_python else str(self._python)
        line = [python, "-W", "ignore", *(launcher if ranks > 1 else []), *script]
        env = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))
        }
        return subprocess.Popen(
            line,
            env=env | QUIET | environment,
            cwd=ROOT.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, *command: str, ranks: int = 1, new_python: bool = False, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Start and wait."""
        process = self.start(*command, ranks=ranks, new_python=new_python, **environment)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def forking_python() -> Iterator[Path]:
    """A file to start in place of the interpreter: its processes have imported everything (forking.py)."""
    from tests.forking import Server

    with closing(Server()) as server:
        yield server.python


@pytest.fixture(scope="session")
def scripts(forking_python: Path) -> Scripts:
    return Scripts(forking_python)


@pytest.fixture(scope="session")
def files_below() -> Callable[[Path], set[str]]:
    """Relative paths of all files in a folder, without the checksums beside them."""

    def list_files(folder: Path) -> set[str]:
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {name for name in names if name.removesuffix(".sha256") not in names - {name}}

    return list_files


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], list[dict[str, Any]]]:
    """A run's metrics without the values that depend on the clock."""

    def read(run: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]

    return read


@pytest.fixture
def on_one_and_two(
    call: Callable[[Main, list[str]], int],
    scripts: Scripts,
    arguments: Callable[..., list[str]],
    metrics_of: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> Callable[[Main, str, dict[str, Any]], tuple[str, list[dict[str, Any]]]]:
    """Runs an entry in float64 by its `main` here (output `one`) and by its script on two ranks (`two`), whose metrics must be the same.

    Returns the output of the two ranks, and the metrics.
    """
    from tests.float64 import in_float64

    def run(main: Main, script: str, settings: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        with in_float64():
            assert call(main, arguments(settings, "one")) == 0
        process = scripts.run("tests/float64.py", script, *arguments(settings, "two"), ranks=2)
        assert process.returncode == 0, process.stderr
        one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
        assert [line.keys() for line in one] == [line.keys() for line in two]
        for a, b in zip(one, two, strict=True):
            for name, value in a.items():
                assert b[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), (name, a, b)
        return process.stdout, one

    return run


@pytest.fixture(scope="session")
def jpeg() -> Callable[..., bytes]:
    """A drawn image as JPEG bytes."""

    def encode(kind: str = "disc", seed: int = 0, mode: str = "RGB") -> bytes:
        buffer = io.BytesIO()
        draw(kind, seed).convert(mode).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    return encode


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], list[int]]:
    """A device on which a network runs out of memory above a number of training images; returns the list of the batch sizes that it met."""
    import torch

    forwards: dict[Any, Any] = {}

    def limit(network: Any, most: int) -> list[int]:
        sizes: list[int] = []
        forward = forwards.setdefault(network, network.forward)

        def limited(self: Any, pixels_BCHW: Any) -> Any:
            if self.training:
                sizes.append(len(pixels_BCHW))
                if len(pixels_BCHW) > most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
            return forward(self, pixels_BCHW)

        monkeypatch.setattr(network, "forward", limited)
        return sizes

    return limit
