"""Images in, pictures out.

Image convention of the whole project: float (B, 3, H, W) in [0, 1], RGB. Loaders deliver uint8
(a quarter of the traffic); `to_float` is the one place where that becomes [0, 1].

Images come from `open_sources`: a folder, `shapes` (drawn here, nothing to download), or `cifar10`.
Each source is a torch Dataset in torchvision's manner: `source[i]` is (PIL image, label).
`PretrainSet` turns one into samples for pre-training (paper, sec. 4 and supplement, Table 1),
`LabelledSet` into samples for classification (supplement, Table 2).

All randomness of a sample is a function of (seed, epoch, index): not of workers, of processes, or
of what was read before. That is what makes runs repeatable, and resumable in mid-epoch.

To copy: needs torch, torchvision, numpy and pillow, and no other file of the project.
"""

import functools
import hashlib
import itertools
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
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
# What such a file may hold, whatever its name: pillow starts another program for PostScript. JPEG
# includes MPO, the files of some cameras.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
EXIF_ORIENTATION = 0x0112  # tag: 1 = upright, 5 to 8 = lying on its side
CURVE_COLOURS = (  # of the lines of one chart
    *("#1f5fa8", "#d9731a", "#3a8f3a", "#b8324a"),
    *("#7b4fb0", "#1b9aaa", "#8a6a3d", "#666666"),
)
CURVES = {  # charts of curves.png: {title: {entry of the log: label}}, one unit each
    "pixel term": {"pixel": ""},
    "adversarial term (eq. 5)": {"adversarial": ""},
    "feature term (eq. 3)": {"feature": ""},
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

    Turns by the EXIF orientation; scales 16-bit grey to 8 bits (PIL's own conversion clips it), and
    floating-point grey, whose range is [0, 1], 8 or 16 bits by its highest value; puts transparent
    images on white, as a viewer shows them (dropping alpha alone would uncover whatever colours lie
    beneath). Palette, greyscale and CMYK are PIL's conversions.
    """
    # Older pillows open 16-bit PNGs as "I". Asked here: turned images have lost their format.
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float32)
        top = 65535 if deep or values.max() > 255 else 255
        if image.mode == "F" and values.max() <= 1:
            top = 1
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright_size(image):
    """(width, height) that a PIL image has once turned by its EXIF orientation.

    A JPEG is not decoded. TIFFs are: PIL turns their size by itself, at a moment of its own. PIL
    decodes PNGs to find the orientation.
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


def read_photograph(path, size):
    """An image file -> its centre, (1, 3, size, size) in [0, 1], as networks take it."""
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        return to_float(v2.functional.pil_to_tensor(centre_square(image, size)))[None]


def centre_square(image, size, part=1.0):
    """The centre of a PIL image, resized to (size, size).

    part: of its shorter side, or all of it where that leaves fewer pixels than `size`.
    """
    width, height = upright_size(image)
    shorter = min(width, height)
    side = min(shorter, max(size, part * shorter))
    left, top = (width - side) / 2, (height - side) / 2
    return resized_crop(image, (left, top, left + side, top + side), size)


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

    Each picture is drawn once, and kept (12 kB at 64 px), as long as `memory` has room.
    """

    radii, objects, turn = (0.26, 0.36), 1, 0.5
    memory = 2**28  # bytes, of each loader worker

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kept = {}

    def __getitem__(self, index):
        item = self.kept.get(index) or super().__getitem__(index)
        if (len(self.kept) + 1) * 3 * self.size**2 <= self.memory:
            self.kept[index] = item
        return item


DRAWN = {"shapes": Shapes, "shapes-large": LargeShapes}  # by --data


# ---- Sources: where images come from -------------------------------------------------------------


class Folder(Dataset):
    """Image files on disk. `folder[i]` is (PIL image, label); the image is opened, not decoded."""

    held_out = False  # is it one part of a folder that was split here?
    empty = ()  # class folders without images
    note = ""  # a line on what was found

    def __init__(self, files, targets, classes):
        self.files, self.targets, self.classes = files, targets, classes

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return Image.open(self.files[i], formats=IMAGE_FORMATS), self.targets[i]


def list_images(folder):
    """Sorted paths of the image files directly in a folder, and its sorted subfolders."""
    entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda e: e.name)
    images = [e.path for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES)]
    return images, [e.path for e in entries if os.path.isdir(e.path)]


def list_all_images(folder, above=()):
    """Paths of the image files in a folder and its folders, to any depth -> a list for each folder
    that has some, sorted."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that holds it
        return []
    images, subfolders = list_images(folder)
    below = [list_all_images(subfolder, (*above, real)) for subfolder in subfolders]
    return [images] * bool(images) + sum(below, [])


def scan_folder(folder, labelled=False):
    """Images in a folder, to any depth; or those of its class folders, with labels -> `Folder`.

    The label is a class folder's number, 0 where images lie in the folder itself. `empty` lists
    the class folders that hold no images, and are left out. ValueError for images that lie deeper:
    pre-training would see them, and hold out others.
    """
    images, subfolders = list_images(folder)
    if labelled and images and subfolders:
        raise ValueError(
            f"{folder} holds both images and folders ({os.path.basename(images[0])}, "
            f"{os.path.basename(subfolders[0])}/); keep images in class folders, or in one folder"
        )
    files, targets, classes, empty = images, [0] * len(images), [os.path.basename(folder)], []
    folders = 1
    if not labelled:
        by_folder = list_all_images(folder)
        files, folders = list(itertools.chain(*by_folder)), len(by_folder)
        targets = [0] * len(files)
    elif subfolders:
        inside = {subfolder: list_images(subfolder) for subfolder in subfolders}
        found = {subfolder: direct for subfolder, (direct, _) in inside.items()}
        classes, empty = [], [os.path.basename(s) for s in subfolders if not found[s]]
        for subfolder in filter(found.get, subfolders):
            files += found[subfolder]
            targets += [len(classes)] * len(found[subfolder])
            classes.append(os.path.basename(subfolder))
        folders = len(classes)
        deeper = [deep for _, below in inside.values() for deep in below if list_all_images(deep)]
        if files and deeper:
            raise ValueError(
                f"{deeper[0]}/ holds images, deeper than class folders; keep images in "
                f"{folder}/CLASS/ itself"
            )
    if not files:
        hint = ""
        if len(subfolders) == 1 and list_images(subfolders[0])[1]:
            hint = f"; are the classes in {subfolders[0]}? Then give that"
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}){hint}")
    found = Folder(files, targets, classes)
    found.empty, found.folders = empty, folders
    return found


def open_photographs(path):
    """An image file, or all in a folder, to any depth -> `Folder`; ValueError if there are none."""
    files = sum(list_all_images(path), []) if os.path.isdir(path) else [str(path)]
    if not files or not os.path.exists(path):
        what = "does not exist" if files else "holds no images"
        raise ValueError(f"{path} {what}; give a photograph, or a folder of them")
    return Folder(files, [0] * len(files), [os.path.basename(path)])


def hold_out(source, folder, seed):
    """Split a `Folder` without `val`: about 1 % of the images, at least 8, is held out.

    A hash of the seed and an image's path in `folder` decides, so that files that come or go leave
    the choice among the others as it is. But where fewer than 8 hashes are below .01, which may be
    up to 2,000 images, the 8 smallest win: a held-out image that goes brings in a trained-on one.
    """

    def draw(i):
        name = os.path.relpath(source.files[i], folder)
        digest = hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)

    draws = sorted((draw(i), i) for i in range(len(source)))
    count = max(8, sum(number < 0.01 for number, _ in draws))
    if len(source) < 2 * count:
        raise ValueError(f"{len(source)} images are too few to hold out {count}; add some")
    order = [i for _, i in draws]

    def part(indices):
        indices = sorted(indices)
        files, targets = [source.files[i] for i in indices], [source.targets[i] for i in indices]
        folder = Folder(files, targets, source.classes)
        folder.held_out = True
        return folder

    return part(order[count:]), part(order[:count])


def open_sources(data, *, image_size, seed, labelled=False):
    """(training source, validation source) for `--data`.

    data: "shapes", "shapes-large", "cifar10" (downloaded to data/ once), or a folder: one of
    images, to any depth; or one that holds `train/` and `val/` (or `valid/`, `validation/`).
    Without validation images see `hold_out`. labelled: class folders, or images alone (one class).
    A note says what was found, and what is not used.
    ValueError or OSError says what is wrong with it and what to do.
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
    here, unused = root, []
    names = [name for name in ("val", "valid", "validation") if (root / name).is_dir()]
    if (root / "train").is_dir():
        loose, folders = list_images(root)
        here, unused = root / "train", [os.path.basename(f) for f in (*folders, *loose)]
        unused.remove("train")
    elif names:
        raise ValueError(
            f"{root} has {names[0]}/, but no train/: move the other images to {root}/train, or "
            f"rename {names[0]}/"
        )
    found = scan_folder(here, labelled)
    if names:
        train, val = found, scan_folder(root / names[0], labelled)
        unused.remove(names[0])
        rest = f"{len(val)} for validation in {names[0]}/"
    else:
        train, val = hold_out(found, here, seed)
        what = "no val/: " if unused or here != root else ""
        rest = f"{what}{len(val)} of them, a choice of seed {seed}, are held out for validation"
    folders = f"{found.folders} folder{'s' * (found.folders > 1)}"
    train.note = f"{here}: {len(found)} images in {folders}, {rest}"
    empty = [*found.empty, *(name for name in val.empty if val.empty is not found.empty)]
    if empty:
        train.note += f"; folders without images: {', '.join(sorted(set(empty))[:3])}"
    if unused:
        train.note += f"; not used: {', '.join(unused[:3])}{', ...' * (len(unused) > 3)}"
    return train, val


# ---- Samples and batches -------------------------------------------------------------------------


def sample_shape(image_size, views=1):
    """Of one image, or of the views of one image."""
    one = (3, image_size, image_size)
    return one if views == 1 else (views, *one)


class PretrainSet(Dataset):
    """Samples for pre-training: `set[(epoch, index)]` is (image, mask_noise, seed, bad).

    image: uint8 (3, S, S). mask_noise: (N,), which fixes the mask. seed: int, for whatever else
    this sample draws. bad: [(index, reason)] of files that could not be read on the way to a
    readable one; the next image stands in for them. After more than `bad_limit` the image is black:
    end the run then, and show the reasons (train.py's `note_bad_images`). They may be a source's or
    a transform's own errors.

    With `epoch_images` an epoch has that many samples. It repeats images if they are fewer, each
    time with draws of its own: pre-training on 1 to 1000 images (Kong and Zhang 2023, Table 6, who
    do not say how long an epoch is). What does not fit in one epoch comes in the next.

    PAPER: supplement, Table 1: RandomResizedCrop and colour jitter 0.4 (the text: as MAE, which
    has no jitter; --jitter 0). PAPER SILENT: crop scale (.2, 1) and flips are MAE's; jitter is of
    brightness, contrast and saturation, not of hue (the authors' code varies gamma under the name
    of brightness).
    """

    prefetch = 4  # batches that each loader worker has ready

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
    ):
        self.shape = sample_shape(image_size)
        self.source, self.image_size, self.num_patches = source, image_size, num_patches
        self.epoch_images = epoch_images
        self.seed, self.augment, self.crop_min = seed, augment, crop_min
        self.flip = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
        self.distort = v2.ColorJitter(jitter, jitter, jitter)
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
        return torch.rand(self.num_patches)

    def transform(self, image):
        """PIL image -> uint8 (3, S, S)."""
        image = self.cropped(image)
        return v2.functional.pil_to_tensor(self.distort(image) if self.augment else image)

    def cropped(self, image):
        """PIL image -> PIL image (S, S): a random crop, mirrored at times, or else the centre."""
        width, height = upright_size(image)
        if self.augment:
            shape = torch.empty(1, height, width, device="meta")  # all that torchvision asks for
            top, left, h, w = v2.RandomResizedCrop.get_params(
                shape, scale=[self.crop_min, 1.0], ratio=[3 / 4, 4 / 3]
            )
            box = (left, top, left + w, top + h)
            return self.flip(resized_crop(image, box, self.image_size))
        return centre_square(image, self.image_size, self.centre)


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
    is skipped half of the time. torchvision divides the same range into 30 steps. DIFFERS:
    torchvision has 14 operations, Identity among them; MAE's library has Invert and SolarizeAdd
    instead.
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
    """Samples -> (images uint8 (B, 3, S, S), companions, seeds (B,), bad).

    companions: tensors become one, mask_noise (B, N) or labels (B,); anything else stays a list.
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
    """DataLoader of `PretrainSet` or `LabelledSet` samples; workers that train outlive epochs."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0 and dataset.augment,
        prefetch_factor=dataset.prefetch if workers else None,
        worker_init_fn=ignore_signals,
    )


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


def read_log(log):
    """Rows of a log.jsonl, [] if there is none; a line that a full disk cut short is left out."""
    rows = []
    for line in log.read_text().splitlines() if log.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def draw_curves(path, log, panels=CURVES):
    """Draw the file log.jsonl as curves, if there is one with anything in it."""
    if rows := read_log(log):
        save_curves(path, rows, panels)


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
            margin = abs(low) / 10 or 0.5
            low, high = low - margin, high + margin
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
            if line:  # a run may lack what another has
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
