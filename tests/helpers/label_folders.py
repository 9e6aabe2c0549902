"""COCO data written as folders of VOC, YOLO or LabelMe labels."""

import json
from collections.abc import Callable
from pathlib import Path


def voc(record: dict, objects: list[dict], names: dict[int, str]) -> tuple[str, str]:
    """A VOC file: corners are numbers of pixels, from 1 on."""
    found = []
    for each in objects:
        x, y, width, height = each["bbox"]
        sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
        found.append(
            f"<object><name>{names[each['category_id']]}</name>"
            f"<difficult>{each['iscrowd']}</difficult><bndbox>{box}</bndbox></object>"
        )
    size = f"<size><width>{record['width']}</width><height>{record['height']}</height></size>"
    head = f"<annotation>\n<filename>{record['file_name']}</filename>{size}\n"
    return ".xml", "\n".join([head, *found, "</annotation>"])


def yolo(record: dict, objects: list[dict], names: dict[int, str]) -> tuple[str, str]:
    """A YOLO file, with six decimals as most tools write them."""
    rows, order = [], sorted(names)
    for each in objects:
        (x, y, w, h), width, height = each["bbox"], record["width"], record["height"]
        row = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
        numbers = " ".join(f"{value:.6f}" for value in row)
        rows.append(f"{order.index(each['category_id'])} {numbers}\n")
    return ".txt", "".join(rows)


def labelme(record: dict, objects: list[dict], names: dict[int, str]) -> tuple[str, str]:
    """A LabelMe file, whose rectangles begin at any corner."""
    shapes = []
    for number, each in enumerate(objects):
        x, y, w, h = each["bbox"]
        points = [[x, y], [x + w, y + h]]
        shapes.append({
            "label": names[each["category_id"]], "shape_type": "rectangle",
            "points": points[:: -1 if number % 2 else 1], "group_id": None, "flags": {},
        })  # fmt: skip
    content = {"version": "5.4", "shapes": shapes, "imagePath": record["file_name"]}
    content |= {"imageData": None, "imageWidth": record["width"], "imageHeight": record["height"]}
    return ".json", json.dumps(content)


def write_labels(
    write: Callable[[dict, list[dict], dict[int, str]], tuple[str, str]], coco: dict, folder: Path
) -> None:
    """Writes a label file for each image of COCO data to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    for record in coco["images"]:
        objects = [each for each in coco["annotations"] if each["image_id"] == record["id"]]
        suffix, text = write(record, objects, names)
        (folder / Path(record["file_name"]).with_suffix(suffix).name).write_text(text)
