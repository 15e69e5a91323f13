"""The rules of the house, read from the syntax trees: who may import whom, and names that running scripts by path forbids."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shared", "stage1_ssld", "stage2_detect", "pipelines")
MAY_IMPORT = {
    "shared": {"shared"},
    "stage1_ssld": {"shared", "stage1_ssld"},
    "stage2_detect": {"shared", "stage2_detect"},
    "pipelines": {"shared", "pipelines"},
}
# Scripts and configurations that `--help`, the runner and the tab key wait for.
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
    "pipelines/run.py",
    "pipelines/report.py",
)
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def names_of(file: Path) -> list[tuple[str, bool]]:
    """(dotted module, whether imported at module level) of every import of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; scripts run by path need absolute ones"
            found.append((node.module or "", id(node) in top))
    return [(module.removeprefix("ssld."), top) for module, top in found]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_import_direction_and_names(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    for module, _ in names_of(file):
        parts = module.split(".")
        if parts[0] in PACKAGES and parts[0] not in MAY_IMPORT[package]:
            # The runner sees each stage's settings, and the command line dispatches to the entries, inside functions.
            dispatch = package == "pipelines" and (parts[-1].endswith("config") or file.name == "cli.py")
            assert dispatch, f"{file.name} imports {module}"
        if "models" in file.parts and file.name != "build.py":
            assert not module.startswith(("stage2_detect.config", "stage2_detect.coco", "stage2_detect.batches")), (
                module
            )
    assert file.stem not in sys.stdlib_module_names, (
        "a script's folder is first on the path: this name would hide a standard module"
    )
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500, "a file this long has two jobs"


def imports_torch(file: Path, seen: set[Path]) -> bool:
    """Whether importing a file imports torch, through our own modules too."""
    seen.add(file)
    for module, top in names_of(file):
        if not top:
            continue
        if module.split(".")[0] in ("torch", "torchvision", "timm", "accelerate"):
            return True
        inner = ROOT / (module.replace(".", "/") + ".py")
        if inner.exists() and inner not in seen and imports_torch(inner, seen):
            return True
    return False


@pytest.mark.parametrize("name", TORCH_FREE)
def test_stays_free_of_torch(name: str) -> None:
    assert not imports_torch(ROOT / name, set())


def test_entry_scripts_say_that_the_package_is_missing() -> None:
    """Run by path without the package installed, a script ends in one line instead of a traceback."""
    entries = [file for file in FILES if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")]
    assert len(entries) >= 7
    for file in entries:
        text = file.read_text(encoding="utf-8")
        assert text.index('if find_spec("ssld") is None:') < text.index("\nfrom ssld."), file
        assert "sys.exit(main())" in text, file
