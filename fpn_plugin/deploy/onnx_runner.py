"""Detect objects with model.onnx and model.json. It needs numpy, Pillow and onnxruntime only.

Example: python onnx_runner.py photo.jpg
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class OnnxDetector:
    """The detector in a folder that ``fpn-plugin export`` has written."""

    def __init__(self, folder: str | Path) -> None:
        self.about = json.loads(Path(folder, "model.json").read_text(encoding="utf-8"))
        self.session = onnxruntime.InferenceSession(
            str(Path(folder, "model.onnx")), providers=["CPUExecutionProvider"]
        )

    def __call__(self, image: Image.Image) -> list[dict]:
        """Detections, best first, boxes x1 y1 x2 y2 in pixels of the image as it is shown."""
        order, size = self.about["channel_order"], self.about["input_size"]
        image = ImageOps.exif_transpose(image).convert("RGB" if order == "BGR" else order)
        full = np.array(image.size)
        sides = full * (size["shorter_side"] or full.min()) / full.min()  # 0: not resized
        if size["shorter_side"] and sides.max() > size["longer_side_at_most"]:
            sides *= size["longer_side_at_most"] / sides.max()
        width, height = resized = (sides + 0.5).astype(int)
        pixels = np.atleast_3d(image.resize((width, height), Image.Resampling.BILINEAR))
        pixels = pixels[:, :, ::-1] if order == "BGR" else pixels
        # Mean and deviation are not applied here: the model does that.
        padded = (1, len(self.about["mean"]), max(height, 64), max(width, 64))
        images, sizes = np.zeros(padded, np.float32), np.array([[height, width]])
        images[..., :height, :width] = pixels.transpose(2, 0, 1)
        found = self.session.run(["boxes", "scores", "classes"], {"images": images, "sizes": sizes})
        boxes = (found[0] * np.tile(full / resized, 2)).clip(0, np.tile(full, 2))
        names = dict(enumerate(self.about["classes"]))
        return [
            {"class": names.get(int(c), int(c)), "score": float(score), "box": box.tolist()}
            for box, score, c in zip(boxes, *found[1:], strict=True)
            if (box[2:] > box[:2]).all()
        ]


if __name__ == "__main__":
    detector = OnnxDetector(Path(__file__).parent)
    for path in sys.argv[1:]:
        print(json.dumps({"file": path, "detections": detector(Image.open(path))}, indent=1))
