"""Videos: frames and their times, turned recordings, prediction on them, and the drawn video."""

import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import content

from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage
from ssld.stage2_detect import predict
from ssld.stage2_detect.data.loaders import ahead
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.prediction.video import VideoDetections, VideoParts
from ssld.stage2_detect.prediction.video_file import Frame, VideoFile, is_video, read_frames

Line = Callable[..., list[str]]
SECONDS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4]  # a frame is missing in the middle


@pytest.fixture
def clip(tiny_coco: Any, tmp_path: Path) -> Path:
    """The 12 training scenes as frames."""
    file = tmp_path / "clips" / "clip.mp4"
    file.parent.mkdir()
    with VideoFile(file, 64, 64, 10) as video:
        for number, seconds in enumerate(SECONDS):
            video.add(np.array(Image.open(tiny_coco.train_images / f"{number}.png").convert("RGB")), seconds)
    return file


@pytest.fixture
def line(detector_file: Path, tmp_path: Path) -> Line:
    def flags(images: Path, output: str, *more: str) -> list[str]:
        visible = ["--model", str(detector_file), "--images", str(images), "--output", str(tmp_path / output)]
        return [*visible, "--threads", "1", "--workers", "0", "--device", "cpu", "--score_threshold", "0.3", *more]

    return flags


def ramp(number: int, width: int, height: int) -> np.ndarray:
    """A smooth image that codecs keep, lighter with each number; its corners differ."""
    x, y = np.meshgrid(np.linspace(0, 100, width), np.linspace(0, 60, height))
    return np.repeat((x + y + 8 * number)[:, :, None], 3, 2).astype(np.uint8)


# ---- files


@pytest.mark.parametrize(("width", "height"), [(64, 48), (65, 49)])
def test_frames_and_their_times_come_back(tmp_path: Path, width: int, height: int) -> None:
    file = tmp_path / "a.mp4"
    with VideoFile(file, width, height, 25) as video:
        for number, seconds in enumerate(SECONDS):
            video.add(ramp(number, width, height), seconds)
    frames = list(read_frames(str(file)))
    assert [frame.number for frame in frames] == list(range(12))
    np.testing.assert_allclose([frame.seconds for frame in frames], SECONDS, atol=1e-4)
    for frame in frames:
        assert frame.pixels_HWC.shape == (height + height % 2, width + width % 2, 3)
        expected = ramp(frame.number, width, height).astype(float)
        assert np.abs(frame.pixels_HWC[:height, :width] - expected).mean() < 3


def turned(file: Path, a: int, b: int, c: int, d: int) -> Path:
    """A copy whose track header turns it in players: the matrix of ISO/IEC 14496-12, section 8.3.2."""
    data = bytearray(file.read_bytes())
    start = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags; times, id, duration; reserved, layer, volume
    one = 1 << 16
    struct.pack_into(">9i", data, start, a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    other = file.with_name(f"turned_{a}{b}{c}{d}.mp4")
    other.write_bytes(data)
    return other


@pytest.mark.parametrize(
    ("matrix", "quarters"), [((1, 0, 0, 1), 0), ((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
)
def test_a_phones_recording_is_turned_upright(tmp_path: Path, matrix: tuple[int, int, int, int], quarters: int) -> None:
    """The matrix takes (x, y) of the stored image to (a x + c y, b x + d y), y down: (0, 1, -1, 0) is clockwise."""
    file = tmp_path / "a.mp4"
    with VideoFile(file, 64, 48, 25) as video:
        for number in range(3):
            video.add(ramp(number, 64, 48), number / 25)
    stored = [frame.pixels_HWC for frame in read_frames(str(file))]
    visible = [frame.pixels_HWC for frame in read_frames(str(turned(file, *matrix)))]
    for one, other in zip(stored, visible, strict=True):
        np.testing.assert_array_equal(other, np.rot90(one, quarters))


def test_what_counts_as_a_video(tmp_path: Path) -> None:
    photos = [Image.fromarray(ramp(number, 32, 24)) for number in range(4)]
    photos[0].save(tmp_path / "moves.gif", save_all=True, append_images=photos[1:], duration=120)
    photos[0].save(tmp_path / "still.gif")
    (tmp_path / "bad.gif").write_bytes(b"nothing")
    kinds = {name: is_video(str(tmp_path / name)) for name in ("moves.gif", "still.gif", "bad.gif", "a.MP4", "a.jpg")}
    assert kinds == {"moves.gif": True, "still.gif": False, "bad.gif": False, "a.MP4": True, "a.jpg": False}
    frames = list(read_frames(str(tmp_path / "moves.gif")))
    np.testing.assert_allclose([frame.seconds for frame in frames], [0, 0.12, 0.24, 0.36])


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    with pytest.raises(UnreadableImage, match=r"bad\.mp4"):
        list(read_frames(str(tmp_path / "bad.mp4")))


def test_one_item_is_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number
        raise OSError("at the end")

    outputs = ahead(items())
    assert [next(outputs) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="at the end"):
        next(outputs)
    assert made == [0, 1, 2, 3]


# ---- prediction


def test_a_video_is_predicted_as_its_frames(
    call: Callable[..., int], line: Line, clip: Path, tmp_path: Path, files_below: Callable[[Path], set[str]]
) -> None:
    assert call(predict.main, line(clip, "predicted", "--write", "json,images,csv,yolo,crops")) == 0
    (tmp_path / "frames").mkdir()
    for frame in read_frames(str(clip)):
        Image.fromarray(frame.pixels_HWC).save(tmp_path / "frames" / f"{frame.number:06d}.png")
    assert call(predict.main, line(tmp_path / "frames", "alone", "--write", "json,crops")) == 0
    detected, alone = (content(tmp_path / name / "predictions.json") for name in ("predicted", "alone"))
    assert detected["annotations"] == alone["annotations"] != []
    assert detected["videos"] == [
        {"id": 1, "file_name": "clip.mp4", "frames": 12, "width": 64, "height": 64, "frames_per_second": 7.857}
    ]
    assert [image["frame"] for image in detected["images"]] == list(range(12))
    np.testing.assert_allclose([image["seconds"] for image in detected["images"]], SECONDS, atol=1e-4)
    assert detected["images"][7]["file_name"] == "clip.mp4/000007.jpg"
    assert {image["video_id"] for image in detected["images"]} == {1}
    # tables, labels and crops, by frame
    run = tmp_path / "predicted"
    rows = (run / "predictions.csv").read_text().splitlines()
    assert rows[0] == "file_name,class,score,x,y,width,height,frame,seconds"
    assert len(rows) == 1 + len(detected["annotations"])
    assert (run / "labels" / "clip.mp4" / "000011.txt").exists()
    crops = {name.replace("clip.mp4/", "") for name in files_below(run / "crops")}
    assert crops == files_below(tmp_path / "alone" / "crops") != set()
    # the drawn video
    drawn = list(read_frames(str(run / "pictures" / "clip.mp4")))
    np.testing.assert_allclose([frame.seconds for frame in drawn], SECONDS, atol=1e-4)
    number = detected["annotations"][0]["image_id"] - 1
    boxes = [row for row in detected["annotations"] if row["image_id"] == number + 1]
    xywh_N4 = torch.tensor([row["bbox"] for row in boxes])
    detections = Detections(
        torch.cat([xywh_N4[:, :2], xywh_N4[:, :2] + xywh_N4[:, 2:]], 1),
        torch.tensor([row["score"] for row in boxes]),
        torch.tensor([{3: 0, 7: 1}[row["category_id"]] for row in boxes]),
    )
    expected = draw_objects(Image.open(tmp_path / "frames" / f"{number:06d}.png"), detections, ["wide", "tall"])
    difference = np.abs(np.asarray(expected, dtype=float) - drawn[number].pixels_HWC)
    assert difference.mean() < 5
    assert np.abs(np.asarray(expected, dtype=float) - drawn[number - 1].pixels_HWC).mean() > 10
    # tiles and views
    assert call(predict.main, line(clip, "tiled", "--tile", "64", "--write", "json")) == 0
    assert content(tmp_path / "tiled" / "predictions.json")["annotations"] == detected["annotations"]
    assert call(predict.main, line(clip, "tta", "--tile", "48", "--tta.flip", "true", "--write", "json")) == 0
    assert content(tmp_path / "tta" / "predictions.json")["annotations"] != detected["annotations"]


def test_pictures_and_videos_in_a_folder(
    call: Callable[..., int], line: Line, clip: Path, tiny_coco: Any, tmp_path: Path
) -> None:
    Image.open(tiny_coco.train_images / "0.png").save(clip.parent / "a.png")
    (clip.parent / "bad.mp4").write_bytes(b"no video at all")
    data = clip.read_bytes()
    (clip.parent / "short.mkv").write_bytes(data[: len(data) // 3])  # the index of an MP4 is at its end
    assert call(predict.main, line(clip.parent, "predicted")) == 0
    run = tmp_path / "predicted"
    detected = content(run / "predictions.json")
    assert [image["id"] for image in detected["images"]] == list(range(1, 14))
    assert detected["images"][0]["file_name"] == "a.png"
    assert "video_id" not in detected["images"][0]
    assert [video["file_name"] for video in detected["videos"]] == ["clip.mp4"]
    assert (run / "quarantine.txt").read_text() == "bad.mp4\nshort.mkv\n"
    log = (run / "log.txt").read_text()
    assert "1 image and 3 videos below" in log
    assert "bad.mp4: decoding stopped early: Invalid data" in log
    assert {path.name for path in (run / "pictures").iterdir()} == {"a.jpg", "clip.mp4"}
    metrics = content(run / "result.json")["metrics"]
    assert (metrics["pictures"], metrics["videos"], metrics["unreadable"]) == (1, 3, 2)


def test_a_video_that_breaks_off_is_kept_as_far_as_it_goes(
    call: Callable[..., int], line: Line, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> Iterator[Frame]:
        for frame in read_frames(path):
            if frame.number == 7:
                raise UnreadableImage(path, "no more")
            yield frame

    monkeypatch.setattr("ssld.stage2_detect.prediction.video.read_frames", broken)
    assert call(predict.main, line(clip, "predicted")) == 0
    run = tmp_path / "predicted"
    assert "clip.mp4: decoding stopped early: no more" in (run / "log.txt").read_text()
    assert len(content(run / "predictions.json")["images"]) == 7
    assert len(list(read_frames(str(run / "pictures" / "clip.mp4")))) == 7


def test_a_killed_run_begins_a_video_again_and_keeps_the_finished_ones(
    call: Callable[..., int], line: Line, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(clip, clip.with_name("other.mp4"))
    assert call(predict.main, line(clip.parent, "whole")) == 0
    write = VideoParts.write
    read: list[str] = []

    def killed(self: VideoParts, name: str, *rest: Any) -> None:
        if name == "other.mp4":
            raise SystemExit
        write(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(VideoParts, "write", killed)
        with pytest.raises(SystemExit):
            call(predict.main, line(clip.parent, "predicted"))
    run = tmp_path / "predicted"
    assert {path.name for path in (run / "parts").iterdir()} == {"video_000000.json", "video_000000.json.sha256"}

    def counted(path: str) -> Iterator[Frame]:
        read.append(Path(path).name)
        return read_frames(path)

    with monkeypatch.context() as patch:
        patch.setattr("ssld.stage2_detect.prediction.video.read_frames", counted)
        assert call(predict.main, line(clip.parent, "predicted")) == 0
    assert read == ["other.mp4", "clip.mp4", "other.mp4"]  # detected in; both drawn
    one, two = ((tmp_path / name / "predictions.json").read_bytes() for name in ("predicted", "whole"))
    assert one == two
    assert not (run / "parts").exists()


def test_a_part_of_another_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    VideoParts(tmp_path / "run" / "parts", "videos", ["a.mp4"]).write("a.mp4", VideoDetections([1]), "")
    assert VideoParts(tmp_path / "run" / "parts", "videos", ["a.mp4", "b.mp4"]).left() == ["b.mp4"]
    with pytest.raises(UserError, match=r"run: was started on other videos than `images` holds now"):
        VideoParts(tmp_path / "run" / "parts", "videos", ["b.mp4"]).left()


def test_masks_on_a_video(call: Callable[..., int], line: Line, clip: Path, mask_file: Path, tmp_path: Path) -> None:
    flags = line(clip, "predicted", "--model", str(mask_file), "--score_threshold", "0.1")
    assert call(predict.main, flags) == 0
    rows = content(tmp_path / "predicted" / "predictions.json")["annotations"]
    assert rows, "lower the threshold"
    assert all(row["segmentation"]["size"] == [64, 64] for row in rows)
    assert len(list(read_frames(str(tmp_path / "predicted" / "pictures" / "clip.mp4")))) == 12


def test_mistakes(
    user_error: Callable[..., str], line: Line, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = user_error(predict.main, line(clip, "pseudo", "--pseudo_labels", "true"))
    assert "clip.mp4: is a video, and training takes images" in message
    (clip.parent / "only").mkdir()
    (clip.parent / "only" / "bad.mp4").write_bytes(b"no video at all")
    message = user_error(predict.main, line(clip.parent / "only", "none"))
    assert message == f"nothing can be read in 1 file of {clip.parent / 'only'}; the first is bad.mp4"
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    message = user_error(predict.main, line(clip, "without"))
    assert "clip.mp4: is a video, and PyAV, which reads them, is not installed: pip install 'av>=18'" in message
    assert not (tmp_path / "without").exists()


def test_three_lines_take_frames(clip: Path, detector_file: Path) -> None:
    frames = [frame.pixels_HWC for frame in read_frames(str(clip))]
    objects = load_detector(detector_file).predict(frames, score_threshold=0.3)
    assert len(objects) == 12
    assert sum(map(len, objects)) > 0
