"""The tables of docs/architecture.md, rooms and imports, checked against the code's syntax trees."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("shared", "stage1_ssld", "stage2_detect", "pipelines")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
LONGEST = 500
# package -> most things (files and folders) that its folder may list, and most arrows between them
GOALS = {"stage1_ssld": (16, 40), "stage2_detect": (27, 94)}
# Scripts and settings that `--help`, the runner and the completion import.
TORCH_FREE = (
    "shared/config/settings.py",
    "shared/config/training.py",
    "shared/run_dir.py",
    "shared/files.py",
    "shared/errors.py",
    "stage1_ssld/config.py",
    "stage1_ssld/distill.py",
    "stage1_ssld/teach.py",
    "stage2_detect/config.py",
    "stage2_detect/predict_config.py",
    "stage2_detect/export_config.py",
    "stage2_detect/train.py",
    "pipelines/run.py",
    "pipelines/report.py",
)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def imports_of(file: Path) -> tuple[tuple[str, bool], ...]:
    """(dotted name, whether it is imported at module level) of every import of a file that runs; those for the type checker alone are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    imports = []
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            imports += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import; scripts that are run by path need absolute ones"
            imports += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return tuple(imports)


def own_module(name: str) -> Path | None:
    """The file of a dotted name below `ssld`: a module, or something in it; None for a name of another library."""
    parts = name.split(".")
    if parts[0] != "ssld":
        return None
    for length in (len(parts), len(parts) - 1):
        file = ROOT.joinpath(*parts[1:length]).with_suffix(".py") if length > 1 else ROOT / "ssld/__init__.py"
        if file.is_file():
            return file
    package = ROOT.joinpath(*parts[1:], "__init__.py")
    return package if package.is_file() else None


def own_imports(file: Path) -> Iterator[Path]:
    yield from {module for name, _ in imports_of(file) if (module := own_module(name)) and module != file}


def rooms(package: str) -> list[list[str]]:
    """The rooms of a package in the order of the page's table, each as the paths that its first column names."""
    section = re.search(rf"^### `{package}/`\n(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert section, f"docs/architecture.md has no section ### `{package}/`"
    rows = re.findall(r"^\| (`.*?) \|", section[1], flags=re.MULTILINE)
    return [[f"{package}/{path}" for path in re.findall(r"`([^`]+)`", row)] for row in rows]


@cache
def room_of(file: Path) -> int:
    """Place of a file's room in its package's table: the longest path that fits."""
    name = name_of(file)
    fitting = [
        (len(path), number)
        for number, paths in enumerate(rooms(name.split("/")[0]))
        for path in paths
        if name == path or (path.endswith("/") and name.startswith(path))
    ]
    assert fitting, f"{name}: no room in docs/architecture.md names it"
    return max(fitting)[1]


def test_every_room_of_the_page_is_there() -> None:
    for package in PACKAGES:
        paths = [path for row in rooms(package) for path in row]
        assert len(set(paths)) == len(paths)
        assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_is_in_a_room_and_imports_downward(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    if file.name == "__init__.py":
        return
    room = room_of(file)
    for name, _ in imports_of(file):
        assert name.split(".")[0] not in PACKAGES, f"{name}: imports begin with ssld."
    for module in own_imports(file):
        other = module.relative_to(ROOT).parts[0]
        if module.name == "__init__.py":
            continue
        if other == package:
            assert room_of(module) <= room, f"{name_of(module)} stands above {name_of(file)} in docs/architecture.md"
        elif other != "shared":
            # The runner reads each stage's settings; the command line starts the entries by name.
            assert package == "pipelines", f"{name_of(module)} is of another package"
            assert module.name.endswith("config.py"), f"{name_of(module)}: pipelines/ imports settings alone"


@pytest.mark.parametrize("file", [file for file in FILES if "stage2_detect/models/" in name_of(file)], ids=name_of)
def test_models_see_neither_files_nor_settings(file: Path) -> None:
    """Detectors are modules for any program; `build.py` alone makes them from settings."""
    allowed = (
        "shared/",
        "stage2_detect/models/",
        *(["stage2_detect/model_config.py"] if file.name == "build.py" else []),
    )
    assert [name_of(module) for module in own_imports(file) if not name_of(module).startswith(allowed)] == []


def test_no_circle() -> None:
    """Modules in an order in which each imports only earlier ones."""
    waiting = {file: set(own_imports(file)) for file in FILES}
    while ready := {file for file, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {file: needs for file, needs in waiting.items() if file not in ready}
    assert [name_of(file) for file in waiting] == [], "these modules import each other in a circle, or one that does"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_what_a_folder_lists(package: str) -> None:
    arrows = set()
    things = set()
    for file in FILES:
        parts = file.relative_to(ROOT).parts
        if parts[0] != package or file.name == "__init__.py":
            continue
        things.add(parts[1])
        targets = (module.relative_to(ROOT).parts for module in own_imports(file) if module.name != "__init__.py")
        arrows |= {(parts[1], target[1]) for target in targets if target[0] == package and target[1] != parts[1]}
    waiting = {thing: {end for begin, end in arrows if begin == thing} for thing in things}
    while ready := {thing for thing, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {thing: needs for thing, needs in waiting.items() if thing not in ready}
    assert sorted(waiting) == []
    if package in GOALS:
        assert len(things) <= GOALS[package][0]
        assert len(arrows) <= GOALS[package][1]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_is_described_and_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    assert first.rstrip().endswith((".", ":", "?")), "a module begins with a sentence that describes it"
    assert len(text.splitlines()) <= LONGEST


def test_files_of_tests_are_short() -> None:
    files = (ROOT / "tests").rglob("*.py")
    assert [name_of(file) for file in files if len(file.read_text(encoding="utf-8").splitlines()) > LONGEST] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_names_beside_a_script_hide_no_library(package: str) -> None:
    """Run by path, a script's own folder is first on the path: its files and folders must not be named like something that libraries import."""
    taken = set(sys.stdlib_module_names) | (set(packages_distributions()) - {"ssld"})
    assert {path.stem for path in (ROOT / package).iterdir()} & taken == set()


def test_one_import_name() -> None:
    """The package is a folder of links, so the installation uses no other name."""
    links = {path.name: path.readlink().as_posix() for path in (ROOT / "ssld").iterdir() if path.is_symlink()}
    assert links == {package: f"../{package}" for package in PACKAGES}


def imports_torch(file: Path, visited: set[Path]) -> bool:
    """Whether importing a file imports torch, through our own modules too."""
    visited.add(file)
    for name, top in imports_of(file):
        if not top:
            continue
        if name.split(".")[0] in ("torch", "torchvision", "timm", "accelerate"):
            return True
        inner = own_module(name)
        if inner and inner not in visited and imports_torch(inner, visited):
            return True
    return False


@pytest.mark.parametrize("name", TORCH_FREE)
def test_stays_free_of_torch(name: str) -> None:
    assert not imports_torch(ROOT / name, set())


def test_entry_scripts_say_that_the_package_is_missing() -> None:
    """Run by path without the package installed, a script ends in one line instead of a traceback."""
    entries = [
        file
        for file in FILES
        if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8") and any(own_imports(file))
    ]
    assert len(entries) >= 15
    for file in entries:
        text = file.read_text(encoding="utf-8")
        assert text.index('if find_spec("ssld") is None:') < text.index("\nfrom ssld."), file
        assert "sys.exit(main())" in text, file
