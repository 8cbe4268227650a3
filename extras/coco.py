"""COCO's files, masks and average precision, without pycocotools.

No script: extras/detect.py measures with it. In order: average precision; results, as COCO's tools
take them; masks; the reader of a data set. The same values as pycocotools', digit for digit.

To copy: average precision and masks need numpy and torch alone. Cut `write_results`, which takes a
line of train.py, and the reader, which needs data.py and dense.py, with their imports.
"""

import json
import os
from contextlib import suppress
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import data
import train
from extras import dense

# ---- Average precision ---------------------------------------------------------------------------

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # T
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # A ranges, pixels
RECALLS = np.linspace(0, 1, 101)


def overlaps(found, truth, crowd):
    """Intersection over union of D detections with G objects, (D, G), and the former's areas (D,).

    found, truth: float64 boxes (D, 4) and (G, 4), xyxy, or bool masks (D, H, W) and (G, H, W).
    crowd: (G,) bool, COCO's iscrowd, one mask for a group of objects: there the intersection is
    divided by the detection's own area, not by the union.
    """
    if found.ndim == 3:
        pixels, shared = found[0].size, np.zeros((len(found), len(truth)))
        found, truth = (x.reshape(-1, pixels) for x in (found, truth))
        for start in range(0, pixels, 2**16):  # float32 is fast and, of a part, small and exact
            part = slice(start, start + 2**16)
            shared += found[:, part].astype(np.float32) @ truth[:, part].astype(np.float32).T
        area, other = (x.sum(axis=1).astype(np.float64) for x in (found, truth))
    else:
        low = np.maximum(found[:, None, :2], truth[None, :, :2])
        high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
        shared = (high - low).clip(0).prod(axis=2)
        area, other = ((x[:, 2:] - x[:, :2]).prod(axis=1) for x in (found, truth))
    union = np.where(crowd, area[:, None], area[:, None] + other - shared)
    return shared / np.maximum(union, 1e-12), area


def match_class(ious, crowd, ignored):
    """Give detections of one class, best first, an object each: two bool arrays (D, A, T).

    ious: (D, G), crowd: (G,), ignored: (A, G), objects that count neither way in an area range.
    Returns: was there an object? is it ignored? Each detection in turn takes the free object that
    overlaps it most, and an ignored one only where no other is left; a crowd stays free.
    """
    D, G = ious.shape
    A, T = len(ignored), len(IOU_THRESHOLDS)
    hit, unseen = np.zeros((D, A, T), bool), np.zeros((D, A, T), bool)
    taken = np.zeros((A, T, G), bool)
    for d in range(D if G else 0):
        fits = (ious[d] >= IOU_THRESHOLDS[:, None]) & (~taken | crowd)  # (A, T, G)
        rank = np.where(fits, ious[d] + np.where(ignored, 0, 2)[:, None], -1)
        picked = G - 1 - rank[..., ::-1].argmax(axis=2)  # of equals the last, as COCO
        hit[d] = fits.any(axis=2)
        unseen[d] = hit[d] & np.take_along_axis(ignored, picked, axis=1)
        taken |= hit[d][..., None] & (picked[..., None] == np.arange(G))
    return hit, unseen


def match_detections(found, truth, *, masks=False):
    """Compare an image's detections with its objects -> dict of arrays for `average_precision`.

    found: {"scores" (D,), "labels" (D,), "boxes" (D, 4) or, with masks=True, "masks" (D, H, W)}.
    truth: {"labels" (G,), "crowd" (G,), "area" (G,), and the same}. CPU tensors; boxes are xyxy,
    all in pixels of the image itself, since AREAS are. The best 100 of each class take part. A
    mask within an object that has no outline, "outlined" (G,), counts neither way.
    """
    key = "masks" if masks else "boxes"
    found, truth = ({k: np.asarray(v) for k, v in x.items()} for x in (found, truth))
    crowd = truth["crowd"]
    if masks and "outlined" in truth:  # where there is a box alone, no mask is right or wrong
        crowd = crowd | ~truth["outlined"]
    found[key], truth[key] = (x[key].astype(bool if masks else np.float64) for x in (found, truth))
    low, high = AREAS.T[:, :, None]
    ignored = (truth["area"] < low) | (truth["area"] > high) | crowd  # (A, G)
    chosen, hits, unseen = [np.zeros(0, np.int64)], [], []
    for label in np.unique(found["labels"]):
        best = np.flatnonzero(found["labels"] == label)
        best = best[np.argsort(-found["scores"][best], kind="stable")][:100]
        mine = np.flatnonzero(truth["labels"] == label)
        ious, area = overlaps(found[key][best], truth[key][mine], crowd[mine])
        hit, skip = match_class(ious, crowd[mine], ignored[:, mine])
        outside = ((area < low) | (area > high)).T[:, :, None]  # (D, A, 1)
        chosen, hits, unseen = [*chosen, best], [*hits, hit], [*unseen, skip | (~hit & outside)]
    chosen, none = np.concatenate(chosen), np.zeros((0, len(AREAS), len(IOU_THRESHOLDS)), bool)
    return {
        "labels": found["labels"][chosen],
        "scores": found["scores"][chosen],
        "hit": np.concatenate([none, *hits]),  # (D, A, T): is there an object?
        "unseen": np.concatenate([none, *unseen]),  # (D, A, T): counts neither way
        "truth": truth["labels"],
        "counted": ~ignored.T,  # (G, A)
    }


def average_precision(matches):
    """COCO's average precision -> {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"}.

    matches: `match_detections` of every image, by ascending image id (equal scores keep the order).
    Precision, made to fall with recall, is averaged over 101 recalls, over the classes that have
    objects and, but for ap50 and ap75, over the IoUs .5 to .95: in [0, 1], or -1 without objects.
    """
    pool = {name: np.concatenate([match[name] for match in matches]) for name in matches[0]}
    order = np.argsort(-pool["scores"], kind="stable")
    labels, hit, unseen = (pool[name][order] for name in ("labels", "hit", "unseen"))
    classes = np.unique(pool["truth"])
    precision = np.full((len(classes), len(AREAS), len(IOU_THRESHOLDS)), np.nan)
    for k, a, t in np.ndindex(precision.shape):
        objects = pool["counted"][pool["truth"] == classes[k], a].sum()
        right = hit[(labels == classes[k]) & ~unseen[:, a, t], a, t]
        if objects:
            found = right.cumsum()
            curve = found / np.arange(1, len(found) + 1)
            curve = np.maximum.accumulate(curve[::-1])[::-1]  # the best at this recall or more
            place = np.searchsorted(found / objects, RECALLS)  # past the end: never reached
            precision[k, a, t] = np.append(curve, 0)[place].mean()

    def mean(values):
        values = values[~np.isnan(values)]
        return values.mean().item() if len(values) else -1.0

    scores = {"ap": precision[:, 0], "ap50": precision[:, 0, 0], "ap75": precision[:, 0, 5]}
    for a, name in enumerate(("ap_small", "ap_medium", "ap_large"), start=1):
        scores[name] = precision[:, a]
    return {name: mean(values) for name, values in scores.items()}


# ---- Results -------------------------------------------------------------------------------------


def as_results(found, source, index):
    """An image's detections as entries of COCO's result format, boxes and masks together."""
    numbers = (found[name].tolist() for name in ("boxes", "labels", "scores"))
    return [
        {
            "image_id": source.image_ids[index],
            "category_id": source.category_ids[label - 1],
            "score": score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": mask_to_rle(mask),
        }
        for (x0, y0, x1, y1), label, score, mask in zip(*numbers, found["masks"], strict=True)
    ]


def write_results(out, results):
    """Write `as_results` of all images: a file of boxes, and one of masks."""
    for kind, other in (("bbox", "segmentation"), ("segm", "bbox")):
        # Apart: COCO's tools take the area of an entry with both from its box.
        rows = [{k: v for k, v in row.items() if k != other} for row in results]
        path = Path(out) / f"results_{kind}.json"
        with train.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))


# ---- Masks ---------------------------------------------------------------------------------------


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


def run_lengths(counts):
    """COCO's run lengths, a list or compressed to a string (see `mask_to_rle`) -> int64 array."""
    if isinstance(counts, str):
        text, counts, value, shift = counts, [], 0, 0
        for code in text.encode():
            group = code - 48
            value |= (group & 31) << shift
            shift += 5
            if group & 32 == 0:  # the number's last group; its highest bit is the sign
                value -= (group & 16) << (shift - 4)
                counts.append(value + counts[-2] if len(counts) > 2 else value)
                value, shift = 0, 0
    runs = np.asarray(counts, np.int64)
    if not isinstance(counts, str) and (runs != counts).any():
        raise ValueError("has run lengths that are not whole numbers")
    return runs


def rle_to_mask(counts, height, width):
    """COCO's run lengths -> bool (height, width) array. ValueError if they are of another size.

    counts: lengths of alternate runs of 0 and 1, column by column, the first of 0, or a string.
    """
    runs = run_lengths(counts)
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


def box_to_mask(box, height, width):
    """A box (x0, y0, x1, y1) in pixels, filled: bool (height, width) array, at least one pixel."""
    x0, y0, x1, y1 = (round(value) for value in box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    mask = np.zeros((height, width), bool)
    mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    return mask


# ---- The reader ----------------------------------------------------------------------------------


def find_files(folder, split):
    """-> (the file of annotations, the folder of its images, are both parts in it?).

    In COCO's own layout, in that of annotation tools, which keep the file beside its images, or as
    one file for all images. ValueError: what is missing, and what is taken.
    """
    folder = Path(folder)
    own = folder / "annotations" / f"instances_{split}2017.json"
    names = {"train": ["train"], "val": ["valid", "val", "validation"]}[split]
    beside = [(folder / name / "_annotations.coco.json", folder / name) for name in names]
    for path, images in [(own, folder / f"{split}2017"), *beside]:
        if path.is_file():
            return path, images, False
    if (folder / "annotations.json").is_file():
        return folder / "annotations.json", folder / "images", True
    if (folder / "annotations" / "training").is_dir():
        raise ValueError(f"{own} is missing: this is ADE20K's layout, of segmentation")
    raise ValueError(
        f"{own} is missing: give annotations/instances_train2017.json, instances_val2017.json, "
        "train2017/ and val2017/; or train/ and valid/, _annotations.coco.json in each beside its "
        "images; or annotations.json and images/"
    )


def compact(row):
    """A JSON object, its polygons as arrays: a quarter of the memory while the file is read."""
    outline = row.get("segmentation")
    if isinstance(outline, list):
        # `CocoScenes` says which annotation it is.
        with suppress(OverflowError, TypeError, ValueError):
            row["segmentation"] = [np.array(part, np.float64) for part in outline]
    return row


class CocoScenes(Dataset):
    """A COCO data set: `scenes[i]` is (PIL image, its objects); the image is opened, not decoded.

    Objects are a dict of tensors: boxes (N, 4) float64, xyxy in pixels; labels (N,) int64 from 1 (0
    is the background); masks (N, H, W) bool; outlined (N,) bool: does the file have an outline, or
    a box alone, which then is the mask, filled? crowd (N,) bool: is it a group of objects? area
    (N,) float64, as listed, or else counted. classes[label - 1] is a label's name,
    category_ids[label - 1] its number in COCO's files, image_ids[i] that of image i, ascending.
    note: a line on what was found, and what was left out.

    Annotations lie in flat arrays, which loader workers share: touching a million Python objects
    would copy them into each worker.

    folder: see `find_files`. ValueError, one line, for what is wrong in the file or does not fit
    its images; reading an image of another size than listed raises it, too.
    """

    FAR = 10  # image sides; a corner further away is an error, and would take gigabytes to draw

    def __init__(self, folder, split):
        self.path, images, both = find_files(folder, split)
        try:
            content = json.loads(self.path.read_bytes(), object_hook=compact)
            parts = [content[key] for key in ("images", "categories", "annotations")]
            if not all(isinstance(row, dict) for row in chain(*parts)):
                raise TypeError("entries that are no objects")
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.path} is torn or not COCO's ({what}); replace it") from error
        listed, categories, rows = parts
        one = (int, float, str)
        listed = self._sorted(listed, "image", id=one, file_name=str, width=None, height=None)
        categories = self._sorted(categories, "category", id=one, name=str)
        self.category_ids = [row["id"] for row in categories]
        self.classes = [row["name"] for row in categories]
        every = {row["id"] for row in listed}
        if both:  # one file: every tenth image is held out
            listed = [row for n, row in enumerate(listed) if (n % 10 == 9) == (split == "val")]
        if not listed:
            raise ValueError(f"{self.path} lists no images for {split}; add some, at least ten")
        self.image_ids = [row["id"] for row in listed]
        self.sizes = np.array([self._size(row) for row in listed])  # (images, 2): height, width
        self.files = [self._file(row, images) for row in listed]
        absent = [file for file in self.files if not os.path.isfile(file)]
        if absent:
            raise ValueError(
                f"{len(absent)} images of {self.path} are not there, such as {absent[0]}; get the "
                "images again, or take them out of the list"
            )
        self._read(rows, every)
        self.note += ", every tenth image held out" if both else ""

    def _sorted(self, rows, kind, **keys):
        """Entries by ascending id; ValueError if one lacks a key or is listed twice."""
        for n, row in enumerate(rows):
            for key, wanted in keys.items():
                if key not in row or (wanted and not isinstance(row[key], wanted)):
                    name = row.get("id", f"number {n + 1}")
                    raise ValueError(
                        f"{self.path}: {kind} {name} has no {key}, or none that can be read "
                        f"({row.get(key)!r}); replace the file"
                    )
        try:
            rows = sorted(rows, key=lambda row: row["id"])
        except TypeError as error:
            raise ValueError(f"{self.path}: ids of another kind each ({error})") from error
        for one, other in pairwise(rows):
            if one["id"] == other["id"]:
                raise ValueError(
                    f"{self.path}: {kind} {one['id']} is listed twice; replace the file"
                )
        return rows

    def _size(self, row):
        """[height, width] of an image's entry; some tools write them as 640.0."""
        for key in ("height", "width"):
            value = row[key]
            if not (isinstance(value, (int, float)) and value >= 1 and value % 1 == 0):
                raise ValueError(
                    f"{self.path}: image {row['id']} has {key} {value!r}, which is no number of "
                    "pixels; replace the file"
                )
        return [int(row["height"]), int(row["width"])]

    def _file(self, row, images):
        """Path of an image; ValueError if it would lie outside of the folder of images."""
        name = Path(row["file_name"])
        if ".." in name.parts or name.is_absolute():
            raise ValueError(
                f"{self.path}: file_name {name} of image {row['id']} leaves the folder of images; "
                "give it relative to that"
            )
        return str(images / name)

    def _read(self, rows, every):
        """Fill the arrays of objects from the file's annotations; every: ids of all its images."""
        place = {image_id: i for i, image_id in enumerate(self.image_ids)}
        label = {category_id: n for n, category_id in enumerate(self.category_ids, start=1)}
        found = []  # (image, label, box, area, crowd, is it run lengths?), their outlines
        none = outside = reach = 0
        for number, row in enumerate(rows):
            try:
                image, category = row["image_id"], row["category_id"]
                if image not in every:
                    raise ValueError(f"is of image {image}, which is not listed")
                if category not in label:
                    raise ValueError(f"is of category {category}, which is not listed")
                if image not in place:
                    continue
                box, area = self._box(row), row.get("area")
                outline, runs = self._outline(row, self.sizes[place[image]].tolist())
                area = np.nan if area is None else float(area)  # counted when it is drawn
                crowd = row.get("iscrowd")
                if crowd not in (0, 1, None):
                    raise ValueError(f"has iscrowd {crowd!r}, not 0 or 1")
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
                name = row.get("id", f"number {number + 1}")
                what = f"has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{self.path}: annotation {name} {what}; replace it") from error
            if not outline and (box[2:] <= box[:2]).any():
                none += 1
                continue
            beyond = (box[2:] <= 0) | (box[:2] >= self.sizes[place[image]][::-1])
            if (box[2:] > box[:2]).all() and beyond.any():
                outside += 1
                continue
            reach = max(reach, *box[2:], *(np.inf if runs else part.max() for part in outline))
            crowd = bool(crowd)
            found.append((place[image], label[category], *box, area, crowd, runs, outline))

        if found and reach <= 1:
            raise ValueError(f"{self.path} has no corner beyond pixel 1: give boxes in pixels")
        found.sort(key=lambda row: row[0])  # stable: an image's objects as the file has them
        *columns, outlines = zip(*found, strict=True) if found else [[]] * 10
        columns = np.array(columns, np.float64)
        self.labels, (self.crowd, self.runs) = columns[1].astype(np.int64), columns[7:9] > 0
        self.boxes, self.areas = np.ascontiguousarray(columns[2:6].T), columns[6]
        # Image i has objects first[i] to first[i + 1], object n the parts part[n] to part[n + 1],
        # and part k the numbers number[k] to number[k + 1]: coordinates, or run lengths.
        self.first = np.searchsorted(columns[0], np.arange(len(place) + 1))
        parts = list(chain.from_iterable(outlines))
        self.part = np.cumsum([0, *map(len, outlines)])
        self.number = np.cumsum([0, *map(len, parts)])
        self.numbers = np.concatenate([np.zeros(0), *parts])

        alone = int((np.diff(self.part) == 0).sum())
        self.note = f"{self.path}: {len(found)} objects of {len(self.classes)} classes"
        self.note += f" in {len(place)} images"
        if alone:
            self.note += f", {alone} of them boxes without an outline"
        if none:
            warning = "; warning: " if 4 * none >= len(found) + none else "; "
            self.note += f"{warning}{none} left out, which have neither an outline nor an area"
        if outside:
            self.note += f"; warning: {outside} left out, which lie outside of their images"

    def _box(self, row):
        """An annotation's box as x0, y0, x1, y1."""
        box = np.array(row["bbox"], np.float64)
        if box.shape != (4,):
            raise ValueError(f"has a box of {box.size} numbers, not 4")
        if not np.isfinite(box).all() or box[2:].min() < 0:
            raise ValueError(f"has a box of width and height {box[2:].tolist()}")
        return np.array([*box[:2], *(box[:2] + box[2:])])

    def _outline(self, row, size):
        """An annotation's outline: polygons, or one array of run lengths -> (arrays, is it that?).

        Without an outline: no arrays. size: [height, width] of its image.
        """
        outline = row.get("segmentation")
        if isinstance(outline, dict):
            if [float(side) for side in outline["size"]] != size:
                raise ValueError(
                    f"has a mask of {outline['size']}, its image {size} (height, width)"
                )
            runs = run_lengths(outline["counts"])
            rle_to_mask(runs, *size)  # do they fill the image?
            return [runs], True
        polygons, reach = outline or [], self.FAR * max(size)
        for polygon in polygons:
            if not isinstance(polygon, np.ndarray) or polygon.ndim != 1 or len(polygon) % 2:
                raise ValueError("has a segmentation that is not lists of x, y, x, y, ...")
            if not (abs(polygon) <= reach).all():
                raise ValueError(f"has corners more than {self.FAR} sides away from its image")
        return [polygon for polygon in polygons if len(polygon) >= 6], False

    def __len__(self):
        return len(self.files)

    def _mask(self, n, height, width):
        """The mask of object n."""
        parts = range(self.part[n], self.part[n + 1])
        arrays = [self.numbers[self.number[k] : self.number[k + 1]] for k in parts]
        if not arrays:
            return box_to_mask(self.boxes[n].tolist(), height, width)
        if self.runs[n]:
            return rle_to_mask(arrays[0], height, width)
        return polygons_to_mask(arrays, height, width)

    def __getitem__(self, i):
        image = Image.open(self.files[i], formats=data.IMAGE_FORMATS)
        height, width = self.sizes[i].tolist()
        if not dense.lies_as(image, (width, height)):
            raise ValueError(
                f"{self.files[i]} has {data.upright_size(image)} pixels (width, height), its masks "
                f"{(width, height)}, says {self.path}; replace one of them"
            )
        objects = slice(self.first[i], self.first[i + 1])
        masks = np.zeros((objects.stop - objects.start, height, width), bool)
        for mask, n in zip(masks, range(objects.start, objects.stop), strict=True):
            mask[:] = self._mask(n, height, width)
        outlined = np.diff(self.part[objects.start : objects.stop + 1]) > 0
        boxes, area = self.boxes[objects].copy(), self.areas[objects]
        counted = np.where(
            outlined, masks.sum(axis=(1, 2)), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        )
        area = np.where(np.isnan(area), counted, area)
        parts = dict(boxes=boxes, labels=self.labels[objects].copy(), masks=masks)
        parts |= dict(outlined=outlined, crowd=self.crowd[objects].copy(), area=area)
        return image, {name: torch.from_numpy(values) for name, values in parts.items()}
