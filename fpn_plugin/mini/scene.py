"""One image of the mini dataset: photograph, panels, discs and digits, drawn from a seed.

Two groups of categories need two properties of a pyramid. A *digit* is recognised by its own pixels
and has any size from 10 to 150 px. A *disc* is 12 to 22 px wide and looks the same in each of its
four categories, which differ in the outline of the panel around it, 120 to 220 px wide. The finest
level shows its class only if coarser levels are added to it.

Other kinds of images have only digits, of other sizes or shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["CATEGORIES", "IMAGE_SIZE", "KINDS", "Scene", "SceneKind", "SceneObject", "draw_scene"]

IMAGE_SIZE = 256  # pixels, both sides
PANEL_SHAPES = ("circle", "square", "triangle", "diamond")
CATEGORIES = tuple(
    [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)]
    + [
        {"id": 11 + i, "name": f"disc in {shape}", "supercategory": "disc"}
        for i, shape in enumerate(PANEL_SHAPES)
    ]
)

_PANEL_PX = (120.0, 220.0)
_PAIRED_PANEL_PX = (120.0, 124.0)  # two of them fit side by side
_DISC_PX = (12.0, 22.0)
_DISC_CLEARANCE_PX = 4.0  # between a disc and its panel's outline
_MOST_OVERLAP = 0.05  # of the smaller of two boxes
_ATTEMPTS = 40
_SUPERSAMPLE = 2  # shapes are drawn at twice the size and averaged down, for smooth edges

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class SceneKind:
    """What the images of one mini dataset show. Ranges are (least, largest)."""

    digit_px: tuple[float, float]  # square root of a digit's area, log-uniform
    digits: tuple[int, int]  # how many are tried in an image
    # By which a digit's width over its height, or the reverse, is multiplied; log-uniform.
    stretch: tuple[float, float] = (1.0, 1.0)
    panels: bool = False  # with discs

    @property
    def categories(self) -> list[dict[str, object]]:
        """The COCO categories: without panels, only digits."""
        return [c for c in CATEGORIES if self.panels or c["supercategory"] == "digit"]


KINDS = {
    "": SceneKind((10.0, 150.0), (4, 9), panels=True),
    "small": SceneKind((4.0, 24.0), (8, 20)),
    "large": SceneKind((100.0, 240.0), (1, 3)),
    "thin": SceneKind((10.0, 60.0), (4, 9), stretch=(4.0, 10.0)),
}


@dataclass
class SceneObject:
    """A labelled object: ``mask`` is bool ``(IMAGE_SIZE, IMAGE_SIZE)``, its visible pixels."""

    category_id: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """``(x, y, width, height)`` in pixels, tight around the visible pixels."""
        ys, xs = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        return int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)


@dataclass
class Stamp:
    """Opacity, float32 in [0, 1], of a shape whose upper left pixel is ``(x, y)``."""

    alpha: np.ndarray
    x: int
    y: int

    @property
    def window(self) -> tuple[slice, slice]:
        """The image's rows and columns that the stamp covers."""
        height, width = self.alpha.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)


@dataclass
class Scene:
    """An image and its labelled objects."""

    image: np.ndarray  # uint8 RGB (IMAGE_SIZE, IMAGE_SIZE, 3)
    objects: list[SceneObject] = field(default_factory=list)
    taken: list[Box] = field(default_factory=list)  # boxes that later objects do not overlap

    def paint(self, stamp: Stamp, color: np.ndarray) -> None:
        """Blends a colour, float32 ``(3,)`` in 0-255, into the image by the stamp's opacity."""
        under = self.image[stamp.window].astype(np.float32)
        self.image[stamp.window] = np.rint(under + (color - under) * stamp.alpha[..., None])

    def add(self, category_id: int, stamp: Stamp, color: np.ndarray, box: Box) -> None:
        """Paints an object and labels it; earlier objects lose the pixels that it covers."""
        self.paint(stamp, color)
        mask = np.zeros(self.image.shape[:2], bool)
        mask[stamp.window] = stamp.alpha >= 0.5
        for earlier in self.objects:
            earlier.mask &= ~mask
        self.objects.append(SceneObject(category_id, mask))
        self.taken.append(box)

    def has_room(self, box: Box) -> bool:
        """Whether a box overlaps each taken box by at most 5% of the smaller of the two."""
        for other in self.taken:
            width = min(box[2], other[2]) - max(box[0], other[0])
            height = min(box[3], other[3]) - max(box[1], other[1])
            smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
            if width > 0 and height > 0 and width * height > _MOST_OVERLAP * smaller:
                return False
        return True


def draw_scene(seed: int, split: str, index: int, kind: str = "") -> Scene:
    """Draws image ``index`` of a split; the same arguments give the same pixels.

    Args:
        seed: the dataset's seed.
        split: ``"train"`` or ``"val"``, which share no handwritten digit and no part of a
            photograph.
        index: of the image.
        kind: of :data:`KINDS`.
    """
    entropy = [seed, ("train", "val").index(split), index]
    rng = np.random.default_rng([*entropy, list(KINDS).index(kind)] if kind else entropy)
    shown = KINDS[kind]
    scene = Scene(_background(rng, split))
    for center, size in _panel_places(rng) if shown.panels else ():
        _add_panel(scene, rng, center, size)
    count = rng.integers(shown.digits[0], shown.digits[1] + 1)
    sizes = np.exp(rng.uniform(*np.log(shown.digit_px), count))
    for size in sorted(sizes, reverse=True):  # large ones first, while there is room
        stretch = 1.0
        if shown.stretch[1] > 1:
            stretch = np.exp(rng.uniform(*np.log(shown.stretch)) * rng.choice((-1, 1)))
        _add_digit(scene, rng, split, size, stretch)
    scene.objects = [thing for thing in scene.objects if thing.mask.any()]
    return scene


@lru_cache(maxsize=1)
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@lru_cache(maxsize=2)
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits of a split: uint8 ``(N, 8, 8)`` in 0-16, and their values ``(N,)``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    in_val = np.arange(len(digits.target)) % 6 == 0
    chosen = in_val if split == "val" else ~in_val
    return digits.images[chosen].astype(np.uint8), digits.target[chosen]


def _background(rng: np.random.Generator, split: str) -> np.ndarray:
    """A darkened square crop: of a photograph's left two thirds for training, of the rest for
    validation.
    """
    photos = _photographs()
    photo = photos[rng.integers(len(photos))]
    border = photo.width * 2 // 3
    left, right = (0, border) if split == "train" else (border, photo.width)
    side = int(rng.integers(100, min(photo.height, right - left) - 10))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(0, photo.height - side + 1))
    crop = photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.BILINEAR, box=(x, y, x + side, y + side))
    pixels = np.asarray(crop)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    brightness = rng.uniform(25, 65) / max(float(pixels.mean()), 1.0)
    return np.rint(pixels * min(brightness, 1.0)).astype(np.uint8)


def _bright_color(scene: Scene, rng: np.random.Generator, box: Box) -> np.ndarray:
    """A random colour that is clearly brighter than the pixels under a box."""
    x0, y0, x1, y1 = (int(v) for v in box)
    under = float(scene.image[y0 : y1 + 1, x0 : x1 + 1].mean())
    for _ in range(_ATTEMPTS):
        color = rng.integers(80, 256, 3)
        if color.mean() >= under + 80:
            return color.astype(np.float32)
    return np.full(3, 255, np.float32)


def _shape_stamp(shape: str, box: Box, outline: float | None = None) -> Stamp:
    """A shape that fills a box, or only its outline of that many pixels."""
    s = _SUPERSAMPLE
    pad = 0 if outline is None else int(outline) + 1
    x0, y0 = int(box[0]) - pad, int(box[1]) - pad
    x1, y1 = int(np.ceil(box[2])) + pad, int(np.ceil(box[3])) + pad
    canvas = Image.new("L", ((x1 - x0) * s, (y1 - y0) * s))
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = ((v - o) * s for v, o in zip(box, (x0, y0, x0, y0), strict=True))
    width = 0 if outline is None else round(outline * s)
    if shape == "circle":
        bounds = (left, top, right, bottom)
        draw.ellipse(bounds, **({"outline": 255, "width": width} if width else {"fill": 255}))
    else:
        x, y = (left + right) / 2, (top + bottom) / 2
        corners = {
            "square": [(left, top), (right, top), (right, bottom), (left, bottom)],
            "triangle": [(x, top), (right, bottom), (left, bottom)],
            "diamond": [(x, top), (right, y), (x, bottom), (left, y)],
        }[shape]
        draw.line([*corners, *corners[:2]], fill=255, width=width, joint="curve")
    alpha = np.asarray(canvas.resize((x1 - x0, y1 - y0), Image.BOX), np.float32) / 255
    # What lies outside the image is cut off.
    cut_x, cut_y = max(0, -x0), max(0, -y0)
    alpha = alpha[cut_y : IMAGE_SIZE - y0, cut_x : IMAGE_SIZE - x0]
    return Stamp(alpha, x0 + cut_x, y0 + cut_y)


def _inside_panel(shape: str, dx: float, dy: float, half: float, margin: float) -> bool:
    """Whether an offset from a panel's centre is ``margin`` px or more inside its outline."""
    if shape == "circle":
        return bool(np.hypot(dx, dy) <= half - margin)
    if shape == "square":
        return max(abs(dx), abs(dy)) <= half - margin
    if shape == "diamond":
        return abs(dx) + abs(dy) <= half - margin * np.sqrt(2)
    # The triangle's sides fall 2 px for each px outward; its base lies at +half.
    return dy <= half - margin and 2 * abs(dx) - dy <= half - margin * np.sqrt(5)


def _panel_places(rng: np.random.Generator) -> list[tuple[tuple[float, float], float]]:
    """Centre and size of one panel, or of two next to or above each other."""

    def anywhere(size: float, low: float = 0, high: float = IMAGE_SIZE) -> float:
        return rng.uniform(low + size / 2 + 1, high - size / 2 - 1)

    if rng.random() < 0.5:
        size = rng.uniform(*_PANEL_PX)
        return [((anywhere(size), anywhere(size)), size)]
    places = []
    upright = rng.random() < 0.5
    for low in (0, IMAGE_SIZE / 2):
        size = rng.uniform(*_PAIRED_PANEL_PX)
        along, across = anywhere(size, low, low + IMAGE_SIZE / 2), anywhere(size)
        places.append(((across, along) if upright else (along, across), size))
    return places


def _add_panel(
    scene: Scene, rng: np.random.Generator, center: tuple[float, float], size: float
) -> None:
    """Adds an outline without a label, and in it one or two discs with labels."""
    shape_index = int(rng.integers(len(PANEL_SHAPES)))
    shape = PANEL_SHAPES[shape_index]
    x, y = center
    outline = rng.uniform(4, 8)
    bounds = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
    stamp = _shape_stamp(shape, bounds, outline)
    scene.paint(stamp, _bright_color(scene, rng, bounds))
    for _ in range(rng.integers(1, 3)):
        radius = rng.uniform(*_DISC_PX) / 2
        for _ in range(_ATTEMPTS):
            dx, dy = rng.uniform(-size / 2, size / 2, 2)
            box = (x + dx - radius, y + dy - radius, x + dx + radius, y + dy + radius)
            margin = radius + outline + _DISC_CLEARANCE_PX
            if _inside_panel(shape, dx, dy, size / 2, margin) and scene.has_room(box):
                color = _bright_color(scene, rng, box)
                scene.add(11 + shape_index, _shape_stamp("circle", box), color, box)
                break


def _add_digit(
    scene: Scene, rng: np.random.Generator, split: str, size: float, stretch: float
) -> None:
    """Adds a handwritten digit. ``size`` is the square root of its box's area, in pixels; its width
    over its height is multiplied by ``stretch``.
    """
    images, values = _digits(split)
    which = int(rng.integers(len(values)))
    strokes = images[which]
    strokes = strokes[np.flatnonzero(strokes.any(axis=1))][:, np.flatnonzero(strokes.any(axis=0))]
    scale = size / np.sqrt(strokes.size)
    scales = (scale / np.sqrt(stretch), scale * np.sqrt(stretch))
    height, width = (
        min(IMAGE_SIZE, max(3, round(side * scale)))
        for side, scale in zip(strokes.shape, scales, strict=True)
    )
    for _ in range(_ATTEMPTS):
        x = int(rng.integers(0, IMAGE_SIZE - width + 1))
        y = int(rng.integers(0, IMAGE_SIZE - height + 1))
        box = (x, y, x + width, y + height)
        if scene.has_room(box):
            ink = Image.fromarray(strokes * 15).resize((width, height), Image.BICUBIC)
            # Enlarged from 8 x 8 pixels, borders are wide and grey; a steeper ramp sharpens them.
            sharp = np.clip((np.asarray(ink, np.float32) / 240 - 0.55) * 3 + 0.5, 0, 1)
            color = _bright_color(scene, rng, box)
            scene.add(int(values[which]) + 1, Stamp(sharp, x, y), color, box)
            return
