"""What detection and segmentation share (paper, Table 3): pyramid of a ViT, samples, flags.

No script: these are extras/detect.py and extras/segment.py, which train by finetune.py's
`train_network`. In order: the pyramid under their heads (supplement A.2); images as squares, and
random views; sets of samples; pictures; what trains; the command line.

To copy `FeaturePyramid`: needs model.py's `ViT`.

README's pictures of objects and classes. The encoder is `msg_gan_p` of the picture of five losses
(see reconstruct.py); box AP 37.0, mask AP 38.4, mIoU 28.9:

    FLAGS="--checkpoint runs/figure2/msg_gan_p/checkpoint.pt --image-size 64 --data shapes"
    FLAGS="$FLAGS --val-images 200 --batch-size 8 --workers 0 --warmup-epochs 0.2"
    FLAGS="$FLAGS --scales 0.8 1.25 --lr 2e-3 --width 32"
    python -m extras.detect $FLAGS --limit-images 2500 --epochs 3
    python -m extras.segment $FLAGS --limit-images 5000 --epochs 4
"""

import argparse
import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

import data
import finetune
import model
import train
from train import fail

# ---- Pyramid (supplement A.2) --------------------------------------------------------------------


def group_norm(channels):
    """GroupNorm of at most 32 groups, of 8 channels or more; `channels` is a multiple of 8.

    PAPER SILENT: the norm of heads and pyramids. This one has no running statistics, so that it
    does the same in training and use, for any batch and on any number of processes; it also takes
    a 1 x 1 map of a single image, as UperNet's coarsest pooling may give it (BatchNorm does not).
    """
    return nn.GroupNorm(math.gcd(32, channels // 8), channels)


class FeaturePyramid(nn.Module):
    """A ViT's levels as four maps, their cells 1/4, 1/2, 1 and 2 patches wide (4 to 32 px of 16).

    PAPER: supplement A.2. A ViT has one scale; levels [0, 4, 8, 12] of its 12 blocks (0: embedded
    patches with positions) are resampled to the four of a convolutional network, "bilinear
    interpolation is used with a scale factor of two (if required) followed by a 3x3 convolution";
    down, "a 3x3 convolution" (here of stride 2).
    PAPER SILENT: which are sec. 4's "intermediate feature maps of MSG-MAE" (its encoder's, as for
    any other row); which level gives which map (early ones the fine maps); one convolution per
    factor of two; its width, `width` from the first on, since the ViT's own would cost more than
    the encoder (for ViT-B at 224 px 25 against 17 billion multiplications; at 256 channels 5); a
    norm per level. The last level's norm is the encoder's own, pre-trained. Attention at 512 or
    1024 px, too: as in pre-training, of all patches to all, with fixed positions; ViTDet has
    windows, and relative positions.
    """

    def __init__(self, encoder, width):
        super().__init__()
        C, p, side = encoder.cls_token.shape[-1], encoder.patch_size, encoder.side
        if p < 4 or side % 2:
            raise ValueError(
                f"{p * side} px images of {p} px patches give no maps of 1/4 to 2 patches a cell; "
                f"use patches of 4 px or more, and images of a multiple of {2 * p} px"
            )
        self.encoder, self.image_size = encoder, p * side
        self.levels = [round(i * len(encoder.blocks) / 3) for i in range(3)]  # and the last
        self.norms = nn.ModuleList(nn.LayerNorm(C, eps=1e-6) for _ in self.levels)
        fine = nn.Sequential(*self.up(C, width), *self.up(width, width))
        coarse = nn.Conv2d(C, width, 3, stride=2, padding=1)
        self.resample = nn.ModuleList(
            [fine, nn.Sequential(*self.up(C, width)), nn.Identity(), coarse]
        )
        self.channels = [width, width, C, width]  # of the four maps

    @staticmethod
    def up(c_in, c_out):
        """Layers (B, c_in, h, w) -> (B, c_out, 2 h, 2 w)."""
        grow = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        return grow, nn.Conv2d(c_in, c_out, 3, padding=1)

    def maps(self, images):
        """Images (B, 3, S, S) in [0, 1] -> four maps (B, C_j, s, s), s = S / (p/4, p/2, p, 2 p)."""
        S, side = self.image_size, self.encoder.side
        if images.shape[2:] != (S, S):  # 16 patches can also be 2 x 8
            raise ValueError(f"images of {list(images.shape[2:])} for a network of {S} px squares")
        last, levels = self.encoder.encode(images, levels=self.levels)  # (B, 1 + N, C) each
        tokens = [norm(x) for norm, x in zip(self.norms, levels, strict=True)] + [last]
        grids = [x[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for x in tokens]
        return [layers(x) for layers, x in zip(self.resample, grids, strict=True)]

    def layers(self):
        """Parameters from input to output: [[embedding], [block 1], ..., [norm, maps, heads]]."""
        *below, norm = self.encoder.layers()
        top = [p for name, p in self.named_parameters() if not name.startswith("encoder.")]
        return [*below, norm + top]


# ---- Images as their annotations see them --------------------------------------------------------


def lies_as(image, size):
    """Do annotations made for `size` (width, height) fit an opened PIL image?

    A file may ask, by EXIF, to be turned. Where the image as stored has that size, the annotations
    are taken to mean it as stored, and the request is dropped here. Else the image must have that
    size once turned.
    """
    if image.format != "TIFF" and image.size == size:  # pillow turns TIFFs by itself
        image.getexif().pop(data.EXIF_ORIENTATION, None)
    return data.upright_size(image) == size


# ---- Images and maps as squares ------------------------------------------------------------------


class Letterbox(NamedTuple):
    """How an image lies in a square: (height, width), resized to (rows, columns), at its top left.

    Each side is rounded, so the two ratios differ: a map goes back axis by axis.
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
    return on_canvas(image, size, data.MEAN_COLOUR), Letterbox(height, width, rows, columns)


def boxes_to_image(boxes, place):
    """Boxes (N, 4), xyxy in pixels of a letterbox -> in pixels of its image, and inside it."""
    limits = boxes.new_tensor([place.columns, place.rows] * 2)
    sizes = boxes.new_tensor([place.width, place.height] * 2)
    return torch.minimum(boxes.clamp(min=0), limits) * (sizes / limits)


def maps_to_image(maps, place):
    """Maps (C, S, S), float, of a letterbox (logits, say) -> (C, H, W) of its image, bilinear."""
    maps = maps[None, :, : place.rows, : place.columns]
    size = (place.height, place.width)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)[0]


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
    smooth = v2.InterpolationMode.BILINEAR
    for x, mode, rest in ((image, smooth, data.MEAN_COLOUR), (maps, exact, fill)):
        x = v2.functional.crop(x, top, left, height, width)
        if len(x):
            x = v2.functional.resize(x, [rows, columns], interpolation=mode, antialias=True)
        else:
            x = x.new_empty(0, rows, columns)
        views.append(on_canvas(v2.functional.horizontal_flip(x) if mirrored else x, size, rest))
    return views


# ---- Samples -------------------------------------------------------------------------------------


def owners(scene, size):
    """Which object of a scene each pixel shows, the nearest that covers half of it.

    scene: as `data.Shapes.scene` gives it. Returns (size, size) int64, -1 where none does.
    """
    shown = torch.full((size, size), -1)
    for number, obj in enumerate(scene):
        shown[torch.from_numpy(data.coverage(obj, size)) >= 0.5] = number
    return shown


class ShapeScenes(Dataset):
    """`data.Shapes` with targets: `scenes[i]` is (PIL image, target), as the readers of files give.

    target: function of (shapes, i). classes: their names. image_ids, category_ids: see `CocoScenes`
    of extras/coco.py.
    """

    def __init__(self, shapes, target, classes):
        self.shapes, self.target, self.classes = shapes, target, list(classes)
        self.image_ids, self.category_ids = range(len(shapes)), range(1, len(classes) + 1)
        self.note = ""  # a line to print, if there is something to say

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, i):
        return self.shapes[i][0], self.target(self.shapes, i)


# What Pillow raises for a single file that is torn, or too large.
TORN = OSError, SyntaxError, IndexError, Image.DecompressionBombError


def open_scenes(open_source, path, image_size, parts=("train", "val")):
    """Sources of `--data path`, one for each of `parts`; ValueError: what is wrong, what to do.

    open_source: a script's function of (path, part, image_size). path: "shapes", "shapes-large"
    (drawn, image_size pixels wide), or a folder.
    """
    if path not in data.DRAWN and not Path(path).is_dir():
        what = "is not a folder" if Path(path).exists() else "does not exist"
        raise ValueError(f"--data {path} {what}; give a folder, or --data shapes (drawn here)")
    sources = [open_source(path, part, image_size) for part in parts]
    data.check_classes(sources[0].classes, sources[-1].classes, ("train", "val"))
    for source in sources:  # what is wrong everywhere is told now; a torn file, by the loader
        with suppress(*TORN):
            source[0]
    return sources


class DenseSet(data.PretrainSet):
    """Samples of a dense task: `set[(epoch, index)]` is (image, target, seed, bad).

    As `data.LabelledSet`, image uint8 (3, S, S), with a target in the label's place. Training: that
    of a random view. Evaluation (augment=False): a dict of all that the source gives, in the
    image's own pixels, with "letterbox" (see `boxes_to_image`) and "index" (of the source); None in
    place of an unreadable image's, "do not count", whatever the picture beside it.

    A task's own set says how a view's target is made (`random_sample`), and what a target with
    nothing in it is (`companion`).
    """

    prefetch = 2  # masks take a megabyte each

    def __init__(
        self,
        source,  # dataset of (PIL image, target)
        indices,  # which of its images
        *,
        image_size,  # S, pixels
        seed,  # run's seed
        scales,  # (smallest, largest) enlargement in training
        augment=True,  # False: the whole image, letterboxed
    ):
        super().__init__(source, image_size=image_size, num_patches=0, seed=seed, augment=augment)
        self.indices, self.scales = list(indices), scales

    def sample(self, index):
        """(image, target) of an image; draws from torch's global generator."""
        index, (low, high) = self.indices[index], self.scales
        image, target = self.source[index]
        image = v2.functional.pil_to_tensor(data.to_rgb(image))
        if self.augment:
            scale = low + (high - low) * torch.rand(()).item()
            return self.random_sample(image, target, scale)
        square, place = letterbox(image, self.image_size)
        return square, self.measured(image, target) | {"letterbox": place, "index": index}

    def measured(self, image, target):
        """What is known of an image (3, H, W), as a dict: here the source's target."""
        return target

    def __getitem__(self, key):
        image, target, seed, bad = super().__getitem__(key)
        return image, target if self.augment or not bad else None, seed, bad


class Photographs(Dataset):
    """Images without targets, as the readers of files give scenes; see `ShapeScenes`."""

    def __init__(self, files, classes):
        self.files, self.classes = files, classes
        self.image_ids, self.category_ids = files, range(1, len(classes) + 1)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return Image.open(self.files[i], formats=data.IMAGE_FORMATS), {}


def open_photographs(args, make_set):
    """--predict's photographs as a `DenseSet` that does not augment; see `build_data`."""
    with train.refusals():
        files = data.open_photographs(args.predict).files
    common = dict(image_size=args.image_size, seed=args.seed, scales=args.scales)
    return make_set(Photographs(files, args.classes), range(len(files)), augment=False, **common)


def prediction_path(args, file, number):
    """Where a photograph's picture goes, with its number: names may be equal in two folders."""
    return Path(args.out) / "predictions" / f"{number:04d}_{Path(file).stem}.png"


def build_data(args, make_set, open_source):
    """-> (training, validation `DenseSet`, args with `classes`, the names of the classes).

    make_set: a script's subclass of `DenseSet`; open_source: see `open_scenes`. With --eval the
    classes must be the checkpoint's, and there is no training set: None. One line and status 2 if
    that cannot be.
    """
    parts = ("val",) if args.eval else ("train", "val")
    with train.refusals():
        sources = open_scenes(open_source, args.data, args.image_size, parts)
        for part, source in zip(parts, sources, strict=True):
            if source.note:
                train.say(f"{part}: {source.note}")
        classes = list(sources[-1].classes)
        if args.eval:
            data.check_classes(args.classes, classes, (args.checkpoint, args.data))

    def samples(source, limit, augment):
        kept = data.choose_images(source, seed=args.seed, limit=limit or len(source)).tolist()
        common = dict(image_size=args.image_size, seed=args.seed, scales=args.scales)
        return make_set(source, kept, augment=augment, **common)

    train_set = None
    if not args.eval:
        train_set = samples(sources[0], args.limit_images, augment=True)
        train.check_one_step(train_set, args)
    val_set = samples(sources[-1], args.val_images, augment=False)
    return train_set, val_set, argparse.Namespace(**vars(args) | {"classes": classes})


# ---- Pictures ------------------------------------------------------------------------------------

VIEW = 384  # pixels, side of the images in pictures with writing on them


def view(image):
    """PIL image -> PIL image whose longer side is VIEW, small ones enlarged pixel by pixel."""
    size = [max(1, round(n * VIEW / max(image.size))) for n in image.size]
    small = max(image.size) < VIEW or image.mode == "L"  # L: of classes, which do not mix
    return image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def as_square(image):
    """PIL image from `view` -> float (3, VIEW, VIEW) in [0, 1], white where it has no pixels."""
    return on_canvas(v2.functional.pil_to_tensor(image), VIEW, (255, 255, 255)) / 255


def class_colour(number):
    """A class's colour in pictures, three bytes; of any few classes, the hues are far apart."""
    colour = data.oklch(0.42 + 0.09 * (number % 4), 0.16, 2.4 * number)  # 2.4 rad: the golden angle
    return np.array([round(255 * c) for c in colour], np.uint8)


def picture_batch(dataset):
    """A batch of the first validation images, those of the picture."""
    return data.collate([dataset[0, i] for i in range(min(6, len(dataset)))])


def save_scenes(name, titles, rows, args):
    """OUT/pictures/NAME.png, if there are rows, each of one float (3, VIEW, VIEW) for a title."""
    path = Path(args.out) / "pictures" / f"{name}.png"
    if rows:
        with train.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            columns = map(torch.stack, zip(*rows, strict=True))
            data.save_picture(path, dict(zip(titles, columns, strict=True)))


# ---- What trains ---------------------------------------------------------------------------------

MUST_FIT = (*finetune.MUST_FIT, "width")  # for a checkpoint to continue


def build_run(Network, args, weights, device, must_fit=MUST_FIT, **task):
    """`finetune.build_run` of a dense network, whose class is Network.

    args: as `finetune.open_checkpoint` and `build_data` leave them. weights: the former's. task:
    what is left of `finetune.build_run`'s arguments.
    """
    torch.backends.cudnn.benchmark = False  # the numbers of regions and of windows vary
    torch.manual_seed(args.seed)  # the same initial weights on every process
    sizes = (args.image_size, args.patch_size, args.drop_path)
    with train.refusals():  # sizes that do not fit each other, or weights that do not
        encoder = model.build_encoder(args.model, *sizes)
        network = Network(encoder, len(args.classes), args.width)
        if weights is not None:
            finetune.load_weights(network, weights, args)
    groups = finetune.layer_groups(network, args.weight_decay, args.layer_decay)
    return finetune.build_run(network.to(device), groups, args, device, must_fit=must_fit, **task)


def train_or_measure(run, train_set, val_set, args):
    """Train, or with --eval measure -> the signal that ended it, or 0."""
    if not args.eval:
        return finetune.train_network(run, train_set, val_set, args)[0]
    train.write_row(run.evaluate(run, finetune.shard(val_set, args), [], args))
    return 0


# ---- Command line --------------------------------------------------------------------------------


def build_parser(task, *, what, layout, width, scales, fits, layer_decay):
    """The flags that both scripts have; `--help` is the manual.

    task: the script's name. what: it does. layout: of --data. width, scales, layer_decay: defaults.
    fits: what an image that is enlarged by 1 does.

    PAPER SILENT: settings of both tasks beyond rates, decay and epochs, which sec. 4 and the
    supplement's Table 2 give for all fine-tuned models. Ours: ViTDet's and MMSegmentation's
    layer-wise decay for ViT-B, and both their stochastic depth; ViTDet's width of heads, and
    UperNet's usual 512 (MMSegmentation's for MAE's ViT-B: 768). The input size, too: the
    checkpoint's (pre-training: 224 px), unless --image-size; the field has 1024 and 512 px.
    DIFFERS: supplement, Table 2, has mixup, cutmix, RandAug and label smoothing for "downstream
    datasets". They are taken for classification's alone.
    """
    parser = argparse.ArgumentParser(
        description=f"{what} with a pre-trained encoder.",
        usage=f"python -m extras.{task} --checkpoint FILE|none --data PATH|shapes "
        "[flags; see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--eval", action="store_true", help="only measure this script's checkpoint")
    parser.add_argument(
        "--predict", type=train.text, metavar="FILE|FOLDER", help="only draw it for photographs"
    )
    train.add_flags(
        parser,
        "network",
        *finetune.CHECKPOINT_FLAGS,
        ("--width", train.at_least(16), None, f"of the heads, a multiple of 16; None = {width}"),
    )
    train.add_flags(
        parser,
        "data",
        ("--data", str, f"data/{layout.lower()}", f"in {layout}'s layout; shapes; shapes-large"),
        *train.DATA_FLAGS[1:],
        ("--val-images", train.COUNT, None, "measure on so many; None = all"),
        (
            "--scales",
            (train.NUMBER, train.NUMBER),
            scales,
            f"of random enlargement; 1 = the image {fits} --image-size",
        ),
    )
    title = f"optimisation (layer decay None: {layer_decay}, or 1 for random weights)"
    train.add_flags(parser, title, *finetune.OPTIMISER_FLAGS)
    train.add_flags(
        parser,
        "the run",
        ("--out", str, None, f"folder for everything written; None = {task}/ beside --checkpoint"),
        *train.RUN_FLAGS,
    )
    # task names the folder beside the checkpoint
    parser.set_defaults(task=task, weight_decay=0.05, drop_path=0.1)
    return parser


def settle(args, layer_decay, **kept):
    """Give a value to each flag that has none -> args; status 2 for what cannot be."""
    finetune.settle(args, dict(layer_decay=layer_decay), kept)
    if (args.width or 0) % 16:
        fail(f"--width {args.width} must be a multiple of 16")
    if not 0 < args.scales[0] <= args.scales[1]:
        fail(f"--scales {args.scales} must be above 0, the smaller first")
    return args
