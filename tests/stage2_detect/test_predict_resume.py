"""predict.py: where a killed run goes on, two processes, and what it shows meanwhile."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_files import content

from ssld.stage2_detect import predict
from ssld.stage2_detect.prediction import steps
from ssld.stage2_detect.prediction.files import Parts
from ssld.stage2_detect.prediction.video_file import VideoFile

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., int]
Error = Callable[..., str]


def test_a_killed_run_goes_on(
    call: Call, predict_line: Any, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssld.stage2_detect.prediction.files._PART", 4)
    assert call(predict.main, predict_line(output="whole")) == 0
    write = Parts.write
    written: list[int] = []

    def killed(self: Parts, number: int, *args: Any) -> None:
        if len(written) == 2:
            raise SystemExit
        written.append(number)
        write(self, number, *args)

    monkeypatch.setattr(Parts, "write", killed)
    with pytest.raises(SystemExit):
        call(predict.main, predict_line())
    run = tmp_path / "predicted"
    assert not (run / "predictions.json").exists()
    assert sorted(path.name for path in (run / "parts").glob("*.json")) == ["000000.json", "000001.json"]
    run_folder: list[int] = []

    def counted(self: Parts, number: int, *args: Any) -> None:
        run_folder.append(number)
        write(self, number, *args)

    monkeypatch.setattr(Parts, "write", counted)
    assert call(predict.main, predict_line()) == 0
    assert run_folder == [2]
    assert (run / "predictions.json").read_bytes() == (tmp_path / "whole" / "predictions.json").read_bytes()
    assert not (run / "parts").exists()


def test_a_run_begun_on_other_pictures_is_refused(
    call: Call, user_error: Error, predict_line: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern is not watched for changes; its images are compared with those of the parts that are there."""
    pattern = f"{photos}/*.png"

    def killed(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(steps, "assemble", killed)
        with pytest.raises(SystemExit):
            call(predict.main, predict_line(images=pattern))
    shutil.copy(photos / "5.png", photos / "55.png")
    assert "was started on other images" in user_error(predict.main, predict_line(images=pattern))


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace("1", "2", 3)])
def test_a_damaged_part_is_made_again(
    call: Call,
    predict_line: Any,
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[str], str],
) -> None:
    """Cut short, or with other digits, which still are JSON."""
    monkeypatch.setattr("ssld.stage2_detect.prediction.files._PART", 4)
    assert call(predict.main, predict_line(output="whole")) == 0

    def killed(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(steps, "assemble", killed)
        with pytest.raises(SystemExit):
            call(predict.main, predict_line())
    part = tmp_path / "predicted" / "parts" / "000001.json"
    part.write_text(damage(part.read_text()))
    assert call(predict.main, predict_line()) == 0
    assert f"{part.relative_to(tmp_path)}: does not match its checksum; recomputing it" in capsys.readouterr().out
    one, two = ((tmp_path / name / "predictions.json").read_bytes() for name in ("whole", "predicted"))
    assert one == two


@pytest.mark.slow
def test_two_processes_write_the_same_file(
    scripts: Any, call: Call, predict_line: Any, photos: Path, tmp_path: Path
) -> None:
    with VideoFile(photos / "clip.mp4", 64, 64, 10) as video:
        for number in range(3):
            video.add(np.array(Image.open(photos / f"{number}.png").convert("RGB")), number / 10)
    assert call(predict.main, predict_line("--batch_size", "2")) == 0
    code = "import ssld.stage2_detect.prediction.files as files, ssld.stage2_detect.predict as predict, sys; files._PART = 4; "
    code += "sys.exit(predict.main(sys.argv[1:]))"
    script = tmp_path / "small_parts.py"
    script.write_text(f"import sys; {code}")
    done = scripts.run(str(script), *predict_line("--batch_size", "2", output="two"), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ((tmp_path / name / "predictions.json").read_bytes() for name in ("predicted", "two"))
    assert one == two
    log = (tmp_path / "two" / "log.txt").read_text()
    assert "part 1 of 3 done, 1 left: " in log  # the main process had two of them
    assert "per second, " in log
    assert content(tmp_path / "two" / "predictions.json")["videos"]
    assert (tmp_path / "two" / "pictures" / "clip.mp4").exists()
