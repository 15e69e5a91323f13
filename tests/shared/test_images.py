"""Decoding of every kind of file users have, errors that are always one class, and seeded views."""

import contextlib
import io
import pickle
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from ssld.shared.errors import UserError
from ssld.shared.files import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    files_digest,
    list_files,
    list_images,
    read_text,
    require_images,
)
from ssld.shared.images import (
    ImageHeader,
    UnreadableImage,
    crop_of,
    decode_image,
    image_header,
    image_headers,
    open_image,
    pixels_of,
    require_decoder,
    seeded_view,
    stable_seed,
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height: int = 9, width: int = 13) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 20, columns * 15, rows * columns], 2).astype(np.uint8))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact(kind: str) -> None:
    image = gradient()
    pixels = decode_image(encoded(image, kind))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 9, 13)
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(np.array(image)))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("GIF", {})])
def test_other_formats_decode_to_rgb(kind: str, options: dict) -> None:
    assert decode_image(encoded(gradient(), kind, **options)).shape == (3, 9, 13)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("CMYK", "JPEG"),
        ("YCbCr", "JPEG"),
        ("LAB", "TIFF"),
    ],
)
def test_modes(mode: str, kind: str) -> None:
    image = Image.new("LAB", (13, 9)) if mode == "LAB" else gradient().convert(mode)
    assert decode_image(encoded(image, kind)).shape == (3, 9, 13)


def test_grey_is_equal_in_all_channels() -> None:
    pixels = decode_image(encoded(Image.new("L", (4, 3), 77), "PNG"))
    assert torch.equal(pixels, torch.full((3, 3, 4), 77, dtype=torch.uint8))


def test_cmyk_jpeg_keeps_color() -> None:
    pixels = decode_image(encoded(Image.new("RGB", (8, 8), (200, 40, 60)).convert("CMYK"), "JPEG", quality=95))
    assert (pixels[:, 4, 4].int() - torch.tensor([200, 40, 60])).abs().max() <= 6


def test_palette_with_transparency_and_alpha() -> None:
    palette = gradient().convert("P")
    pixels = decode_image(encoded(palette, "PNG", transparency=bytes(range(256))))
    assert torch.equal(pixels, decode_image(encoded(palette, "PNG")))
    half = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert decode_image(encoded(half, "PNG"))[:, 0, 0].tolist() == [10, 20, 30]  # alpha dropped, not blended


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decode_image(encoded(Image.fromarray(values), kind))[0, 0].tolist() == [0, 1, 128, 255]
    assert decode_image(encoded(Image.fromarray(values.astype(np.int32)), "TIFF"))[0, 0].tolist() == [0, 1, 128, 255]
    floats = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    assert decode_image(encoded(Image.fromarray(floats), "TIFF"))[0, 0].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_white_is_that_of_the_bits_that_are_used(bits: int) -> None:
    full = 2**bits - 1
    for kind, values in (("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32), ("TIFF", np.float32)):
        image = Image.fromarray(np.array([[0, full // 2, full]], values))
        assert decode_image(encoded(image, kind))[0, 0].tolist() == [0, 127, 255], (kind, values)


def test_fractions_negative_values_and_more_than_sixteen_bits() -> None:
    for values, expected in (
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 0.25, 0.5], [0, 64, 128]),
        ([0.0, 1e6, 2e6], [0, 128, 255]),
        ([np.nan, -np.inf, np.inf], [0, 0, 0]),
        ([0.0, np.inf, 1.0], [0, 255, 255]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
    ):
        image = Image.fromarray(np.array([values], np.float32))
        assert decode_image(encoded(image, "TIFF"))[0, 0].tolist() == expected, values
    signed = Image.fromarray(np.array([[-1000, 0, 1000]], np.int32))
    assert decode_image(encoded(signed, "TIFF"))[0, 0].tolist() == [0, 128, 255]


def test_colors_of_sixteen_bits_that_would_be_black_are_refused() -> None:
    def deep(high: int) -> bytes:
        """A PNG of one pixel with 16 bits a channel."""
        row = zlib.compress(b"\0" + high.to_bytes(2, "big") * 3)
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)), (b"IDAT", row), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )

    assert decode_image(deep(65535)).flatten().tolist() == [255] * 3
    assert decode_image(deep(0)).flatten().tolist() == [0] * 3
    with pytest.raises(
        UnreadableImage, match=r"cannot read image a\.png: 16 bits a channel, of which 12 or fewer are used"
    ):
        decode_image(deep(4095), name="a.png")


def test_one_pixel() -> None:
    assert decode_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).flatten().tolist() == [1, 2, 3]


UPRIGHT: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1],
    lambda a: a.swapaxes(0, 1), lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).swapaxes(0, 1), lambda a: np.rot90(a),
]  # fmt: skip
"""of EXIF orientation 1, 2, ... 8"""


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored, upright = np.array(gradient()), UPRIGHT[orientation - 1](np.array(gradient()))
    data = encoded(gradient(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "image"
    path.write_bytes(data)
    for source in (data, path):
        assert np.array_equal(decode_image(source).permute(1, 2, 0).numpy(), upright)
        assert np.array_equal(decode_image(source, exif=False).permute(1, 2, 0).numpy(), stored)
        header = image_header(source)
        assert header == (9, 13, orientation)
        assert header.upright_size == upright.shape[:2]
    assert image_headers([str(path), str(tmp_path / "none")]) == [(9, 13, orientation), None]
    jpeg = encoded(gradient(), "JPEG", exif=exif)
    assert image_header(jpeg).upright_size == tuple(decode_image(jpeg).shape[1:]) == upright.shape[:2]


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_means_nothing_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), "PNG", exif=exif)
    assert image_header(data) == (9, 13, 1)
    assert torch.equal(decode_image(data), decode_image(encoded(gradient(), "PNG")))


def test_whether_an_image_is_turned_may_depend_on_its_header() -> None:
    data = encoded(gradient(), "PNG", exif=turned())
    assert torch.equal(decode_image(data, exif=lambda header: header.orientation == 6), decode_image(data))
    assert torch.equal(decode_image(data, exif=lambda header: header.width < 13), decode_image(data, exif=False))

    def refuse(header: ImageHeader) -> bool:
        raise UserError(f"{header.width}x{header.height}")

    with pytest.raises(UserError, match=r"^13x9$"):
        decode_image(data, exif=refuse)


def test_the_orientation_of_a_png_is_found_behind_its_pixels_and_without_decoding_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chunks(data: bytes) -> list[bytes]:
        segments, place = [], 8
        while place < len(data):
            end = place + 12 + int.from_bytes(data[place : place + 4])
            segments.append(data[place:end])
            place = end
        return segments

    data = encoded(gradient(), "PNG", exif=turned())
    parts = chunks(data)
    assert [part[4:8] for part in parts] == [b"IHDR", b"eXIf", b"IDAT", b"IEND"]
    behind = b"".join([data[:8], parts[0], parts[2], parts[1], parts[3]])
    assert image_header(behind) == (9, 13, 6)
    assert torch.equal(decode_image(behind), decode_image(data))
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # decodes
    assert image_header(encoded(gradient(), "PNG")) == (9, 13, 1)
    assert image_header(data) == (9, 13, 6)


def test_broken_exif_is_no_reason_to_drop_a_sound_picture() -> None:
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0garbage that is no tiff header")
    assert decode_image(data).shape == (3, 9, 13)


def test_unreadable_files(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        data = encoded(noise, kind)
        path = tmp_path / f"truncated.{kind.lower()}"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(UnreadableImage) as caught:
            decode_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    for data in (b"", b"not an image", encoded(noise, "PNG")[:30]):
        with pytest.raises(UnreadableImage):
            decode_image(data)
    with pytest.raises(UnreadableImage, match="No such file"):
        decode_image(tmp_path / "absent.jpg")
    with pytest.raises(UnreadableImage, match=r"row 7 of a\.parquet: not an image"):
        image_header(b"x", name="row 7 of a.parquet")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0\0\0\x1cftypavif\0\0\0\0mif1", "AVIF, damaged or of a kind that is not read: convert it to JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which is not read: convert it to JPEG"),
        (
            b"\0\0\0\x18ftypisom\0\0\0\0mp42isom",
            "a video, or a raw photo of a camera, which is not read: export it as JPEG",
        ),
        (bytes(128) + b"DICM\x02", "DICOM, which is not read: convert it to PNG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS: run git lfs pull"),
        (b"\n<!DOCTYPE html>", "a web page or a vector drawing, not an image of pixels"),
        (b"hello", "not an image, or of an unknown format"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    for source in (content, file, str(file)):
        with pytest.raises(UnreadableImage) as caught:
            decode_image(source)
        assert caught.value.reason == reason


def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = random.Random(0)
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"):
        data = encoded(gradient(), kind)
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(rng.randrange(1, 8)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            with contextlib.suppress(UnreadableImage):
                decode_image(bytes(broken))


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # between one and two times: PIL only warns
    assert decode_image(data).shape == (3, 100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="bomb"):
        decode_image(data)


def test_unreadable_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "truncated")))
    assert (error.name, error.reason) == ("a.jpg", "truncated")


def draws() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeded_view_seeds_all_three_and_restores_them() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded_view("a.jpg", 0, seed=5):
        first = draws()
    assert draws() == expected
    with seeded_view("a.jpg", 0, seed=5):
        assert draws() == first
    others = []
    for key, view, seed in [("b.jpg", 0, 5), ("a.jpg", 1, 5), ("a.jpg", 0, 6)]:
        with seeded_view(key, view, seed):
            others.append(draws())
    assert len({first, *others}) == 4
    before = random.getstate()
    with pytest.raises(RuntimeError), seeded_view("a", 0, 0):
        raise RuntimeError
    assert random.getstate() == before


def test_stable_seed_is_pinned() -> None:
    """The value may never change: stored soft labels and resumed runs rely on it."""
    assert stable_seed(0, "a", 1) == 7965780462979794708
    assert len({stable_seed(1, 23), stable_seed(12, 3), stable_seed("1", 23), stable_seed(123)}) == 4
    assert all(0 <= stable_seed(i) < 2**63 for i in range(100))


def test_list_images(tmp_path: Path) -> None:
    for name in (
        "b/2.JPG",
        "b/1.png",
        "a.jpeg",
        "z.WebP",
        "notes.txt",
        ".hidden.jpg",
        ".git/x.jpg",
        "b/deep/er/3.tiff",
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.png").write_bytes(b"x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "b" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert list_images(tmp_path / "in") == sorted(
        ["a.jpeg", "b/1.png", "b/2.JPG", "b/deep/er/3.tiff", "link/linked.png", "z.WebP"]
    )
    assert require_images(tmp_path / "in") == list_images(str(tmp_path / "in"))


def test_suffixes_of_images_and_videos(tmp_path: Path) -> None:
    """Suffixes of phones, browsers and cameras, in any case; a name is an image or a video, never both."""
    images = ["a.jfif", "a.JPE", "b.avif", "c.HEIC", "c.heif", "d.mpo", "e.j2k", "f.tga", "g.pbm"]
    videos = ["a.ts", "b.MTS", "c.3gp", "d.M2TS", "e.ogv", "f.qt"]
    for name in (*images, *videos, "notes.txt", "raw.dng", "ats", "jpg"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == sorted(images)
    assert list_files(tmp_path, VIDEO_SUFFIXES) == sorted(videos)
    assert not set(IMAGE_SUFFIXES) & set(VIDEO_SUFFIXES)
    every = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in every)
    assert len(set(every)) == len(every)


def test_require_images_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        require_images(tmp_path / "absent")
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(UserError, match="no images in"):
        require_images(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        require_images(tmp_path / "note.txt")


def test_digest_without_what_a_run_writes_into_its_input(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    before = files_digest(tmp_path, without=tmp_path / "out")
    for name in ("out", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "result.json").write_bytes(b"{}")
    assert (
        files_digest(tmp_path, without=tmp_path / "out") == before == files_digest(tmp_path, without=tmp_path / "out/")
    )
    assert files_digest(tmp_path, without=tmp_path.parent / "elsewhere") == files_digest(tmp_path) != before
    (tmp_path / "outside" / "b.jpg").write_bytes(b"b")
    assert files_digest(tmp_path, without=tmp_path / "out") != before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_read_by_its_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "list.txt").write_bytes("größe.jpg\n".encode(encoding))
    assert read_text(tmp_path / "list.txt") == "größe.jpg\n"


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("größe.jpg".encode("latin-1"))
    with pytest.raises(UserError, match=r"list\.txt: is not a UTF-8 text file \(byte 2\)"):
        read_text(tmp_path / "list.txt")
    with pytest.raises(UserError, match="No such file"):
        read_text(tmp_path / "absent.txt")


@pytest.mark.process
def test_files_module_needs_no_torch() -> None:
    code = "import sys, ssld.shared.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_crop_of_a_picture_is_a_slice_of_its_pixels() -> None:
    data = encoded(gradient(), "PNG")
    whole = decode_image(data)
    for image_or_pixels in (open_image(data), whole):
        crop = crop_of(image_or_pixels, 2, 3, 5, 7)
        assert torch.equal(crop, whole[:, 2:7, 3:10])
        assert crop.permute(1, 2, 0).is_contiguous()
        crop.zero_()  # memory of its own
    assert torch.equal(whole, decode_image(data))


def test_the_crop_of_a_turned_picture_is_cut_from_the_upright_one() -> None:
    data = encoded(gradient(), "JPEG", exif=turned())
    assert torch.equal(crop_of(open_image(data), 1, 2, 4, 5), decode_image(data)[:, 1:5, 2:7])


def test_a_decoder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    require_decoder("pil", "data.decoder")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=r"^data\.decoder: torchcodec cannot be imported .* set it to pil$"):
        require_decoder("torchcodec", "data.decoder")


def test_torchcodec_reads_jpegs_and_leaves_the_rest_to_pil(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that returns a constant: which files reach it, and what happens when it stumbles."""
    decoded: list[bytes] = []

    def decode_jpeg(source: bytes, *, mode: str) -> torch.Tensor:
        decoded.append(source)
        if len(decoded) > 2:
            raise RuntimeError("no")
        return torch.full((3, 9, 13), 7, dtype=torch.uint8)

    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(decode_jpeg=decode_jpeg))
    color, grey = encoded(gradient(), "JPEG"), encoded(gradient().convert("L"), "JPEG")
    for data in (color, grey):
        assert torch.equal(pixels_of(open_image(data, decoder="torchcodec")), torch.full((3, 9, 13), 7))
    others = [
        encoded(gradient(), "PNG"),
        encoded(gradient().convert("CMYK"), "JPEG"),
        encoded(gradient(), "JPEG", exif=turned()),
    ]
    for data in others:
        assert torch.equal(pixels_of(open_image(data, decoder="torchcodec")), decode_image(data))
    assert decoded == [color, grey]
    assert torch.equal(pixels_of(open_image(color, decoder="torchcodec")), decode_image(color))  # it stumbled
    with pytest.raises(UnreadableImage, match=r"truncated"):
        open_image(color[: len(color) - 40], decoder="torchcodec")


def test_torchcodec_and_pil_see_the_same_pixels() -> None:
    pytest.importorskip("torchcodec", reason="torchcodec is not installed")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}):
        for mode in ("RGB", "L"):
            data = encoded(image.convert(mode), "JPEG", **options)
            read = open_image(data, decoder="torchcodec")
            assert isinstance(read, torch.Tensor)
            assert torch.equal(read, decode_image(data))
