"""The grid of examples, as it is rendered for users."""

from pathlib import Path

import numpy as np
from PIL import Image

from ssld.stage1_ssld.curation.output import Example, Row, draw_examples


def test_names_with_signs_of_mathematics_are_drawn_as_they_are(drawn_figures: None, tmp_path: Path) -> None:
    """Between two $ matplotlib would read a formula, and stop at one that is none."""
    grey = np.full((8, 8, 3), 128, np.uint8)
    draw_examples(tmp_path / "a.png", [Row("a$b_$", [Example(grey, "1 $x_$")])], 1, title="$_$ and others")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size > (100, 100)
