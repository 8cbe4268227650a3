"""Images in, pictures out.

Image convention of the whole project: float (B, 3, H, W) in [0, 1], RGB. Loaders deliver uint8
(a quarter of the traffic); `to_float` is the one place where that becomes [0, 1].

Images come from `open_sources`: a folder, `shapes` (drawn here, nothing to download), or `cifar10`.
Each source is a torch Dataset in torchvision's manner: `source[i]` is (PIL image, label).
`PretrainSet` turns one into samples for pre-training (paper, sec. 4 and supplement, Table 1),
`LabelledSet` into samples for classification (supplement, Table 2). `open_scenes` opens annotated
ones, COCO's and ADE20K's layouts or `shapes`; `DenseSet` makes samples of them (paper, Table 3).

All randomness of a sample is a function of (seed, epoch, index): not of workers, of processes, or
of what was read before. That is what makes runs repeatable, and resumable in mid-epoch.

To copy: needs torch, torchvision, numpy and pillow, and no other file of the project.
"""

import functools
import json
import math
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

MEAN_COLOUR = (124, 116, 104)  # of ImageNet: pads what is smaller than its frame
IGNORED = 255  # value of a class map where there is nothing to learn or to measure
VIEW = 384  # pixels, side of the images in pictures with writing on them
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
EXIF_ORIENTATION = 0x0112  # tag: 1 = upright, 5 to 8 = lying on its side
HEAT_COLOURS = ((5, 3, 25), (85, 20, 110), (190, 55, 85), (248, 145, 30), (252, 250, 180))
CURVE_COLOURS = (  # of the lines of one chart
    *("#1f5fa8", "#d9731a", "#3a8f3a", "#b8324a"),
    *("#7b4fb0", "#1b9aaa", "#8a6a3d", "#666666"),
)
CURVES = {  # charts of curves.png: {title: {entry of the log: label}}, one unit each
    "pixel term": {"pixel": ""},
    "adversarial term (eq. 5)": {"adversarial": ""},
    "feature term (eq. 3)": {"feature": ""},
    "teacher's features": {"features": ""},
    "disagreement of views": {"disagreement": ""},
    "contrast": {"contrast": ""},
    "loss of held-out images": {"val_loss": ""},
    "style term (eq. 3)": {"style": ""},
    "discriminator (eq. 4)": {"discriminator": ""},
    "D is right": {"d_accuracy_real": "real", "d_accuracy_fake": "fake"},
    "path lengths": {"path_length": ""},
    "R1": {"r1": ""},
    "ADA's p": {"ada_p": ""},
    "PSNR where hidden, dB": {"psnr": "G", "psnr_mean_fill": "mean fill"},
    "SSIM where hidden": {"ssim": ""},
}


# ---- Randomness ----------------------------------------------------------------------------------


def sample_seed(*numbers):
    """One well-mixed 63-bit seed from any non-negative integers, e.g. (seed, epoch, index)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def sample_generator(*numbers):
    """A torch.Generator (CPU) that depends on these integers alone."""
    return torch.Generator().manual_seed(sample_seed(*numbers))


# ---- Reading image files -------------------------------------------------------------------------


def to_rgb(image):
    """Any PIL image -> upright RGB.

    Turns by the EXIF orientation; scales 16-bit grey to 8 bits (PIL's own conversion clips it);
    puts transparent images on white, as a viewer shows them (dropping alpha alone would uncover
    whatever colours lie beneath). Palette, greyscale and CMYK are PIL's conversions.
    """
    # Older pillows open 16-bit PNGs as "I". Asked here: turned images have lost their format.
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float32)
        top = 65535 if deep or values.max() > 255 else 255
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright_size(image):
    """(width, height) that a PIL image has once turned by its EXIF orientation.

    Decodes nothing but TIFFs, whose size PIL turns by itself, at a moment of its own.
    """
    if image.format == "TIFF":
        image.load()
    turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def resized_crop(image, box, size):
    """Crop `box` (left, top, right, bottom; upright pixels) of a PIL image, as (size, size) RGB.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 scale where the crop leaves that
    much: a large photograph would otherwise cost its full decoding for a 224 px crop.
    """
    width, height = upright_size(image)
    shrink = min(box[2] - box[0], box[3] - box[1]) / size
    if shrink >= 2:
        image.draft(None, (int(image.width / shrink), int(image.height / shrink)))
    image = to_rgb(image)
    fx, fy = image.width / width, image.height / height  # what draft has taken off
    box = (box[0] * fx, box[1] * fy, box[2] * fx, box[3] * fy)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def to_float(images):
    """uint8 of any shape -> float32 in [0, 1]."""
    return images.float() / 255


# ---- Shapes: the ten classes ---------------------------------------------------------------------

# `shapes` is drawn, so that everything runs with no download: a textured background carries one to
# four textured, rotated, shaded objects of ten classes; the label is the class of the largest. A
# picture is a function of (seed, split, index) alone. Lengths are fractions of the image side, so
# a scene is the same at every size.
#
# A class is a signed distance (negative inside) in the object's frame, where it just fits the unit
# circle. From a distance, an antialiased edge and a soft shadow are each one clipped ramp.


def _norm(x, y):
    return np.sqrt(x * x + y * y)  # np.hypot guards against overflow, at five times the time


def _fold_five(x, y):
    """Fold the plane's five equal sectors onto one around the x axis, mirrored to y >= 0."""
    y = np.abs(y)
    for angle in (0.6 * math.pi, 0.2 * math.pi):  # mirrors: what lies beyond each is reflected
        nx, ny = -math.sin(angle), math.cos(angle)
        beyond = 2 * np.maximum(nx * x + ny * y, 0)
        x, y = x - beyond * nx, y - beyond * ny
    return x, np.abs(y)


def _star(x, y):
    x, y = _fold_five(x, y)  # one straight edge is left, from the tip (1, 0) to a notch
    return 0.3838 * (x - 1) + 0.9234 * y


def _flower(x, y):
    px, py = _fold_five(x, y)  # one petal is left
    return np.minimum(_norm(px - 0.66, py) - 0.34, _norm(x, y) - 0.52)


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.31)


def _heart(x, y):  # a square on its corner, and a disc on each of its two upper sides
    x = np.abs(x)
    square = 0.7071 * (x + np.abs(y + 0.207))
    return np.minimum(square, _norm(x - 0.3964, y - 0.1893)) - 0.5607


SHAPES = {  # name: (signed distance, share of the unit disc's area that the shape covers)
    "disc": (lambda x, y: _norm(x, y) - 1, 1.0),
    "ring": (lambda x, y: np.abs(_norm(x, y) - 0.77) - 0.23, 0.708),
    "square": (lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.7071, 0.637),
    "triangle": (lambda x, y: np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.5, 0.413),
    "star": (_star, 0.421),
    "cross": (_cross, 0.628),
    "heart": (_heart, 0.715),
    "moon": (lambda x, y: np.maximum(_norm(x, y) - 1, 0.8 - _norm(x - 0.5, y)), 0.487),
    "pill": (lambda x, y: _norm(np.maximum(np.abs(x) - 0.64, 0), y) - 0.36, 0.423),
    "flower": (_flower, 0.732),
}
SHAPE_CLASSES = tuple(SHAPES)

TEXTURES = {  # name: function of two phases in radians; its sign chooses between two colours
    "plain": lambda p, q: np.ones_like(p),
    "stripes": lambda p, q: np.sin(p),
    "checks": lambda p, q: np.sin(p) * np.sin(q),
    "dots": lambda p, q: np.sin(p) + np.sin(q) - 0.6,
    "waves": lambda p, q: np.sin(p + 1.3 * np.sin(0.7 * q)),
}


# ---- Shapes: objects -----------------------------------------------------------------------------


class DrawnObject(NamedTuple):
    """All that is needed to redraw an object. Lengths are image sides, angles are radians."""

    kind: int  # index into SHAPE_CLASSES
    x: float  # centre, from the left edge
    y: float  # centre, from the top edge
    radius: float  # of the circumscribed circle
    angle: float
    texture: str  # key of TEXTURES
    texture_angle: float
    period: float  # of the texture
    light: float  # direction of the light, one per scene
    colours: tuple  # two sRGB colours in [0, 1]

    @property
    def area(self):
        """Share of the image, as if nothing hid the object."""
        return math.pi * self.radius**2 * SHAPES[SHAPE_CLASSES[self.kind]][1]


def _turn(x, y, angle):
    c, s = math.cos(angle), math.sin(angle)
    return c * x + s * y, c * y - s * x


def _frame(obj, size):
    """Rows and columns around an object and its shadow, and their x (1, w), y (h, 1) in radii."""
    spans, offsets = [], []
    for centre in (obj.y, obj.x):
        reach = obj.radius + 0.05  # 0.05: the shadow
        low = max(0, int((centre - reach) * size) - 1)
        high = min(size, int((centre + reach) * size) + 2)
        pixels = np.arange(low, high, dtype=np.float32)
        spans.append(slice(low, high))
        offsets.append((pixels + (0.5 - centre * size)) / (obj.radius * size))
    return tuple(spans), offsets[1][None, :], offsets[0][:, None]


def _cover(obj, x, y, width):
    """1 inside the object, 0 outside, with a ramp `width` image sides wide along its outline."""
    distance, _ = SHAPES[SHAPE_CLASSES[obj.kind]]
    return (0.5 - obj.radius / width * distance(*_turn(x, y, obj.angle))).clip(0, 1)


def coverage(obj, size):
    """Share of each pixel that the object covers, other objects ignored: (size, size), [0, 1]."""
    box, x, y = _frame(obj, size)
    mask = np.zeros((size, size), np.float32)
    mask[box] = _cover(obj, x, y, 1 / size)  # a ramp of one pixel antialiases the edge
    return mask


def _paint(image, obj):
    """Draw one object and its shadow over image, (3, size, size) in [0, 1], in place."""
    size = image.shape[-1]
    (rows, columns), x, y = _frame(obj, size)
    lx, ly = math.cos(obj.light), math.sin(obj.light)

    # The outline, a soft copy nearer the light, and one further from it: the shadow.
    steps = np.array([0, 0.014, -0.022], np.float32)[:, None, None] / obj.radius
    widths = np.array([0, 0.04, 0.05], np.float32)[:, None, None].clip(1 / size)
    mask, lit, shadow = _cover(obj, x - steps * lx, y - steps * ly, widths)  # each (h, w)

    turns = 2 * math.pi * obj.radius / obj.period
    wave = TEXTURES[obj.texture](*_turn(turns * x, turns * y, obj.texture_angle))
    mix = (0.5 + obj.period * size / (2 * math.pi) * wave).clip(0, 1)
    first, second = np.array(obj.colours, np.float32)[..., None, None]
    # Brighter towards the light, and a dark rim where the lit copy leaves the outline bare.
    colour = (second + mix * (first - second)) * (0.8 + 0.14 * (lx * x + ly * y) + 0.24 * lit)

    part = image[:, rows, columns]  # a view: writing to it draws
    part *= 1 - 0.38 * shadow
    part += mask * (colour - part)


# ---- Shapes: colours and backgrounds -------------------------------------------------------------


def oklch(lightness, chroma, hue):
    """Colour of a perceived lightness [0, 1], chroma (0 grey, 0.15 vivid) and hue (radians).

    Equal lightness looks equally light in every hue, unlike in HSV, so contrast can be promised.
    Returns: three sRGB floats, clipped to [0, 1]. Ottosson 2020, "Oklab".
    """
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3  # the eye's three cones
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return tuple(min(max(v, 0), 1) ** (1 / 2.2) for v in linear)


@functools.lru_cache(maxsize=4)
def _cloud_basis(size, n=9):
    """n cosines along an image side, (size, n) float32; the slow ones are the strong ones.

    basis @ noise @ basis.T turns (n, n) white noise into the same soft clouds at every size.
    """
    order = np.arange(n, dtype=np.float32)
    x = (np.arange(size, dtype=np.float32)[:, None] + 0.5) / size
    return 0.9 * np.cos(np.pi * x * order) / (1 + order) ** 0.8


def _background(rng, lightness, hue, size):
    """Gradient, clouds, and ripples bent by the clouds: (3, size, size) float32, about [0, 1]."""
    basis = _cloud_basis(size)
    clouds = basis @ rng.standard_normal((basis.shape[1],) * 2, np.float32) @ basis.T

    x = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    gradient, _ = _turn(x[None, :], x[:, None], rng.uniform(0, 2 * math.pi))
    texture = 0.35 * clouds
    for _ in range(2):
        across, _ = _turn(x[None, :], x[:, None], rng.uniform(0, 2 * math.pi))
        phase = 2 * math.pi * (rng.uniform(2, 8) * across + rng.uniform())
        texture += rng.uniform(0, 0.5) * np.sin(phase + rng.uniform(0, 1.5) * clouds)

    chroma = rng.uniform(0.03, 0.09)
    base, far, crest = np.array(
        [
            oklch(lightness, chroma, hue),
            oklch(lightness + rng.uniform(-0.14, 0.14), chroma, hue + rng.uniform(-1.5, 1.5)),
            oklch(lightness + 0.07, chroma, hue + rng.uniform(-0.8, 0.8)),
        ],
        np.float32,
    )[..., None, None]  # each (3, 1, 1)
    return base + gradient * (far - base) + texture * (crest - base)


# ---- Shapes: the data set ------------------------------------------------------------------------


def _dress(rng, x, y, r, kind, lightness, light, turn):
    """Give an object an angle up to `turn`, a texture, and colours that stand out from a
    background's lightness."""
    angle, texture_angle, hue = rng.uniform(0, 2 * math.pi, 3).tolist()
    angle = angle * (turn / math.pi) - turn % math.pi  # a whole turn, or from -turn to turn
    away = 1 if lightness < 0.64 else -1
    first = lightness + away * rng.uniform(0.24, 0.36)
    second = min(max(first + away * rng.uniform(-0.05, 0.2), 0.15), 0.97)
    colours = (
        oklch(first, rng.uniform(0.07, 0.17), hue),
        oklch(second, rng.uniform(0.05, 0.15), hue + rng.normal()),
    )
    radius = r / math.sqrt(SHAPES[SHAPE_CLASSES[kind]][1])  # equal areas in all classes
    texture = tuple(TEXTURES)[rng.integers(len(TEXTURES))]
    period = rng.uniform(0.07, 0.13)
    return DrawnObject(kind, x, y, radius, angle, texture, texture_angle, period, light, colours)


class Shapes(Dataset):
    """Scenes of textured objects; the label is the class of the clearly largest one.

    Items are (PIL RGB image size x size, label in 0..9), as in torchvision. The largest object has
    at least 2.7 times the area of any other and is never hidden for the most part. Size, place,
    colours and texture are drawn without a look at the class, and areas do not depend on it, so
    that only the outline tells it. Errors: ValueError for an unknown split.
    """

    classes = SHAPE_CLASSES
    lengths = {"train": 50_000, "val": 5_000}
    radii = (0.15, 0.24)  # of the disc that has the largest object's area
    objects = 4  # at most so many
    turn = math.pi  # angles are up to so much, radians

    def __init__(self, split="train", size=64, length=None, seed=0):
        if split not in self.lengths:
            raise ValueError(f"split must be one of {list(self.lengths)}, not {split!r}")
        self.split, self.size, self.seed = split, size, seed
        length = self.lengths[split] if length is None else length
        self.targets = [i % len(SHAPE_CLASSES) for i in range(length)]  # exactly balanced

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        rng, lightness, hue, objects = self._compose(index)
        image = _background(rng, lightness, hue, self.size)
        for obj in objects:
            _paint(image, obj)
        pixels = (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), self.targets[index]

    def scene(self, index):
        """The picture's list of DrawnObject, back to front."""
        return self._compose(index)[-1]

    def owners(self, index):
        """Which object of `scene(index)` each pixel shows, the nearest that covers half of it.

        (size, size) int64, -1 where none does.
        """
        owners = torch.full((self.size, self.size), -1)
        for number, obj in enumerate(self.scene(index)):
            owners[torch.from_numpy(coverage(obj, self.size)) >= 0.5] = number
        return owners

    def detection(self, index):
        """The objects of a picture, without hidden parts, as `CocoScenes` gives them."""
        owners, scene = self.owners(index), self.scene(index)
        shown = [number for number in owners.unique().tolist() if number >= 0]
        masks = torch.stack([owners == number for number in shown])
        return {
            "boxes": mask_boxes(masks),
            "labels": torch.tensor([scene[number].kind + 1 for number in shown]),
            "masks": masks,
            "crowd": torch.zeros(len(shown), dtype=torch.bool),
            "area": masks.sum(dim=(1, 2)).float(),
        }

    def segmentation(self, index):
        """Class map of a picture, (size, size) uint8: 0 background, then 1 + the object's class."""
        kinds = [obj.kind + 1 for obj in self.scene(index)]
        return torch.tensor([*kinds, 0], dtype=torch.uint8)[self.owners(index)]  # -1: the last

    def _compose(self, index):
        label = self.targets[index]  # raises IndexError past the end, which ends a for loop
        rng = np.random.default_rng([self.seed, list(self.lengths).index(self.split), index])
        lightness, hue, light = rng.uniform(0.38, 0.9), *rng.uniform(0, 2 * math.pi, 2).tolist()

        main = rng.uniform(*self.radii)
        placed = [(*rng.uniform(1.2 * main, 1 - 1.2 * main, 2).tolist(), main, label)]
        others = rng.integers(self.objects)
        for x, y, r in rng.uniform(size=(8 * others, 3)).tolist():
            x, y, r = 0.05 + 0.9 * x, 0.05 + 0.9 * y, main * (0.3 + 0.3 * r)
            # A place is refused where it would hide another object.
            free = all(math.hypot(x - a, y - b) > r + other for a, b, other, _ in placed)
            if free and len(placed) <= others:
                placed.append((x, y, r, int(rng.integers(len(SHAPE_CLASSES)))))
        how = (lightness, light, self.turn)
        objects = [_dress(rng, *placed[i], *how) for i in rng.permutation(len(placed))]
        return rng, lightness, hue, objects


class LargeShapes(Shapes):
    """`Shapes` with one large, nearly upright object: what minutes of pre-training can learn.

    Each picture is drawn once, and kept (12 kB at 64 px).
    """

    radii, objects, turn = (0.26, 0.36), 1, 0.5

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kept = {}

    def __getitem__(self, index):
        if index not in self.kept:
            self.kept[index] = super().__getitem__(index)
        return self.kept[index]


DRAWN = {"shapes": Shapes, "shapes-large": LargeShapes}  # by --data


# ---- Sources: where images come from -------------------------------------------------------------


class Folder(Dataset):
    """Image files on disk. `folder[i]` is (PIL image, label); the image is opened, not decoded."""

    held_out = False  # is it one part of a folder that was split here?

    def __init__(self, files, targets, classes):
        self.files, self.targets, self.classes = files, targets, classes

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return Image.open(self.files[i]), self.targets[i]


def list_images(folder):
    """Sorted paths of the image files directly in a folder, and its sorted subfolders."""
    entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda e: e.name)
    images = [e.path for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES)]
    return images, [e.path for e in entries if e.is_dir()]


def scan_folder(folder):
    """A folder of class folders, or of unlabelled images -> `Folder` (label 0 where unlabelled)."""
    images, subfolders = list_images(folder)
    if images and subfolders:
        raise ValueError(
            f"{folder} holds both images and folders ({os.path.basename(images[0])}, "
            f"{os.path.basename(subfolders[0])}/); keep images in class folders, or in one folder"
        )
    if images:
        return Folder(images, [0] * len(images), [os.path.basename(folder)])
    files, targets = [], []
    for label, subfolder in enumerate(subfolders):
        found = list_images(subfolder)[0]
        if not found:
            hint = "fill it or remove it"
            if len(subfolders) == 1 and list_images(subfolder)[1]:
                hint = f"are the classes in it? Then give --data {subfolder}"
            raise ValueError(f"class folder {subfolder} holds no images; {hint}")
        files += found
        targets += [label] * len(found)
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no folders")
    return Folder(files, targets, [os.path.basename(f) for f in subfolders])


def hold_out(source, seed):
    """Split a `Folder` without `val`: a seeded 1 %, at least 8 images, is kept for validation."""
    count = max(8, len(source) // 100)
    if len(source) < 2 * count:
        raise ValueError(f"{len(source)} images are too few to hold out {count}; add some")
    order = torch.randperm(len(source), generator=sample_generator(seed)).tolist()

    def part(indices):
        indices = sorted(indices)
        files, targets = [source.files[i] for i in indices], [source.targets[i] for i in indices]
        folder = Folder(files, targets, source.classes)
        folder.held_out = True
        return folder

    return part(order[count:]), part(order[:count])


def open_sources(data, *, image_size, seed):
    """(training source, validation source) for `--data`.

    data: "shapes", "shapes-large", "cifar10" (downloaded to data/ once), or a folder: `train/` and
    `val/` with class folders as ImageNet has them, class folders alone, or images alone; without
    `val`, see `hold_out`. ValueError or OSError says what is wrong with it and what to do.
    """
    if data in DRAWN:
        return DRAWN[data]("train", image_size), DRAWN[data]("val", image_size)
    if data == "cifar10":
        try:
            return tuple(CIFAR10("data", train=train, download=True) for train in (True, False))
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"CIFAR-10 could not be downloaded to data/ ({error}); put its folder "
                "cifar-10-batches-py there, or give --data PATH or --data shapes"
            ) from error
    root = Path(data)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"--data {data} {what}; give a folder of images, --data shapes (drawn on the fly), or "
            "--demo"
        )
    if (root / "train").is_dir():
        train = scan_folder(root / "train")
        if (root / "val").is_dir():
            return train, scan_folder(root / "val")
        return hold_out(train, seed)
    return hold_out(scan_folder(root), seed)


# ---- Samples and batches -------------------------------------------------------------------------


def sample_shape(image_size, views=1):
    """Of one image, or of the views of one image."""
    one = (3, image_size, image_size)
    return one if views == 1 else (views, *one)


class PretrainSet(Dataset):
    """Samples for pre-training: `set[(epoch, index)]` is (image, mask_noise, seed, bad).

    image: uint8 (3, S, S), or (views, 3, S, S). mask_noise: (N,), which fixes the mask. seed: int,
    for whatever else this sample draws. bad: [(index, reason)] of files that could not be read on
    the way to a readable one; the next image stands in for them.

    With `epoch_images` an epoch is that long, and goes round few images many times, each time with
    draws of its own: pre-training on 1 to 1000 images (Kong and Zhang 2023, Table 6, who do not say
    how long an epoch is). What does not fit in one epoch comes in the next.

    PAPER: supplement, Table 1: RandomResizedCrop and colour jitter 0.4 (the text: as MAE, which
    has no jitter; --jitter 0). PAPER SILENT: crop scale (.2, 1) and flips are MAE's; jitter is of
    brightness, contrast and saturation, not of hue (the authors' code varies gamma under the name
    of brightness).
    """

    def __init__(
        self,
        source,  # dataset of (PIL image, label)
        *,
        image_size,  # S, pixels
        num_patches,  # N
        seed,  # run's seed
        augment=True,  # False: centre crop, and no randomness but the mask's
        crop_min=0.2,  # smallest random crop, as a fraction of the area
        flip=True,  # mirror half of the images
        jitter=0.4,  # strength of colour jitter; 0 = none
        limit=None,  # use only so many images, a seeded choice
        epoch_images=None,  # samples of an epoch; None = as many as there are images
        blocks=0.0,  # part of the patches that rectangles hide before chance does
        views=1,  # 2: image is (2, 3, S, S), two colourings of one crop
    ):
        self.blocks, self.views, self.shape = blocks, views, sample_shape(image_size, views)
        self.source, self.image_size, self.num_patches = source, image_size, num_patches
        self.epoch_images = epoch_images
        self.seed, self.augment, self.crop_min = seed, augment, crop_min
        self.flip = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
        self.distort = v2.ColorJitter(jitter, jitter, jitter)
        if views > 1 and jitter:  # PAPER: C-MAE, "follows SimSiam", at .4 (Chen and He 2021).
            # PAPER SILENT: whether SimSiam's random grey is among its colours; here it is.
            # DIFFERS: colours change before masking, not after.
            strong = v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter / 4))
            self.distort = v2.Compose([v2.RandomApply([strong], 0.8), v2.RandomGrayscale(0.2)])
        self.centre = 1.0  # part of the shorter side that is kept where there is no augmentation
        count = min(limit or len(source), len(source))
        chosen = torch.randperm(len(source), generator=sample_generator(seed))[:count]
        self.indices = chosen.tolist()

    def __len__(self):
        return self.epoch_images or len(self.indices)

    def name(self, index):
        """What to call image `index` in a message: its file, if it has one."""
        files = getattr(self.source, "files", None)
        return files[self.indices[index]] if files else f"image {self.indices[index]}"

    def bad_limit(self):
        """How many distinct unreadable images a run puts up with: never all."""
        return min(max(10, len(self.indices) // 100), len(self.indices) - 1)

    def __getitem__(self, key):
        epoch, index = key
        seed = sample_seed(self.seed, epoch, index)
        # Images in turn, epoch after epoch; just `index` where an epoch has each image once.
        index = (epoch * len(self) + index) % len(self.indices)
        bad = []
        while True:
            try:
                # torchvision draws from torch's global generator: seed it, and give it back.
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed)
                    return *self.sample(index), seed, bad
            except Exception as error:  # decoders raise anything; the run reports and counts it
                bad.append((index, f"{type(error).__name__}: {error}"))
            if len(bad) > self.bad_limit():  # the run is about to end
                blank = torch.zeros(self.shape, dtype=torch.uint8)
                return blank, self.companion(index), seed, bad
            index = (index + 1) % len(self.indices)

    def sample(self, index):
        """(image, companion) of an image; draws from torch's global generator."""
        companion = self.companion(index)
        return self.transform(self.source[self.indices[index]][0]), companion

    def companion(self, index):
        """What goes with an image: here the noise of its mask, (N,)."""
        noise = torch.rand(self.num_patches)
        if self.blocks:
            noise += block_mask(math.isqrt(self.num_patches), self.blocks)
        return noise

    def transform(self, image):
        """PIL image -> uint8 (3, S, S), or (views, 3, S, S)."""
        width, height = upright_size(image)
        if self.augment:
            shape = torch.empty(1, height, width, device="meta")  # all that torchvision asks for
            top, left, h, w = v2.RandomResizedCrop.get_params(
                shape, scale=[self.crop_min, 1.0], ratio=[3 / 4, 4 / 3]
            )
            box = (left, top, left + w, top + h)
            image = self.flip(resized_crop(image, box, self.image_size))
        else:
            shorter = min(width, height)
            side = min(shorter, max(self.image_size, self.centre * shorter))
            left, top = (width - side) / 2, (height - side) / 2
            image = resized_crop(image, (left, top, left + side, top + side), self.image_size)
        colour = self.distort if self.augment else lambda image: image
        views = [v2.functional.pil_to_tensor(colour(image)) for _ in range(self.views)]
        return views[0] if self.views == 1 else torch.stack(views)


def block_mask(side, hidden):
    """BootMAE's mask: rectangles until the part `hidden` of all patches is hidden -> (side^2,)
    float, 1 = hidden.

    Areas are drawn from 16/196 to 60/196 of the image, less where less is left to hide, and aspect
    ratios from .3 to 1/.3. Added to the noise of `random_masking`, the rectangles are hidden first,
    and chance hides the rest. BootMAE's code: 120 of 196 in blocks, 147 in all. Draws from torch's
    global generator. DIFFERS: that code then shows up to three patches of the blocks again.
    """
    total, low, high = (round(part * side**2) for part in (hidden, 16 / 196, 60 / 196))
    mask = torch.zeros(side, side)
    while (left := total - int(mask.sum())) > 0:
        most = min(left, high)
        u, v, *place = torch.rand(4).tolist()
        area = low + (most - low) * u  # where most < low, from most to low: what still fits
        aspect = 0.3 ** (1 - 2 * v)  # from .3 to 1/.3, its logarithm uniform
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if not (0 < h < side and 0 < w < side):
            continue
        top, start = (int(p * (side - x + 1)) for p, x in zip(place, (h, w), strict=True))
        block = mask[top : top + h, start : start + w]
        if 0 < h * w - int(block.sum()) <= most:
            block[:] = 1
    return mask.flatten()


class LabelledSet(PretrainSet):
    """Samples for classification: `set[(epoch, index)]` is (image, label, seed, bad).

    As `PretrainSet`, with the label, int64 (), in mask_noise's place. An unreadable image is
    replaced by the next one and its label, but without augmentation the label becomes -1, "do not
    count": measuring an image twice would be wrong.

    PAPER SILENT: crops. MAE's: .08 to 1 of the area, flips; measured on the central 224/256 of the
    shorter side, or all of it where that leaves fewer pixels than the network takes.
    """

    def __init__(
        self,
        source,  # dataset of (PIL image, label) with `targets` and `classes`
        indices,  # which of its images
        *,
        image_size,  # S, pixels
        seed,  # run's seed
        augment=True,  # False: centre crop
        crop_min=0.08,  # smallest random crop, as a fraction of the area
        magnitude=0.0,  # of RandAugment, 0 to 10; 0 = none
    ):
        super().__init__(
            source,
            image_size=image_size,
            num_patches=0,
            seed=seed,
            augment=augment,
            crop_min=crop_min,
        )
        self.indices, self.centre = list(indices), 224 / 256
        self.distort = functools.partial(rand_augment, magnitude=magnitude)

    def companion(self, index):
        """The label of an image."""
        return torch.tensor(self.source.targets[self.indices[index]])

    def __getitem__(self, key):
        image, label, seed, bad = super().__getitem__(key)
        return image, label if self.augment or not bad else torch.tensor(-1), seed, bad


def rand_augment(image, magnitude, std=0.5):
    """Two random operations on a PIL image, each with probability 1/2; draws from torch.

    PAPER: supplement, Table 2: RandAug(9, 0.5). PAPER SILENT: what .5 is, and the scale. Ours are
    MAE's: 9 of 10 is the mean and .5 the deviation of a magnitude drawn for each operation, which
    is skipped half of the time. torchvision counts 30 steps to the same strengths. DIFFERS: its
    operations are 14, Identity among them; MAE's library has Invert and SolarizeAdd instead.
    """
    for _ in range(2 if magnitude else 0):
        if torch.rand(()) < 0.5:
            drawn = (magnitude + std * torch.randn(())).clamp(0, 10).item()
            operation = v2.RandAugment(
                num_ops=1,
                magnitude=round(3 * drawn),
                num_magnitude_bins=31,
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=list(MEAN_COLOUR),
            )
            image = operation(image)
    return image


def choose_images(targets, *, seed, fraction=None, shots=None, limit=None):
    """Which images to use: sorted indices, a choice that depends on the seed alone.

    targets: label of each image. At most one of: fraction, of each class (rounded, at least one
    image); shots, images per class; limit, images whatever their class. ValueError if a class has
    fewer than `shots`.
    """
    if limit is not None:
        return torch.randperm(len(targets), generator=sample_generator(seed))[:limit].sort()[0]
    targets, chosen = torch.as_tensor(targets), []
    for label in targets.unique().tolist():
        members = (targets == label).nonzero()[:, 0]
        count = len(members) if fraction is None else max(1, round(fraction * len(members)))
        count = shots or count
        if count > len(members):
            raise ValueError(f"class number {label} has {len(members)} images, not {count}")
        order = torch.randperm(len(members), generator=sample_generator(seed, label))
        chosen.append(members[order[:count]])
    return torch.cat(chosen).sort()[0]


def check_classes(first, second, names):
    """ValueError that lists the differences, if two lists of class names are not the same.

    names: what to call the two, e.g. ("train", "val").
    """
    if list(first) == list(second):
        return
    differ = [
        f"{', '.join(map(str, sorted(set(a) - set(b))))} only in {name}"
        for a, b, name in ((first, second, names[0]), (second, first, names[1]))
        if set(a) - set(b)
    ]
    raise ValueError(
        f"the classes of {names[0]} and {names[1]} differ: {'; '.join(differ) or 'in their order'}"
    )


def collate(samples):
    """Samples -> (images (B, 3, S, S) or (B, views, 3, S, S) uint8, companions, seeds, bad).

    companions: tensors become one (mask_noise (B, N), labels (B,), class maps (B, S, S)); anything
    else, such as the objects of images, stays a list.
    """
    images, companions, seeds, bad = zip(*samples, strict=True)
    stacked = isinstance(companions[0], torch.Tensor)
    companions = torch.stack(companions) if stacked else list(companions)
    return torch.stack(images), companions, torch.tensor(seeds), sum(bad, [])


class EpochSampler(Sampler):
    """Yields (epoch, index) for one process: a shuffle that depends on (seed, epoch) alone.

    Set `epoch` (from 1) and `start` (steps already done of it) before iterating. One step takes
    `global_batch` images, dealt to the processes in turn: process r gets numbers r, r + world, ...
    so that two processes with half the batch see the images of one with the whole. An incomplete
    last step is left out.
    """

    def __init__(self, length, *, global_batch, seed, rank=0, world=1):
        self.length, self.global_batch, self.seed = length, global_batch, seed
        self.rank, self.world = rank, world
        self.epoch, self.start = 1, 0
        self.steps = length // global_batch  # of a whole epoch

    def __len__(self):
        return (self.steps - self.start) * self.global_batch // self.world

    def __iter__(self):
        order = torch.randperm(self.length, generator=sample_generator(self.seed, self.epoch))
        order = order[self.start * self.global_batch : self.steps * self.global_batch]
        for index in order[self.rank :: self.world].tolist():
            yield self.epoch, index


def default_workers():
    """Loader workers of a process: its share of the cores that it may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def ignore_signals(worker):
    """Ctrl-C, torchrun and batch systems signal a whole process group; the main process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def build_loader(dataset, sampler, *, batch_size, workers):
    """DataLoader of `PretrainSet`, `LabelledSet` or `DenseSet` samples; workers outlive epochs."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
    )


# ---- Masks: polygons, run lengths, boxes ---------------------------------------------------------


def polygons_to_mask(polygons, height, width):
    """Union of polygons [(x0, y0, x1, y1, ...), ...] in pixels -> bool (height, width) array.

    Bit for bit what COCO's own tools draw, which AP depends on (PIL fills the outline, too: a fifth
    more for small objects). The outline is walked on a grid five times as fine; where it crosses
    the middle of a column, the rest of that column below turns from outside to inside or back.
    """
    mask = np.zeros((width, height), bool)  # COCO counts pixels column by column
    for polygon in polygons:
        start = (5 * np.asarray(polygon, np.float64).reshape(-1, 2) + 0.5).astype(np.int64)
        end = np.roll(start, -1, axis=0)
        steps = np.abs(end - start).max(axis=1)  # of each edge along its longer axis
        edges = np.arange(len(start))
        long = np.where(np.abs(end - start)[:, 0] == steps, 0, 1)
        turned = start[edges, long] > end[edges, long]  # edges are walked in ascending order
        low, high = np.where(turned[:, None], (end, start), (start, end))
        slope = (high - low) / np.maximum(steps, 1)[:, None]  # 1 along the longer axis

        edge = np.repeat(edges, steps + 1)
        step = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - (steps + 1), steps + 1)
        step = np.where(turned[edge], steps[edge] - step, step)  # but listed from start to end
        rounded = (low[edge] + slope[edge] * step[:, None] + 0.5).astype(np.int64)
        along = low[edge] + step[:, None]  # not rounded: below 0, that would shift it
        points = np.where(long[edge, None] == np.arange(2), along, rounded)

        u, v = np.minimum(points[1:], points[:-1]).T
        column, rest = np.divmod(u - 2, 5)
        crosses = (points[1:, 0] != points[:-1, 0]) & (rest == 0) & (column >= 0) & (column < width)
        row = np.clip(-((2 - v[crosses]) // 5), 0, height)  # the first whose middle is not above v
        turns = np.bincount(column[crosses] * height + row, minlength=height * width + 1)
        mask |= (turns[:-1].cumsum() % 2 == 1).reshape(width, height)
    return mask.T


def rle_to_mask(counts, height, width):
    """COCO's run lengths -> bool (height, width) array. ValueError if they are of another size.

    counts: lengths of alternate runs of 0 and 1, column by column, the first of 0; a list, or
    compressed to a string (see `mask_to_rle`).
    """
    if isinstance(counts, (str, bytes)):
        text, counts, value, shift = counts, [], 0, 0
        for code in text.encode() if isinstance(text, str) else text:
            group = code - 48
            value |= (group & 31) << shift
            shift += 5
            if group & 32 == 0:  # the number's last group; its highest bit is the sign
                value -= (group & 16) << (shift - 4)
                counts.append(value + counts[-2] if len(counts) > 2 else value)
                value, shift = 0, 0
    runs = np.asarray(counts, np.int64)
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(
            f"run lengths cover {runs.sum()} pixels, not {height} x {width}: is the mask of "
            "another image, or torn?"
        )
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def mask_to_rle(mask):
    """bool (H, W) -> {"size": [H, W], "counts": str}: COCO's compressed run lengths, for results.

    From the fourth on, a run is written as its difference from the one two before, then each as
    groups of five bits, the low ones first, + 32 where more follow, + 48 to be printable.
    """
    flat = np.asarray(mask, bool).T.ravel()
    borders = np.flatnonzero(np.diff(flat, prepend=False))  # where a pixel differs from the last
    runs = np.diff(borders, prepend=0, append=flat.size).tolist()
    text = []
    for i, value in enumerate(runs):
        value -= runs[i - 2] if i > 2 else 0
        more = True
        while more:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)  # is the sign not yet that of the rest?
            text.append(chr(group + 32 * more + 48))
    return {"size": list(np.shape(mask)), "counts": "".join(text)}


def mask_boxes(masks):
    """Masks (N, H, W), none of them empty -> their boxes (N, 4), float32 pixels, xyxy.

    A box ends where its last pixel ends: a mask of one pixel is 1 wide (torchvision's: 0).
    """
    sides = []
    for profile in (masks.any(dim=1), masks.any(dim=2)):  # (N, W), (N, H)
        first = profile.int().argmax(dim=1)
        sides.append((first, profile.shape[1] - profile.flip(1).int().argmax(dim=1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1).float()


# ---- Sources with objects or class maps ----------------------------------------------------------


class CocoScenes(Dataset):
    """COCO's own layout: `scenes[i]` is (PIL image, its objects); the image is opened, not decoded.

    Objects are a dict of tensors: boxes (N, 4) float32, xyxy in pixels; labels (N,) int64 from 1 (0
    is the background); masks (N, H, W) bool; crowd (N,) bool, is it a group of objects; area (N,)
    float32, as COCO lists it. classes[label - 1] is a label's name, category_ids[label - 1] its
    number in COCO's files, image_ids[i] that of image i, ascending.

    ValueError, one line, for whatever is wrong in folder/annotations/instances_{split}2017.json or
    does not fit folder/{split}2017; reading an image of another size than listed raises it, too.
    """

    def __init__(self, folder, split):
        self.path = Path(folder) / "annotations" / f"instances_{split}2017.json"
        if not self.path.is_file():
            ade = (Path(folder) / "annotations" / "training").is_dir()
            hint = "this is ADE20K's layout, of segmentation" if ade else "give COCO's own layout"
            raise ValueError(f"{self.path} is missing: {hint}")
        try:
            content = json.loads(self.path.read_text())
            listed = sorted(content["images"], key=lambda row: row["id"])
            categories = sorted(content["categories"], key=lambda row: row["id"])
            self.image_ids = [row["id"] for row in listed]
            self.sizes = [[row["height"], row["width"]] for row in listed]
            self.files = [str(Path(folder) / f"{split}2017" / row["file_name"]) for row in listed]
            self.category_ids = [row["id"] for row in categories]
            self.classes = [row["name"] for row in categories]
            place = {image_id: i for i, image_id in enumerate(self.image_ids)}
            self.objects = [[] for _ in place]
            for row in content["annotations"]:
                self._check(row, place)
                self.objects[place[row["image_id"]]].append(self._object(row))
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.path} is torn or not COCO's ({what}); replace it") from error
        absent = [file for file in self.files if not os.path.isfile(file)]
        if absent:
            raise ValueError(
                f"{len(absent)} images of {self.path} are not there, such as {absent[0]}; get the "
                "images again, or take them out of the list"
            )

    def _check(self, row, place):
        """ValueError if an annotation does not fit the lists of images and categories."""
        wrong, outline = None, row["segmentation"]
        if row["image_id"] not in place:
            wrong = f"is of image {row['image_id']}, which is not listed"
        elif row["category_id"] not in self.category_ids:
            wrong = f"is of category {row['category_id']}, which is not listed"
        elif len(row["bbox"]) != 4:
            wrong = f"has a box of {len(row['bbox'])} numbers, not 4"
        elif isinstance(outline, dict) and outline["size"] != self.sizes[place[row["image_id"]]]:
            size = self.sizes[place[row["image_id"]]]
            wrong = f"has a mask of {outline['size']}, its image {size} (height, width)"
        if wrong:
            raise ValueError(f"{self.path}: annotation {row['id']} {wrong}; replace the file")

    def _object(self, row):
        """What is kept of an annotation: (box, label, draw, outline, crowd, area)."""
        x, y, w, h = row["bbox"]
        label, outline = self.category_ids.index(row["category_id"]) + 1, row["segmentation"]
        if isinstance(outline, dict):
            draw, outline = rle_to_mask, outline["counts"]
        else:  # arrays: a quarter of the memory of lists, and shared by loader workers
            draw, outline = polygons_to_mask, [np.asarray(part, np.float64) for part in outline]
        return [x, y, x + w, y + h], label, draw, outline, bool(row.get("iscrowd")), row["area"]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image, (height, width) = Image.open(self.files[i]), self.sizes[i]
        if upright_size(image) != (width, height):
            raise ValueError(
                f"{self.files[i]} has {upright_size(image)} pixels (width, height), its masks "
                f"{(width, height)}, says {self.path}; replace one of them"
            )
        rows = zip(*self.objects[i], strict=True) if self.objects[i] else [()] * 6
        boxes, labels, draw, outlines, crowd, area = rows
        masks = np.zeros((len(boxes), height, width), bool)
        for n, outline in enumerate(outlines):
            masks[n] = draw[n](outline, height, width)
        return image, {
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(masks),
            "crowd": torch.tensor(crowd, dtype=torch.bool),
            "area": torch.tensor(area, dtype=torch.float32),
        }


class AdeScenes(Dataset):
    """ADE20K's scene-parsing layout: `scenes[i]` is (PIL image, class map (H, W) uint8).

    folder/images/{split}/NAME.jpg and folder/annotations/{split}/NAME.png, split "training" or
    "validation". The files' 0, nothing known, becomes IGNORED, their 1 class 0. classes: names from
    folder/objectInfo150.txt or objectInfo.txt, or else 150 numbers.

    ValueError, one line, for another layout or an image without its map; reading raises it for a
    map of another size than its image, or with labels beyond the classes.
    """

    def __init__(self, folder, split):
        folder = Path(folder)
        images, maps = folder / "images" / split, folder / "annotations" / split
        for part in (images, maps):
            if not part.is_dir():
                coco = any((folder / "annotations").glob("instances_*.json"))
                hint = "this is COCO's layout, of detection" if coco else "give ADE20K's own layout"
                raise ValueError(f"{part} is missing: {hint}")
        self.files = list_images(images)[0]
        self.maps = [str(maps / f"{Path(file).stem}.png") for file in self.files]
        absent = [path for path in self.maps if not os.path.isfile(path)]
        if absent or not self.files:
            what = f"{len(absent)} maps are missing, such as {absent[0]}" if absent else "no images"
            raise ValueError(f"{images}: {what}; get the missing files")
        self.image_ids = [Path(file).stem for file in self.files]
        self.classes = [f"class {number}" for number in range(1, 151)]
        for path in (folder / "objectInfo.txt", folder / "objectInfo150.txt"):
            if path.is_file():  # number, tab, maybe statistics, tab, names; maybe a title above
                rows = [row.strip().split("\t") for row in path.read_text().splitlines()]
                self.classes = [row[-1].strip() for row in rows if row[0].strip().isdigit()]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image, labels = Image.open(self.files[i]), Image.open(self.maps[i])
        size, top, wrong = upright_size(image), len(self.classes), None
        if labels.size != size:
            wrong = f"has {labels.size} pixels (width, height), its image {size}"
        elif labels.mode not in ("L", "P"):  # a palette's numbers are labels, too
            wrong = f"has mode {labels.mode}, not 8 bits of grey"
        elif (values := np.array(labels)).max() > top:
            wrong = (
                f"has label {values.max()}, beyond the {top} classes (objectInfo.txt lists them)"
            )
        if wrong:
            raise ValueError(f"{self.maps[i]} {wrong}; replace it")
        return image, torch.from_numpy(values - np.uint8(1))  # 0 wraps around to IGNORED


class ShapeScenes(Dataset):
    """`Shapes` with its objects or its class maps, in the manner of `CocoScenes`, `AdeScenes`."""

    def __init__(self, shapes, task):
        self.shapes, self.image_ids = shapes, range(len(shapes))
        self.target = shapes.detection if task == "detect" else shapes.segmentation
        self.classes = [*shapes.classes] if task == "detect" else ["background", *shapes.classes]
        self.category_ids = range(1, len(self.classes) + 1)

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, i):
        return self.shapes[i][0], self.target(i)


def open_scenes(data, task, *, image_size, parts=("train", "val")):
    """Sources for `--data` and a task, "detect" or "segment": one for each of `parts`.

    data: "shapes", "shapes-large" (drawn, image_size pixels wide), or a folder: COCO's layout for
    detection, ADE20K's for segmentation. parts: of "train" and "val". ValueError says what is wrong
    and what to do.
    """
    if data in DRAWN:
        return [ShapeScenes(DRAWN[data](part, image_size), task) for part in parts]
    if not Path(data).is_dir():
        what = "is not a folder" if Path(data).exists() else "does not exist"
        raise ValueError(f"--data {data} {what}; give a folder, or --data shapes (drawn here)")
    if task == "detect":
        sources = [CocoScenes(data, part) for part in parts]
    else:
        names = {"train": "training", "val": "validation"}
        sources = [AdeScenes(data, names[part]) for part in parts]
    check_classes(sources[0].classes, sources[-1].classes, ("train", "val"))
    for source in sources:  # what is wrong everywhere is told now; a torn file, by the loader
        with suppress(OSError, SyntaxError, IndexError):
            source[0]
    return sources


# ---- Samples with objects or class maps ----------------------------------------------------------


class Letterbox(NamedTuple):
    """How an image lies in a square: (height, width) pixels became (rows, columns) at its top left.

    The two ratios differ, since each side is rounded: maps go back by their own axis's.
    """

    height: int
    width: int
    rows: int
    columns: int


def on_canvas(x, size, fill):
    """(C, h, w) at the top left of (C, size, size); fill: the rest, C values or one."""
    canvas = x.new_empty(len(x), size, size)
    canvas[:] = x.new_tensor(fill).view(-1, 1, 1)
    canvas[:, : x.shape[1], : x.shape[2]] = x
    return canvas


def letterbox(image, size):
    """Image (3, H, W) uint8 -> ((3, size, size) uint8, `Letterbox`): the whole, aspect kept.

    The longer side is resized to `size`; the mean colour fills the right or the bottom.
    """
    height, width = image.shape[1:]
    rows, columns = (max(1, round(side * size / max(height, width))) for side in (height, width))
    image = v2.functional.resize(image, [rows, columns], antialias=True)
    return on_canvas(image, size, MEAN_COLOUR), Letterbox(height, width, rows, columns)


def boxes_to_image(boxes, place):
    """Boxes (N, 4), xyxy in pixels of a letterbox -> in pixels of its image, and inside it."""
    limits = boxes.new_tensor([place.columns, place.rows] * 2)
    sizes = boxes.new_tensor([place.width, place.height] * 2)
    return torch.minimum(boxes.clamp(min=0), limits) * (sizes / limits)


def maps_to_image(maps, place):
    """Maps (C, S, S), float, of a letterbox (logits, say) -> (C, H, W) of its image, bilinear."""
    maps = maps[None, :, : place.rows, : place.columns]
    size = (place.height, place.width)
    return torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)[0]


def random_view(image, maps, *, size, ratio, fill):
    """A random (size, size) view of an image and of what goes with it, half of them mirrored.

    image: (3, H, W) uint8. maps: (N, H, W) uint8, N may be 0; their values are kept, not mixed.
    ratio: enlargement. fill: of the maps beyond the image; the image gets the mean colour, at the
    right and the bottom, as in `letterbox`. Draws from torch's global generator.

    What the view will not show is cut off first, in whole pixels: resizing all of it costs up to
    four times as much. Maps take the pixel under the centre of each new one, where torchvision's
    masks (mode "nearest") take the one under its corner: up to half a pixel off the image.
    """
    spans = []
    for side in image.shape[1:]:
        kept = min(side, max(1, round(size / ratio)))
        start = int(torch.randint(side - kept + 1, ()))
        target = size if kept < side else min(size, max(1, round(side * ratio)))
        spans.append((start, kept, target))
    (top, height, rows), (left, width, columns) = spans
    mirrored, views = torch.rand(()) < 0.5, []
    exact = v2.InterpolationMode.NEAREST_EXACT
    for x, mode, rest in ((image, v2.InterpolationMode.BILINEAR, MEAN_COLOUR), (maps, exact, fill)):
        x = v2.functional.crop(x, top, left, height, width)
        if len(x):
            x = v2.functional.resize(x, [rows, columns], interpolation=mode, antialias=True)
        else:
            x = x.new_empty(0, rows, columns)
        views.append(on_canvas(v2.functional.horizontal_flip(x) if mirrored else x, size, rest))
    return views


class DenseSet(PretrainSet):
    """Samples for detection and segmentation: `set[(epoch, index)]` is (image, target, seed, bad).

    As `LabelledSet`, image uint8 (3, S, S), with a target in the label's place. Training: for
    detection the view's objects, {"boxes" (N, 4), "labels" (N,), "masks" (N, S, S) bool}, as
    torchvision wants them, boxes drawn around what is left of the masks, groups (crowd) left out;
    for segmentation the view's class map, (S, S) uint8. Evaluation (augment=False): a dict of all
    that the source gives, in the image's own pixels, under "map" for segmentation, with "letterbox"
    (see `boxes_to_image`), "index" (of the source), and with slide=True "whole", the image with its
    shorter side resized to S, (3, h, w); None in place of an unreadable image's, "do not count",
    whatever the picture beside it.

    PAPER SILENT: augmentation, for both tasks. Detection: scale jitter of .1 to 2, crops, flips, as
    in Li et al. 2021 and ViTDet. Segmentation: shorter side S times .5 to 2, crops, flips, colours,
    as in MMSegmentation, but no second try where one class fills a crop.
    """

    def __init__(
        self,
        source,  # `CocoScenes`, `AdeScenes` or `ShapeScenes`
        indices,  # which of its images
        *,
        image_size,  # S, pixels
        seed,  # run's seed
        task,  # "detect" or "segment"
        augment=True,  # False: the whole image, letterboxed
        scales=None,  # (smallest, largest) enlargement, 1 = the image fits (detect) or fills S
        slide=False,  # evaluation is to slide windows over whole images
    ):
        super().__init__(source, image_size=image_size, num_patches=0, seed=seed, augment=augment)
        self.indices, self.task, self.slide = list(indices), task, slide
        self.scales = scales or ((0.1, 2.0) if task == "detect" else (0.5, 2.0))
        self.distort = v2.ColorJitter(32 / 255, 0.5, 0.5, 18 / 360)  # MMSegmentation's strengths

    def companion(self, index):
        """A target with nothing in it."""
        size = self.image_size
        if self.task == "segment":
            return torch.full((size, size), IGNORED, dtype=torch.uint8)
        return objects_in(torch.zeros(0, size, size), torch.zeros(0, dtype=torch.int64))

    def sample(self, index):
        """(image, target) of an image; draws from torch's global generator."""
        index, size = self.indices[index], self.image_size
        image, target = self.source[index]
        image = v2.functional.pil_to_tensor(to_rgb(image))
        if not self.augment:
            target = target if self.task == "detect" else {"map": target}
            if self.slide:
                target |= {"whole": v2.functional.resize(image, [size], antialias=True)}
            image, place = letterbox(image, size)
            return image, target | {"letterbox": place, "index": index}
        low, high = self.scales
        jitter = low + (high - low) * torch.rand(()).item()
        view = functools.partial(random_view, image, size=size)
        if self.task == "segment":
            ratio = jitter * size / min(image.shape[1:])
            image, maps = view(target[None], ratio=ratio, fill=IGNORED)
            return self.distort(image), maps[0]
        single = ~target["crowd"]
        ratio = jitter * size / max(image.shape[1:])
        image, masks = view(target["masks"][single].byte(), ratio=ratio, fill=0)
        return image, objects_in(masks, target["labels"][single])

    def __getitem__(self, key):
        image, target, seed, bad = super().__getitem__(key)
        return image, target if self.augment or not bad else None, seed, bad


def objects_in(masks, labels):
    """Masks (N, S, S) and labels (N,) -> torchvision's target of those with any pixel."""
    masks = masks.bool()
    kept = masks.any(dim=2).any(dim=1)
    masks = masks[kept]
    return {"boxes": mask_boxes(masks), "labels": labels[kept], "masks": masks}


# ---- Pictures ------------------------------------------------------------------------------------


def pixel_mask(mask, image_size):
    """Patch mask (B, N) -> pixel mask (B, 1, H, W)."""
    side = round(mask.shape[1] ** 0.5)
    mask = mask.view(-1, 1, side, side)
    repeat = image_size // side
    return mask.repeat_interleave(repeat, dim=2).repeat_interleave(repeat, dim=3)


def grey_out(images, hidden):
    """Images (B, 3, H, W) with the hidden pixels (B, 1, H, W), 1 = hidden, in mid-grey."""
    return images * (1 - hidden) + 0.5 * hidden


def heat(maps):
    """Maps (B, h, w), each stretched to its range -> colours (B, 3, h, w), dark is low."""
    colours = torch.tensor(HEAT_COLOURS).T / 255  # (3, anchors)
    low, high = (f(maps, dim=(1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    position = (maps - low) / (high - low).clamp(min=1e-12) * (colours.shape[1] - 1)
    left = position.floor().clamp(max=colours.shape[1] - 2).long()
    mixed = torch.lerp(colours[:, left], colours[:, left + 1], position - left)  # (3, B, h, w)
    return mixed.transpose(0, 1)


def save_picture(path, columns, gap=6):
    """Write a PNG with one row per image and one labelled column for each entry of `columns`.

    columns: {title: (B, 3, h, w) in [0, 1], clamped here}. The first column's images are shown
    pixel by pixel, small ones enlarged, or halved where there are more than 8 columns; the sizes of
    others must be whole fractions of theirs. Nothing is interpolated.
    """
    rows, _, _, size = next(iter(columns.values())).shape
    zoom = max(1, round(200 / size))
    tile = size * zoom
    if len(columns) > 8:  # ViT-B's heads
        tile = size * (zoom // 2) if zoom > 1 else size // 2
    width = (tile + gap) * len(columns) - gap
    font_size = max(17, width // 70)  # still readable where a page shows the picture smaller
    title_height = font_size + 13
    canvas = Image.new("RGB", (width, title_height + (tile + gap) * rows - gap), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=font_size)
    for column, (title, images) in enumerate(columns.items()):
        left = column * (tile + gap)
        draw.text((left + tile / 2, title_height / 2), title, "black", font, anchor="mm")
        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for row, array in enumerate(pixels):
            picture = Image.fromarray(array)
            if picture.width > tile:
                picture = picture.reduce(picture.width // tile)  # the mean of so many pixels
            picture = picture.resize((tile, tile), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, title_height + row * (tile + gap)))
    canvas.save(path)


def view(image, side=VIEW):
    """PIL image -> PIL image whose longer side is `side`, small ones enlarged pixel by pixel."""
    size = [max(1, round(n * side / max(image.size))) for n in image.size]
    small = max(image.size) < side or image.mode == "L"  # L: of classes, which do not mix
    return image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def as_square(image):
    """PIL image from `view` -> float (3, VIEW, VIEW) in [0, 1], white where it has no pixels."""
    return on_canvas(v2.functional.pil_to_tensor(image), VIEW, (255, 255, 255)) / 255


def class_colour(number):
    """A class's colour in pictures, three bytes; of any few classes, the hues are far apart."""
    colour = oklch(0.42 + 0.09 * (number % 4), 0.16, 2.4 * number)  # 2.4 rad: the golden angle
    return np.array([round(255 * c) for c in colour], np.uint8)


def draw_objects(image, objects, names):
    """PIL image -> float (3, VIEW, VIEW): boxes, masks in their class's colour, names, scores.

    objects: CPU tensors boxes (N, 4), masks (N, H, W) and labels (N,) from 1, in pixels of the
    image; maybe scores (N,). names: of the classes, label 1 first.
    """
    canvas = np.array(view(image))
    boxes = (objects["boxes"] * (VIEW / max(image.size))).tolist()
    order = objects["masks"].flatten(1).sum(dim=1).argsort(descending=True).tolist()
    numbers = (objects["labels"] - 1).tolist()
    for n in order:  # small ones last, on top
        mask = np.array(view(Image.fromarray(objects["masks"][n].byte().numpy()))) > 0
        canvas[mask] = 0.5 * canvas[mask] + 0.5 * class_colour(numbers[n])
    canvas = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for n in order:
        colour, (x, y, *_) = tuple(class_colour(numbers[n]).tolist()), boxes[n]
        draw.rectangle(boxes[n], outline=colour, width=2)
        text = names[numbers[n]]
        if "scores" in objects:
            text += f" {objects['scores'][n]:.2f}"
        length = draw.textlength(text, font)
        x, y = max(0, min(x, canvas.width - length - 6)), max(0, y - 18)  # inside the image
        draw.rectangle([x, y, x + length + 6, y + 18], colour)
        draw.text((x + 3, y + 9), text, "white", font, anchor="lm")
    return as_square(canvas)


def draw_classes(image, labels, names):
    """PIL image and class map (H, W) -> float (3, VIEW, VIEW): each class's area and name.

    Names stand in areas of at least 1 % of the image, where these are widest; unknown pixels stay
    as they are. names: of the classes, number 0 first.
    """
    canvas = np.array(view(image))
    numbers = np.array(view(Image.fromarray(labels.byte().numpy())))
    present = [n for n in np.unique(numbers).tolist() if n != IGNORED]
    for n in present:
        canvas[numbers == n] = 0.2 * canvas[numbers == n] + 0.8 * class_colour(n)
    canvas = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=17)
    for n in present:
        area = torch.from_numpy(numbers == n).float()
        if area.mean() < 0.01:
            continue
        # Where the most pixels of a neighbourhood are of the class, the border counting as others.
        near = area[None]
        for kernel in ((81, 1), (1, 81)):
            near = torch.nn.functional.avg_pool2d(near, kernel, 1, [k // 2 for k in kernel])
        near = near[0] * area
        y, x = divmod(int(near.argmax()), near.shape[1])
        half = draw.textlength(names[n], font) / 2 + 3
        x = min(max(x, half), canvas.width - half)
        draw.text((x, y), names[n], "white", font, "mm", stroke_width=2, stroke_fill="black")
    return as_square(canvas)


def read_log(log):
    """Rows of a log.jsonl, [] if there is none; a line that a full disk cut short is left out."""
    rows = []
    for line in log.read_text().splitlines() if log.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def draw_curves(path, log):
    """Draw the file log.jsonl as curves, if there is one with anything in it."""
    if rows := read_log(log):
        save_curves(path, rows, CURVES)


def save_curves(path, rows, panels, across=3):
    """Write a PNG of line charts over the epochs of a log, one for each panel that has values.

    rows: [{"epoch": number, name: value}], values may be absent. panels: {title: {name: label}},
    with the lines of one panel in one unit.
    """
    panels = {
        title: {
            label: [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
            for name, label in names.items()
            if any(row.get(name) is not None for row in rows)
        }
        for title, names in panels.items()
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    span = (rows[0]["epoch"], rows[-1]["epoch"]) if panels else ()
    charts = {title: ("epoch", *span, lines) for title, lines in panels.items()}
    if charts:
        save_charts(path, charts, across=across)


def round_ticks(low, high):
    """Two to six multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    least = (high - low) / 5  # between two ticks
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * part for part in (1, 2, 5, 10) if power * part >= least * (1 - 1e-9))
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def save_dots(path, charts, across=3):
    """Write a PNG of values by row: a dot for each, and where there are two or more their mean, in
    a bar of one standard error to either side.

    charts: {title: {row: [value, ...]}}, each chart with its own axis. across: charts in a row.
    """
    fine, width, line = 3, 260, 20  # drawn as in `save_charts`
    names = list(dict.fromkeys(name for rows in charts.values() for name in rows))
    left = 20 + int(max(map(ImageFont.load_default(size=11).getlength, names)))  # for the names
    across, high = min(across, len(charts)), line * len(names) + 62
    size = (left + width * across, high * math.ceil(len(charts) / across))
    canvas = Image.new("RGB", tuple(fine * side for side in size), "white")
    draw = ImageDraw.Draw(canvas)
    big, small = (ImageFont.load_default(size=points * fine) for points in (14, 11))
    for place, (title, rows) in enumerate(charts.items()):
        x0, y0 = (left + place % across * width) * fine, (place // across * high + 34) * fine
        x1, y1 = x0 + (width - 50) * fine, y0 + line * len(names) * fine
        values = [value for row in rows.values() for value in row]
        low, span = min(values), max(values) - min(values)
        margin = span / 12 if span > 1e-5 * abs(low) else 0.5  # equal values: in the middle
        low, span = low - margin, span + 2 * margin
        draw.text((x0, y0 - 10 * fine), title, "black", big, anchor="ls")
        for tick in round_ticks(low, low + span):
            x = x0 + (x1 - x0) * (tick - low) / span
            draw.line([(x, y0), (x, y1)], "#dddddd", fine)
            draw.text((x, y1 + 4 * fine), f"{tick:.6g}", "#555555", small, anchor="mt")
        for number, name in enumerate(names):
            y, colour = (
                y0 + line * (number + 0.5) * fine,
                CURVE_COLOURS[number % len(CURVE_COLOURS)],
            )
            if place % across == 0:
                draw.text((x0 - 10 * fine, y), name, colour, small, anchor="rm")
            row = np.array(rows.get(name, []))
            if len(row) > 1:
                error = row.std(ddof=1) / len(row) ** 0.5
                ends = [
                    x0 + (x1 - x0) * (row.mean() + sign * error - low) / span for sign in (-1, 1)
                ]
                draw.rectangle([ends[0], y - 5 * fine, ends[1], y + 5 * fine], fill="#e2e2e2")
                middle = sum(ends) / 2
                draw.line([(middle, y - 5 * fine), (middle, y + 5 * fine)], colour, 2 * fine)
            for value in row:
                x, radius = x0 + (x1 - x0) * (value - low) / span, 3 * fine
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)
    canvas.reduce(fine).save(path)


def save_charts(path, charts, *, across=3, bounds=None, legend=False):
    """Write a PNG of line charts.

    charts: {title: (what x is, its first value, its last, {label: [(x, y), ...]})}. across: charts
    in a row. bounds: (lowest, highest) y of all charts; None = each chart's own. legend: the
    charts have the same labels, which stand once, above all.
    """
    fine, width, height = 3, 300, 190  # drawn at three times the size, then averaged: no jaggies
    down, top = math.ceil(len(charts) / across), 26 if legend else 0
    canvas = Image.new("RGB", (width * across * fine, (height * down + top) * fine), "white")
    draw = ImageDraw.Draw(canvas)
    big, small = (ImageFont.load_default(size=points * fine) for points in (14, 11))
    for place, (title, (axis, first, last, lines)) in enumerate(charts.items()):
        x0, y0 = (place % across * width + 52) * fine, (place // across * height + 30 + top) * fine
        x1, y1 = x0 + (width - 70) * fine, y0 + (height - 58) * fine
        values = [value for points in lines.values() for _, value in points]
        low, high = bounds or (min(values), max(values))
        if high - low < 1e-9:  # a flat line goes through the middle
            low, high = low - 0.5, high + 0.5
        draw.text((x0, y0 - 8 * fine), title, "black", big, anchor="ls")
        for part in range(3):
            y, value = y1 + (y0 - y1) * part / 2, low + (high - low) * part / 2
            draw.line([(x0, y), (x1, y)], "#dddddd", fine)
            draw.text((x0 - 5 * fine, y), f"{value:.3g}", "#555555", small, anchor="rm")
        draw.text((x0, y1 + 5 * fine), str(first), "#555555", small, anchor="lt")
        draw.text((x1, y1 + 5 * fine), f"{axis} {last}", "#555555", small, anchor="rt")
        right, left = x1, 52 * fine  # where the next label ends, or begins
        for number, (label, points) in enumerate(lines.items()):
            colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
            line = [
                (
                    x0 + (x1 - x0) * ((x - first) / (last - first) if last > first else 0.5),
                    y1 + (y0 - y1) * (value - low) / (high - low),
                )
                for x, value in points
            ]
            draw.line(line, colour, 2 * fine, joint="curve")
            for x, y in line if len(line) <= 20 else []:
                radius = 2.5 * fine
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)
            if legend:
                draw.text((left, 20 * fine), label, colour, big, anchor="ls")
                left += draw.textlength(label, big) + 18 * fine
            else:
                draw.text((right, y0 - 8 * fine), label, colour, small, anchor="rs")
                right -= draw.textlength(label, small) + 8 * fine
    canvas.reduce(fine).save(path)
