"""Whole runs over difficult and unreadable images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssld.stage1_ssld.distill import main as distill


def test_odd_images_go_through_a_training_run(arguments: Any, distill_settings: Any, call: Any, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 29, 3), dtype=np.uint8))
    for mode, suffix in (("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("LA", "png"), ("P", "gif"), ("1", "png")):
        noise.convert(mode).save(folder / f"{mode}.{suffix}")
    noise.resize((1, 1)).save(folder / "dot.png")
    noise.resize((300, 1)).save(folder / "line.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif)
    data = {"train": [str(folder)], "val": str(folder), "image_size": 32}
    assert call(distill, arguments(distill_settings | {"data": data})) == 0
    assert not (tmp_path / "run" / "quarantine.txt").exists()
    assert "on 9 images" in (tmp_path / "run" / "log.txt").read_text()


def broken_folder(folder: Path, count: int, broken: int, jpeg: Any) -> str:
    folder.mkdir()
    for number in range(count):
        content = jpeg(seed=number % 4)
        (folder / f"{number:03d}.jpg").write_bytes(content[: 300 if number < broken else None])
    return str(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_truncated_image_is_skipped_and_listed(
    workers: int, arguments: Any, distill_settings: Any, call: Any, tmp_path: Path, jpeg: Any
) -> None:
    data = {"train": [broken_folder(tmp_path / "f", 12, 1, jpeg)], "image_size": 32}
    assert call(distill, arguments(distill_settings | {"data": data, "workers": workers})) == 0
    run = tmp_path / "run"
    assert (run / "quarantine.txt").read_text() == f"{tmp_path}/f/000.jpg\n"
    assert "1 unreadable image, see" in (run / "log.txt").read_text()


def test_too_many_truncated_images_end_the_run(
    arguments: Any, distill_settings: Any, user_error: Any, tmp_path: Path, jpeg: Any
) -> None:
    data = {"train": [broken_folder(tmp_path / "f", 12, 3, jpeg)], "image_size": 32}
    line = user_error(distill, arguments(distill_settings | {"data": data}))
    assert "3 of 12 images cannot be read, listed in" in line
    assert len((tmp_path / "run" / "quarantine.txt").read_text().splitlines()) == 3
    assert not (tmp_path / "run" / "student.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_truncated_images(
    workers: int, arguments: Any, distill_settings: Any, user_error: Any, tmp_path: Path, jpeg: Any
) -> None:
    data = {"train": [broken_folder(tmp_path / "f", 8, 8, jpeg)], "image_size": 32}
    line = user_error(distill, arguments(distill_settings | {"data": data, "workers": workers}))
    assert "f/" in line
    assert line.endswith("and the images after it are all unreadable; fix or remove them")


def test_the_list_survives_a_kill(
    arguments: Any, distill_settings: Any, call: Any, tmp_path: Path, jpeg: Any, monkeypatch: Any
) -> None:
    """Met before the checkpoint, not logged before the kill: the list of the resumed run still has it."""
    from ssld.shared.training.loss_watch import LossWatch

    data = {"train": [broken_folder(tmp_path / "f", 9, 1, jpeg)], "image_size": 32}
    settings = distill_settings | {"data": data, "steps": 5, "log_every": 50, "save_every": 2}
    add, calls = LossWatch.add, []

    def killed(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise SystemError
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LossWatch, "add", killed)
        with pytest.raises(SystemError):
            call(distill, arguments(settings))
    assert (tmp_path / "run" / "quarantine.txt").read_text() == f"{tmp_path}/f/000.jpg\n"
