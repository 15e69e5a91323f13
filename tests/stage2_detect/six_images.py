"""A COCO file of six images, which a test damages."""

from typing import Any

Content = dict[str, Any]


def content() -> Content:
    """Six images; of `wide` there are six boxes, of `tall` three, and one crowd."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 64, "height": 48} for number in range(1, 7)]
    boxes: list[Content] = [
        {"id": number, "image_id": 1 + number % 6, "category_id": 1 + (number % 3 == 0), "bbox": [4, 5, 30, 20], "area": 600, "iscrowd": 0}
        for number in range(1, 10)
    ]  # fmt: skip
    boxes.append({"id": 10, "image_id": 2, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1})
    for row in boxes:
        x, y, width, height = row["bbox"]
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    categories = [{"id": 1, "name": "wide"}, {"id": 2, "name": "tall"}]
    return {"images": images, "annotations": boxes, "categories": categories}
