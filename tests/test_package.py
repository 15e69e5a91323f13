"""The installed package and the scripts that are started by path: from one tree, or refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.process


def started(script: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, check=False, cwd=script.parents[1]
    )


@pytest.mark.parametrize(
    "name", ["pipelines/run.py", "pipelines/cli.py", "pipelines/init.py", "stage1_ssld/export.py", "stage2_detect/check_data.py"]
)  # fmt: skip
def test_a_script_of_another_copy_is_refused(name: str, tmp_path: Path) -> None:
    """Also before its imports, which the installed modules may not have any more."""
    script = tmp_path / name
    script.parent.mkdir()
    shutil.copy(ROOT / name, script)
    (tmp_path / "ssld").mkdir()
    shutil.copy(ROOT / "ssld" / "__init__.py", tmp_path / "ssld")
    text = script.read_text(encoding="utf-8")
    script.write_text(text.replace("\nfrom ssld.shared", "\nfrom ssld.shared.gone import it\nfrom ssld.shared", 1))
    done = started(script, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {script}: belongs to {tmp_path}, but the package ssld that is installed is that of {ROOT}; "
        f"run pip install -e . in {tmp_path}\n"
    )


def test_a_link_to_the_tree_and_scripts_of_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "project").symlink_to(ROOT)
    done = started(tmp_path / "project" / "pipelines" / "run.py", "--help")
    assert done.returncode == 0, done.stderr
    for name in ("mine/run.py", "pipelines/run.py", "shared/files.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import ssld.shared.errors\nprint('well')\n")
        done = started(tmp_path / name)
        assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr


def test_a_copy_without_its_links_says_so(tmp_path: Path) -> None:
    """As some programs unpack an archive: a file with the link's target in place of a folder."""
    (tmp_path / "ssld").mkdir()
    shutil.copy(ROOT / "ssld" / "__init__.py", tmp_path / "ssld")
    (tmp_path / "ssld" / "shared").write_text("../shared")
    line = [sys.executable, "-c", "import ssld"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path / 'ssld'}: the links in this folder are missing; clone with git, or unpack with tar or unzip, "
        "on Linux, macOS or WSL\n"
    )
