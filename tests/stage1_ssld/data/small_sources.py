"""Small image sources for tests: folders, tar files and Parquet of 4 x 4 pixels; opened, refused, or read as a stream."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssld.shared.errors import UserError
from ssld.stage1_ssld.data.labels import labeled_classes
from ssld.stage1_ssld.data.shards import count_samples, source_shards
from ssld.stage1_ssld.data.sources import ImageSource, open_sources
from ssld.stage1_ssld.data_config import SourceConfig


def png(value: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, *names: str) -> Path:
    """Images of these names, each in its own grey."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    return folder


def pack(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """Write a tar file of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def source(path: Any, **settings: Any) -> ImageSource:
    return open_sources([SourceConfig(path=str(path), **settings)], "data.train")[0]


def refusal(path: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        source(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unlabeled_because(images: ImageSource) -> str:
    """Why labels cannot be read, which is an error only where they are."""
    assert images.labels is None
    with pytest.raises(UserError) as caught:
        labeled_classes([images])
    return str(caught.value)


def streamed(path: Any, **settings: Any) -> list[str]:
    """Names of the images as a stream gives them."""
    shards = source_shards(SourceConfig(path=str(path), **settings), 0, streaming=True)
    names = [sample.name for shard in shards for sample in shard.samples()]
    assert sum(count_samples(shard) for shard in shards) == len(names)
    return names


def labeled_parquet(path: Path, names: list[str] | None, labels: list[int], kind: Any = None) -> None:
    table = pa.table({"image": [png(n) for n in range(len(labels))], "label": pa.array(labels, kind or pa.int64())})
    if names:
        feature = f'{{"info": {{"features": {{"label": {{"names": {names}, "_type": "ClassLabel"}}}}}}}}'.replace(
            "'", '"'
        )
        table = table.replace_schema_metadata({"huggingface": feature})
    pq.write_table(table, path)
