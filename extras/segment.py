"""Label pixels with a pre-trained encoder: UperNet (paper, Table 3; supplement A.2).

    python -m extras.segment --checkpoint runs/mse/checkpoint.pt --data path/to/ade20k
    torchrun --nproc_per_node=8 -m extras.segment --checkpoint runs/mse/checkpoint.pt --data ...
    python -m extras.segment --eval --checkpoint runs/mse/segment/best.pt --data path/to/ade20k
    python -m extras.segment --predict photo.jpg --checkpoint runs/mse/segment/best.pt

--checkpoint as in finetune.py; --data: ADE20K's own layout (see `MapScenes`; own maps whose 0 is a
class want --unknown 255), or shapes. In order: what a step minimises; the network; measuring;
samples; files of class maps; pictures; the command line. What detection has, too, is in dense.py.

Writes to OUT as finetune.py does: best.pt is that of the highest mIoU; log.jsonl has, in per cent,
miou over the classes in truth or prediction, miou_all over all, and pixel_accuracy. Each
measurement, --eval's too, writes pictures/segmentation.png. --predict writes predictions/: a map of
each photograph as PNG, with the labels that training's files had, in colours.
"""

import math
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

import data
import finetune
import train
from extras import dense

SCRIPT = "extras/segment.py"  # who writes the checkpoints
CURVES = {  # panels of curves.png, see data.CURVES
    "loss": {"loss": ""},
    "classes, %": {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"},
}
IGNORED = 255  # label of pixels that count nowhere
LAYER_DECAY, WIDTH = 0.65, 512  # where no flag says otherwise
MUST_FIT = (*dense.MUST_FIT, "unknown")  # for a checkpoint to continue

# ---- One step: what is minimised -----------------------------------------------------------------


def segmentation_terms(run, images, maps, progress, args):
    """Loss of a batch -> {"loss": scalar}. maps: classes (B, S, S), 255 = not known."""
    with run.autocast():
        logits, second = run.network(images)  # (B, classes, S, S) each
    maps = maps.to(run.device, non_blocking=True)
    return {"loss": segmentation_loss(logits, maps, second)}


def segmentation_loss(logits, target, aux_logits):
    """Mean cross-entropy of the labelled pixels, plus .4 times that of the second head.

    logits, aux_logits: (B, classes, H, W). target: (B, H, W), integers; 255 = ignored. Returns:
    scalar, 0 with a gradient of 0 where all pixels are ignored (F.cross_entropy: NaN).
    PAPER SILENT: the loss and the weight; both are mmsegmentation's. DIFFERS: it divides by the
    number of all pixels, ignored ones included.
    """
    target = target.long()
    labelled = (target != IGNORED).sum().clamp(min=1)

    def mean(x):
        return F.cross_entropy(x.float(), target, ignore_index=IGNORED, reduction="sum") / labelled

    return mean(logits) + 0.4 * mean(aux_logits)


# ---- UperNet -------------------------------------------------------------------------------------


def conv_norm(c_in, c_out, kernel):
    """Convolution, norm, ReLU: (B, c_in, h, w) -> (B, c_out, h, w)."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, dense.group_norm(c_out), nn.ReLU())


def resize(x, side):
    """(B, C, h, w) -> (B, C, side, side), bilinear."""
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


class Segmenter(dense.FeaturePyramid):
    """UperNet (Xiao et al. 2018) over the pyramid of a ViT: a class for every pixel.

    PAPER: supplement A.2. PAPER SILENT: all else; the head is that of mmsegmentation's ViTs, where
    the first maps are fused as an FPN does and the last is pooled to the image's context, with a
    second head on the map of one patch a cell, in training alone. GroupNorm replaces its
    SyncBatchNorm; and the last layers start as torch has them: its N(0, .01), made for a width of
    512, holds narrow heads back: at 64, for 80 steps and more.
    """

    BINS = (1, 2, 3, 6)  # sides to which the last map is pooled

    def __init__(self, encoder, classes, width):
        super().__init__(encoder, width)
        *channels, last = self.channels
        self.pooled = nn.ModuleList(conv_norm(last, width, 1) for _ in self.BINS)
        self.context = conv_norm(last + len(self.BINS) * width, width, 3)
        self.laterals = nn.ModuleList(conv_norm(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(conv_norm(width, width, 3) for _ in channels)
        self.fuse = nn.Sequential(conv_norm(4 * width, width, 3), nn.Dropout2d(0.1))
        self.aux = nn.Sequential(conv_norm(channels[-1], width // 2, 3), nn.Dropout2d(0.1))
        self.classify = nn.Conv2d(width, classes, 1)
        self.aux_classify = nn.Conv2d(width // 2, classes, 1)

    def forward(self, images):
        """Images (B, 3, S, S) in [0, 1] -> logits (B, classes, S, S), float32.

        In training: (logits, those of the second head), for `segmentation_loss`. Both are computed
        at 1/4 and 1 patch a cell, and enlarged bilinearly.
        """
        maps, S = self.maps(images), images.shape[-1]
        x = self.fuse(self.decode(maps))
        # float32 whatever the autocast: half precision would tie logits that differ by a 16th
        with torch.autocast(images.device.type, enabled=False):
            logits = resize(self.classify(x.float()), S)
        if not self.training:
            return logits
        x = self.aux(maps[2])
        with torch.autocast(images.device.type, enabled=False):
            return logits, resize(self.aux_classify(x.float()), S)

    def decode(self, maps):
        """The pyramid's four maps -> (B, 4 width, s, s), each as large as the finest."""
        *maps, last = maps
        pooled = [
            resize(layers(F.adaptive_avg_pool2d(last, side)), last.shape[-1])
            for layers, side in zip(self.pooled, self.BINS, strict=True)
        ]
        merged = [self.context(torch.cat([last, *pooled], dim=1))]
        laterals = [layers(x) for layers, x in zip(self.laterals, maps, strict=True)]
        for x in reversed(laterals):  # what is coarser is added to what is finer
            merged.insert(0, x + resize(merged[0], x.shape[-1]))
        fine = [layers(x) for layers, x in zip(self.smooth, merged[:-1], strict=True)]
        side = fine[0].shape[-1]
        return torch.cat([resize(x, side) for x in [*fine, merged[-1]]], dim=1)


def build_run(args, weights, device):
    """What trains a segmenter; see `dense.build_run`."""
    task = dict(part="segmenter", terms=segmentation_terms, evaluate=evaluate_segmenter)
    task |= dict(score="miou", script=SCRIPT, curves=CURVES, must_fit=MUST_FIT)
    return dense.build_run(Segmenter, args, weights, device, **task)


# ---- Measuring -----------------------------------------------------------------------------------


def segment(run, batch, args):
    """A batch's class maps -> [(map (H, W), truth {"map", ...})] of its readable images."""
    images, targets, *_ = batch
    network, pairs = train.unwrap(run.network), []
    with run.autocast():
        if not args.slide:
            outputs = network(data.to_float(images.to(run.device)))  # (B, classes, S, S)
    for number, truth in enumerate(targets):
        if truth is None:
            continue
        place = truth["letterbox"]
        if args.slide:
            with run.autocast():
                image = data.to_float(truth["whole"].to(run.device))
                logits = slide(network, image, args.image_size, args.batch_size)
            place = place._replace(rows=logits.shape[1], columns=logits.shape[2])
        else:
            logits = outputs[number]
        pairs.append((class_map(logits, place).cpu(), truth))
    return pairs


def class_map(logits, place):
    """Logits (classes, S, S) of a letterbox -> the likeliest classes (H, W) of its image's pixels.

    A few classes at a time: of all 150 of ADE20K a photograph of 12 megapixels would take 7 GB.
    """
    best, classes = logits.new_tensor(-math.inf), 0
    for number, some in enumerate(logits.split(8)):
        value, index = dense.maps_to_image(some, place).max(dim=0)  # (H, W) each
        classes = torch.where(value > best, index + 8 * number, classes)
        best = torch.maximum(value, best)
    return classes


def slide(network, image, side, batch_size):
    """Mean logits (classes, h, w) of all windows of an image (3, h, w).

    PAPER SILENT: measuring. MMSegmentation's windows, side x side, each two thirds of a side after
    the one before; the last end where the image ends. Where that is narrower than a window, the
    mean colour fills the rest. batch_size: windows that the network sees at a time.
    """
    height, width = image.shape[1:]
    fill = image.new_tensor(data.MEAN_COLOUR).view(3, 1, 1) / 255
    canvas = fill.repeat(1, max(side, height), max(side, width))
    canvas[:, :height, :width] = image
    starts, step = [], 2 * side // 3
    for length in canvas.shape[1:]:
        count = 1 + math.ceil((length - side) / step)
        starts.append([min(i * step, length - side) for i in range(count)])
    places = [(slice(y, y + side), slice(x, x + side)) for y in starts[0] for x in starts[1]]
    windows = torch.stack([canvas[:, rows, columns] for rows, columns in places])
    windows = torch.cat([network(part) for part in windows.split(batch_size)])
    total = windows.new_zeros(windows.shape[1], *canvas.shape[1:])
    count = torch.zeros_like(total[:1])
    for (rows, columns), logits in zip(places, windows, strict=True):
        total[:, rows, columns] += logits
        count[:, rows, columns] += 1
    return (total / count)[:, :height, :width]


@torch.no_grad()
def evaluate_segmenter(run, loader, known, args):
    """`segmentation_scores` over the whole validation set, in per cent -> row.

    Measured at the images' own size. Draws the picture. loader, known: see
    `finetune.evaluate_classifier`.
    """
    network, found, classes = train.unwrap(run.network).eval(), {}, len(args.classes)
    matrix, images = torch.zeros(classes, classes, dtype=torch.long), 0
    for batch in train.renewing(loader, args.out):
        found |= dict(batch[3])
        for labels, truth in segment(run, batch, args):
            matrix += confusion_matrix(labels, truth["map"], classes)
            images += 1
    finetune.note_unread(found, known, loader.dataset)
    matrices, counts = zip(*train.of_all_processes((matrix, images)), strict=True)
    if not sum(matrices).any():
        train.fail(f"no pixel of the validation maps is known: is --unknown {args.unknown} right?")
    row = segmentation_scores(sum(matrices))
    if train.is_main():
        draw_segmentation(run, loader.dataset, args)
    network.train()
    return {name: 100 * value for name, value in row.items()} | {"val_images": sum(counts)}


@torch.no_grad()
def predict(run, dataset, args):
    """--predict: write the class maps of photographs."""
    train.unwrap(run.network).eval()
    unread = {}
    for batch in finetune.shard(dataset, args):
        unread |= dict(batch[3])
        for classes, about in segment(run, batch, args):
            path = dense.prediction_path(args, dataset.source.files[about["index"]], about["index"])
            with train.writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_map(path, classes, args.unknown)
    finetune.note_unread(unread, [], dataset)
    train.of_all_processes(None)  # all have written
    train.say(f"done: {args.out}/predictions/")


def confusion_matrix(prediction, target, classes):
    """(classes, classes) int64, pixels by true (row) and predicted class; sums over images add up.

    prediction, target: integers of one shape; target 255, unknown, does not count.
    """
    known = target != IGNORED
    pairs = target[known].long() * classes + prediction[known].long()
    return pairs.bincount(minlength=classes * classes).view(classes, classes)


def segmentation_scores(matrix):
    """`confusion_matrix` of a whole set -> {"miou", "miou_all", "pixel_accuracy"} in [0, 1].

    IoU of a class: correct pixels / (pixels predicted as it + pixels of it - correct pixels).
    miou: mean over classes in truth or prediction (MMSegmentation's). miou_all: over all classes,
    where absent ones count as 0 (the SceneParsing benchmark's).
    """
    matrix = matrix.double()
    right = matrix.diagonal()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - right
    iou = right / union.clamp(min=1)
    return {
        "miou": (iou.sum() / (union > 0).sum()).item(),
        "miou_all": iou.mean().item(),
        "pixel_accuracy": (right.sum() / matrix.sum()).item(),
    }


# ---- Samples -------------------------------------------------------------------------------------


class SegmentationSet(dense.DenseSet):
    """`dense.DenseSet` of class maps: in training that of a view, (S, S) uint8.

    Evaluation: under "map", and with slide=True "whole", the image with its shorter side resized to
    S, or its longer one to 4 S if that is less, (3, h, w).

    PAPER SILENT: scales and crops. Shorter side S times .5 to 2, crops, flips, colours, as in
    MMSegmentation, but no second try where one class fills a crop.
    """

    def __init__(self, *args, slide=False, **options):
        super().__init__(*args, **options)
        self.slide = slide  # evaluation is to slide windows over whole images
        self.distort = v2.ColorJitter(32 / 255, 0.5, 0.5, 18 / 180)  # MMSegmentation's; hue: of 180

    def companion(self, index):
        """A map of nothing known."""
        return torch.full((self.image_size, self.image_size), IGNORED, dtype=torch.uint8)

    def random_sample(self, image, target, scale):
        """(image, class map) of a random view of an image (3, H, W)."""
        size = self.image_size
        ratio = scale * size / min(image.shape[1:])
        image, maps = dense.random_view(image, target[None], size=size, ratio=ratio, fill=IGNORED)
        return self.distort(image), maps[0]

    def measured(self, image, target):
        """What is known of an image (3, H, W), and what windows slide over."""
        if not self.slide:
            return {"map": target}
        # PAPER SILENT: MMSegmentation's 2048 x 512: a strip may not become endless.
        height, width = image.shape[1:]
        S = self.image_size
        ratio = min(S / min(height, width), 4 * S / max(height, width))
        # torchvision's rounding of the longer side: down
        size = [max(1, int(side * ratio + 1e-6)) for side in (height, width)]
        return {"map": target, "whole": v2.functional.resize(image, size, antialias=True)}


def shape_map(shapes, index):
    """Class map of a picture of `data.Shapes`, (size, size) uint8: 0, or 1 + the object's class."""
    scene = shapes.scene(index)
    kinds = torch.tensor([*(obj.kind + 1 for obj in scene), 0], dtype=torch.uint8)
    return kinds[dense.owners(scene, shapes.size)]  # -1, the background: the last


def open_source(path, part, image_size, unknown=0):
    """Scenes of one part, "train" or "val", of --data; see `dense.open_scenes`, `read_map`."""
    if path in data.DRAWN:
        shapes, classes = data.DRAWN[path](part, image_size), ["background", *data.SHAPE_CLASSES]
        return dense.ShapeScenes(shapes, shape_map, classes)
    return MapScenes(path, {"train": "training", "val": "validation"}[part], unknown)


def random_batch(args):
    """Random images (B, 3, S, S) uint8 and class maps (B, S, S), as a loader gives them."""
    generator = torch.Generator().manual_seed(args.seed)
    B, S, classes = args.batch_size, args.image_size, len(args.classes)
    images = torch.randint(0, 256, (B, 3, S, S), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, classes, (B, S, S), generator=generator)


# ---- Files of class maps -------------------------------------------------------------------------


def read_map(path, unknown):
    """A file of labels -> classes (H, W) uint8, counted from 0; IGNORED where nothing is known.

    unknown: the label that says so, 0 (then label 1 is class 0) or 255 (label 0 is class 0).
    ValueError if it is no picture of labels, OSError with its name if it is torn.
    """
    image = Image.open(path, formats=data.IMAGE_FORMATS)
    try:
        image.load()
    except dense.TORN as error:
        raise OSError(f"its map {path}: {error}") from error
    if image.mode not in ("1", "L", "P"):  # a palette's numbers are labels, too
        raise ValueError(f"{path} has mode {image.mode}, not 8 bits of grey; replace it")
    labels = np.array(image).astype(np.uint8)
    return labels - np.uint8(1) if unknown == 0 else labels  # 0 wraps around to IGNORED


def write_map(path, classes, unknown):
    """Classes (H, W), counted from 0 -> a PNG that `read_map` reads, each class in its colour."""
    first = 1 if unknown == 0 else 0
    image = Image.fromarray((classes + first).byte().numpy())
    image.putpalette(np.concatenate([dense.class_colour(n - first) for n in range(256)]).tobytes())
    image.save(path)


def read_maps(paths, unknown):
    """(path, its classes) of each file that can be read; a torn one is told when its turn comes."""
    for path in paths:
        with suppress(*dense.TORN):
            yield path, read_map(path, unknown)


def class_names(folder, maps, unknown):
    """Names of the classes -> (names, where they are from).

    From the folder's objectInfo.txt or objectInfo150.txt: label, tab, maybe statistics, tab, names;
    maybe a title above. Else numbers, as many as the highest label in maps, a folder. ValueError
    for labels with gaps.
    """
    first, highest = 1 if unknown == 0 else 0, -1
    for path in (folder / "objectInfo150.txt", folder / "objectInfo.txt"):
        if path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            rows = [line.strip().split("\t") for line in lines]
            rows = [(int(row[0]), row[-1].strip()) for row in rows if row[0].strip().isdigit()]
            rows = sorted(row for row in rows if row[0] != unknown)
            if not rows or [label for label, _ in rows] != list(range(first, first + len(rows))):
                raise ValueError(
                    f"{path} must give each label from {first} on one line, and a tab after it "
                    f"(label {unknown} is unknown; see --unknown)"
                )
            return [name for _, name in rows], path
    for path, classes in read_maps(sorted(maps.glob("*.png")), unknown):
        known = classes[classes != IGNORED]
        highest = max(highest, int(known.max())) if known.size else highest
        if highest + first == 255:
            raise ValueError(f"{path} has label 255: if it means unknown, give --unknown 255")
    return [f"class {n + first}" for n in range(highest + 1)], maps


class MapScenes(Dataset):
    """ADE20K's scene-parsing layout: `scenes[i]` is (PIL image, class map (H, W) uint8).

    folder/images/{split}/NAME.jpg and folder/annotations/{split}/NAME.png, split "training" or
    "validation". unknown: see `read_map`; ADE20K's is 0, Pascal VOC's and most others' 255.
    classes: their names, see `class_names`. note: a line on what was found.

    ValueError, one line, for another layout or an image without its map; reading raises it for a
    map of another size than its image, or with labels beyond the classes.
    """

    def __init__(self, folder, split, unknown=0):
        folder, self.unknown = Path(folder), unknown
        images, maps = folder / "images" / split, folder / "annotations" / split
        for part in (images, maps):
            if not part.is_dir():
                coco = any((folder / "annotations").glob("instances_*.json"))
                hint = "give images/ and annotations/, with training/ and validation/ in both"
                hint = "this is COCO's layout, of detection" if coco else hint
                raise ValueError(f"{part} is missing: {hint}")
        self.files = data.list_images(images)[0]
        self.maps = [str(maps / f"{Path(file).stem}.png") for file in self.files]
        absent = [path for path in self.maps if not os.path.isfile(path)]
        if absent or not self.files:
            what = f"{len(absent)} maps are missing, such as {absent[0]}" if absent else "no images"
            raise ValueError(f"{images}: {what}; get the missing files")
        training = folder / "annotations" / "training"
        training = training if training.is_dir() else maps
        self.classes, source = class_names(folder, training, unknown)
        self.note = f"{images}: {len(self.files)} images, {len(self.classes)} classes from {source}"
        if len(self.classes) < 2:
            hint = "" if unknown else " (is 0 a class, and 255 unknown? Then give --unknown 255)"
            raise ValueError(f"{self.note}: nothing to tell apart{hint}")
        some = read_maps(self.maps[:: max(1, len(self.maps) // 50)], unknown)
        shares = [(classes == IGNORED).mean() for _, classes in some]
        if (share := sum(shares) / max(1, len(shares))) > 0.5:
            self.note += f"; warning: {share:.0%} of the pixels are unknown, label {unknown}"

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = Image.open(self.files[i], formats=data.IMAGE_FORMATS)
        classes = read_map(self.maps[i], self.unknown)
        size, top, wrong = classes.shape[::-1], len(self.classes), None
        known = classes[classes != IGNORED]
        if not dense.lies_as(image, size):
            wrong = f"has {size} pixels (width, height), its image {data.upright_size(image)}"
        elif known.max(initial=0) >= top:
            label = int(known.max()) + (self.unknown == 0)
            wrong = f"has label {label}, beyond the {top} classes (objectInfo.txt lists them)"
        if wrong:
            raise ValueError(f"{self.maps[i]} {wrong}; replace it")
        return image, torch.from_numpy(classes)


# ---- Pictures ------------------------------------------------------------------------------------


def draw_segmentation(run, dataset, args):
    """OUT/pictures/segmentation.png: first readable validation images, truth and prediction."""
    rows = []
    for found, truth in segment(run, dense.picture_batch(dataset), args):
        image = data.to_rgb(dataset.source[truth["index"]][0])
        drawn = [draw_classes(image, labels, args.classes) for labels in (truth["map"], found)]
        rows.append([dense.as_square(dense.view(image)), *drawn])
    dense.save_scenes("segmentation", ("image", "truth", "prediction"), rows, args)


def draw_classes(image, labels, names):
    """PIL image and class map (H, W) -> float (3, VIEW, VIEW): each class's area and name.

    Names stand in areas of at least 1 % of the image, where these are widest; unknown pixels stay
    as they are. names: of the classes, number 0 first.
    """
    canvas = np.array(dense.view(image))
    numbers = np.array(dense.view(Image.fromarray(labels.byte().numpy())))
    present = [n for n in np.unique(numbers).tolist() if n != IGNORED]
    for n in present:
        canvas[numbers == n] = 0.2 * canvas[numbers == n] + 0.8 * dense.class_colour(n)
    canvas = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=17)
    for n in present:
        area = torch.from_numpy(numbers == n).float()
        if area.mean() < 0.01:
            continue
        # Where the most pixels of a neighbourhood are of the class, the border counting as others.
        near = area[None]
        for kernel in ((81, 1), (1, 81)):
            near = F.avg_pool2d(near, kernel, 1, [k // 2 for k in kernel])
        near = near[0] * area
        y, x = divmod(int(near.argmax()), near.shape[1])
        half = draw.textlength(names[n], font) / 2 + 3
        x = min(max(x, half), canvas.width - half)
        draw.text((x, y), names[n], "white", font, "mm", stroke_width=2, stroke_fill="black")
    return dense.as_square(canvas)


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    """Command line -> namespace, complete but for what a checkpoint and the data settle."""
    own = dict(what="Label pixels", layout="ADE20K", width=WIDTH, scales=[0.5, 2.0], fits="fills")
    parser = dense.build_parser("segment", layer_decay=LAYER_DECAY, **own)
    windows = "measure in windows, at training's scale, or all at once"
    train.add_flags(parser, "measuring", ("--slide", bool, True, windows))
    label = "label of unknown pixels in files of maps: 0 (None; ADE20K) or 255 (0 is a class)"
    train.add_flags(parser, "maps", ("--unknown", int, None, label))
    args = dense.settle(parser.parse_args(argv), LAYER_DECAY, width=WIDTH, unknown=0)
    if args.unknown not in (None, 0, 255):
        train.fail(f"--unknown {args.unknown} must be 0 or 255")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = train.start_processes()
    weights, args = finetune.open_checkpoint(args, "segmenter", SCRIPT, keep=("width", "unknown"))
    make_set = partial(SegmentationSet, slide=args.slide)
    if args.predict:
        dataset = dense.open_photographs(args, make_set)
        predict(build_run(args, weights, device), dataset, args)
        train.stop_processes()
        return 0
    source = partial(open_source, unknown=args.unknown)
    train_set, val_set, args = dense.build_data(args, make_set, source)
    run = build_run(args, weights, device)
    stopped = dense.train_or_measure(run, train_set, val_set, args)
    train.stop_processes()
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    train.run_script(main)
