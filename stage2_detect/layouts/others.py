"""Data sets of other tools that are not read, recognized by their content to say which export to choose. Does not import torch.

Sources: labelstud.io/guide/export, docs.cvat.ai/docs/dataset_management/formats, github.com/wkentaro/labelme, robots.ox.ac.uk/~vgg/software/via,
docs.supervisely.com, docs.voxel51.com, github.com/microsoft/VoTT, docs.labelbox.com, docs.aws.amazon.com/sagemaker,
open-edge-platform.github.io/datumaro.
"""

from collections.abc import Iterator
from pathlib import Path

from ssld.shared.files import ARCHIVES, is_hidden

LABELME_KEYS = (b'"shapes"', b'"imagePath"')
"""keys that every file of LabelMe has"""
_HEAD = 1 << 16
"""bytes of a file that are looked at"""
_MOST = 50
"""files of a folder that are looked at"""
IMAGE_FOLDER_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""names, in lower case, of the files with the rows of Hugging Face's image folders"""
_TOOLS = (
    (
        LABELME_KEYS,
        "LabelMe's JSON, one file per image; give the folder by --data, or convert it by `ssld convert-data`",
    ),
    ((b'"_via_',), "VIA's project; export the annotations as COCO"),
    ((b'"regions"', b'"shape_attributes"'), "VIA's JSON; export the annotations as COCO"),
    ((b'"classTitle"', b'"geometryType"'), "Supervisely's JSON; export it as COCO"),
    ((b'"rectanglelabels"',), "Label Studio's JSON; export it as COCO or YOLO with images"),
    ((b'"polygonlabels"',), "Label Studio's JSON; export it as COCO with images"),
    ((b'"sample_fields"',), "FiftyOne's own format; export it as COCODetectionDataset"),
    ((b'"coordinates"', b'"annotations"', b'"label"'), "CreateML's JSON; export the annotations as COCO"),
    ((b'"asset"', b'"regions"', b'"boundingBox"'), "VoTT's JSON; export the annotations as Pascal VOC"),
    ((b'"items"', b'"label_id"'), "Datumaro's own JSON; export it as COCO"),
    ((b'"source-ref"',), "a manifest of SageMaker Ground Truth; write COCO JSON from it"),
    ((b'"data_row"',), "Labelbox's export; write COCO JSON from it"),
    ((b"<annotations>", b"<image "), "CVAT's own XML; export it as COCO 1.0"),
)
"""texts in the beginning of a file, and what it is"""


def other_tool(path: Path) -> str | None:
    """Return what a file, or a file in a folder, is, with the advice for it: `zip/a.json is LabelMe's JSON, ...`; None for anything unknown.

    COCO's file of keypoints is named in a folder alone: given itself, its boxes are read, and its mistakes are those of any COCO file.
    """
    for file in _files(path):
        try:
            with file.open("rb") as opened:
                head = opened.read(_HEAD)
        except OSError:
            continue
        name = file.name if file == path else file.relative_to(path)
        if head.startswith(tuple(ARCHIVES)):
            return f"{name} is packed; unpack it"
        if file.name.lower() in IMAGE_FOLDER_FILES:
            return f"{name} is of an image folder of Hugging Face; give its folder by --data, or convert it by `ssld convert-data`"
        if file != path and file.name.lower().startswith("person_keypoints"):
            return f"{name} is COCO's file of keypoints, which are not read; give the file itself to read its boxes"
        for texts, what in _TOOLS:
            if all(text in head for text in texts):
                return f"{name} is {what}"
        if file.suffix.lower() in (".csv", ".tsv"):
            return f"{name} is a table, whose columns have no fixed meaning; write COCO JSON or YOLO from it"
    return None


def _files(path: Path) -> Iterator[Path]:
    """Yield a file, or the first files in and below a folder that may describe a data set."""
    if not path.is_dir():
        yield path
        return
    suffixes = (".json", ".jsonl", ".ndjson", ".manifest", ".xml", ".csv", ".tsv", ".zip", ".gz", ".7z", ".rar")
    left = _MOST
    for pattern in ("*", "*/*", "*/*/*"):
        for file in sorted(path.glob(pattern)):
            if file.suffix.lower() in suffixes and not is_hidden(file.relative_to(path).as_posix()) and file.is_file():
                yield file
                left -= 1
            if not left:
                return
