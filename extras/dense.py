# ---- Pyramid -------------------------------------------------------------------------------------


def group_norm(channels):
    """GroupNorm of at most 32 groups, of 8 channels or more; `channels` is a multiple of 8.

    PAPER SILENT: the norm of heads and pyramids. This one has no running statistics, so that it
    does the same in training and use, for any batch and on any number of processes; it also takes
    a 1 x 1 map of a single image, as UperNet's coarsest pooling may give it (BatchNorm does not).
    """
    return nn.GroupNorm(math.gcd(32, channels // 8), channels)


class FeaturePyramid(nn.Module):
    """A ViT's levels as maps of 1/4, 1/2, 1 and 2 patches a cell: strides 4 to 32 at 16 px patches.

    PAPER: supplement A.2. A ViT has one scale; levels [0, 4, 8, 12] of its 12 blocks are resampled
    to the four of a convolutional network, "bilinear interpolation is used with a scale factor of
    two (if required) followed by a 3x3 convolution"; down, "a 3x3 convolution" (here of stride 2).
    Sec. 4 speaks of "intermediate feature maps of MSG-MAE": of its encoder, as for any other row.
    PAPER SILENT: which level gives which map (early ones the fine maps); one convolution per
    factor of two; its width, `width` from the first on, since the ViT's own would cost more than
    the encoder (for ViT-B at 224 px 25 against 17 billion multiplications; at 256 channels 5); a
    norm per level. The last level's norm is the encoder's own, pre-trained.
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


# ---- Samples -------------------------------------------------------------------------------------


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


# ---- Pictures ------------------------------------------------------------------------------------


VIEW = 384  # pixels, side of the images in pictures with writing on them


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


# ---- Runs ----------------------------------------------------------------------------------------


def draw_scenes(name, run, dataset, args, rows=6, least=0.5):
    """OUT/pictures/NAME.png: the first readable validation images, truth and prediction."""
    path = Path(args.out) / "pictures" / f"{name}.png"
    batch = data.collate([dataset[0, i] for i in range(min(rows, len(dataset)))])
    predict = detect if args.task == "detect" else segment
    columns = {"image": [], "truth": [], "prediction": []}
    for found, truth in predict(run, batch, args):
        image = data.to_rgb(dataset.source[truth["index"]][0])
        if args.task == "detect":
            sure = found["scores"] >= least
            found = {k: v[sure] for k, v in found.items()}
            drawn = [data.draw_objects(image, x, args.classes) for x in (truth, found)]
        else:
            drawn = [data.draw_classes(image, x, args.classes) for x in (truth["map"], found)]
        drawn = [data.as_square(data.view(image)), *drawn]
        for column, picture in zip(columns.values(), drawn, strict=True):
            column.append(picture)
    if args.task == "detect":
        columns[f"prediction, score {least} or more"] = columns.pop("prediction")
    if columns["image"]:
        with train.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            data.save_picture(path, {k: torch.stack(v) for k, v in columns.items()})


def build_scenes(args):
    """`build_data` of detection and segmentation; with --eval there is no training set: None."""
    parts = ("val",) if args.eval else ("train", "val")
    with train.refusals():
        sources = data.open_scenes(args.data, args.task, image_size=args.image_size, parts=parts)
        val_source = sources[-1]
        if args.eval:
            data.check_classes(args.classes, val_source.classes, (args.checkpoint, args.data))
    train_set, common = None, dict(image_size=args.image_size, seed=args.seed, task=args.task)

    def chosen(source, limit):
        return data.choose_images(source, seed=args.seed, limit=limit or len(source)).tolist()

    if not args.eval:
        kept = chosen(sources[0], args.limit_images)
        train_set = data.DenseSet(sources[0], kept, scales=args.scales, **common)
        train.check_one_step(train_set, args)
    kept, windows = chosen(val_source, args.val_images), args.slide and args.task == "segment"
    val_set = data.DenseSet(val_source, kept, augment=False, slide=windows, **common)
    settled = vars(args) | {"classes": list(val_source.classes)}
    return train_set, val_set, argparse.Namespace(**settled)


def check_dense(args):
    """End with status 2 for flags that detection and segmentation cannot follow."""
    names = ("fraction", "shots", "mixup", "cutmix", "label_smoothing", "rand_augment")
    for name in (name for name in names if getattr(args, name)):
        fail(f"--{name.replace('_', '-')} is for classification; leave it off for {args.task}")
    if args.width and args.width % 16:
        fail(f"--width {args.width} must be a multiple of 16")
    if args.scales and not 0 < args.scales[0] <= args.scales[1]:
        fail(f"--scales {args.scales} must be above 0, the smaller first")


