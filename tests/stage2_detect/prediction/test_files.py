"""Files of a prediction: names that come from outside and may contain anything."""

import csv
import io
from typing import Any

import pytest

from ssld.stage2_detect.prediction.files import table_text

NAMES = ["plain.png", "a\rb.png", "a\nb.png", "a\r\nb.png", 'a "b", c.png', "\r", "é, \x1b.png"]


@pytest.mark.parametrize("frames", [False, True])
def test_a_table_is_read_back_whatever_the_names_contain(frames: bool) -> None:
    place = {"frame": 4, "seconds": 0.5} if frames else {}
    content: dict[str, Any] = {
        "categories": [{"id": number, "name": f"of {name}"} for number, name in enumerate(NAMES)],
        "images": [{"id": number, "file_name": name, **place} for number, name in enumerate(NAMES)],
        "annotations": [
            {"image_id": number, "category_id": number, "score": 0.5, "bbox": [1.5, 2.0, 3.0, 4.0]}
            for number in range(len(NAMES))
        ],
    }
    if frames:
        content["videos"] = []
    text = table_text(content)
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert header == ["file_name", "class", "score", "x", "y", "width", "height", *place]
    assert rows == [
        [name, f"of {name}", "0.5", "1.5", "2.0", "3.0", "4.0", *map(str, place.values())] for name in NAMES
    ]
    end = ",4,0.5\n" if frames else "\n"
    assert text.split("\n", 2)[1] + "\n" == f"plain.png,of plain.png,0.5,1.5,2.0,3.0,4.0{end}"
