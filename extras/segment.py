# ---- UperNet -------------------------------------------------------------------------------------


def conv_norm(c_in, c_out, kernel):
    """Convolution, norm, ReLU: (B, c_in, h, w) -> (B, c_out, h, w)."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, group_norm(c_out), nn.ReLU())


def resize(x, side):
    """(B, C, h, w) -> (B, C, side, side), bilinear."""
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


class Segmenter(FeaturePyramid):
    """UperNet (Xiao et al. 2018) over the pyramid of a ViT: a class for every pixel.

    PAPER: supplement A.2. PAPER SILENT: all else; the head is that of mmsegmentation's ViTs, where
    the first maps are fused as an FPN does and the last is pooled to the image's context, with a
    second head on the map of one patch a cell, in training alone. GroupNorm replaces its
    SyncBatchNorm; and the last layers start as torch has them: its N(0, .01), made for a width of
    512, holds narrow heads back: at 64, for 80 steps and more.
    """

    BINS = (1, 2, 3, 6)  # sides to which the last map is pooled

    def __init__(self, encoder, classes, width=512):
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


def build_segmenter(size, classes, *, image_size, patch_size, drop=0.0, width=512):
    """A segmenter on an encoder of a size in MAE_SIZES; ValueError if sizes do not fit each other.

    drop: see `ViT`. width: channels of the head, a multiple of 16.
    """
    return Segmenter(build_encoder(size, image_size, patch_size, drop), classes, width)


# ---- Loss and scores -----------------------------------------------------------------------------


IGNORED = 255  # label of pixels that count nowhere


def segmentation_loss(logits, target, aux_logits=None, aux_weight=0.4):
    """Mean cross-entropy of the labelled pixels, plus `aux_weight` times that of the second head.

    logits, aux_logits: (B, classes, H, W). target: (B, H, W), integers; 255 = ignored. Returns:
    scalar, 0 with a gradient of 0 where all pixels are ignored (F.cross_entropy: NaN).
    PAPER SILENT: the loss and the weight; both are mmsegmentation's. DIFFERS: it divides by the
    number of all pixels, ignored ones included.
    """
    target = target.long()
    labelled = (target != IGNORED).sum().clamp(min=1)

    def mean(x):
        return F.cross_entropy(x.float(), target, ignore_index=IGNORED, reduction="sum") / labelled

    return mean(logits) + (0 if aux_logits is None else aux_weight * mean(aux_logits))


def confusion_matrix(prediction, target, classes):
    """(classes, classes) int64, pixels by true (row) and predicted class; sums over images add up.

    prediction, target: integers of one shape; target 255, unknown, does not count.
    """
    known = target != IGNORED
    pairs = target[known].long() * classes + prediction[known].long()
    return pairs.bincount(minlength=classes * classes).view(classes, classes)


def segmentation_scores(matrix):
    """`confusion_matrix` of a whole set -> {"miou", "miou_all", "pixel_accuracy"} in [0, 1].

    IoU of a class: pixels rightly given to it, of those that are or were given to it. miou: mean
    over classes in truth or prediction (MMSegmentation's); miou_all: over all, absent ones count
    as 0 (the SceneParsing benchmark's).
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


# ---- ADE20K --------------------------------------------------------------------------------------


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


# ---- Training and measuring ----------------------------------------------------------------------


def segmentation_terms(run, images, maps, args):
    """Loss of a batch -> {"loss": scalar}. maps: classes (B, S, S), 255 = not known."""
    with run.autocast():
        logits, second = run.network(images)  # (B, classes, S, S) each
    maps = maps.to(run.device, non_blocking=True)
    return {"loss": losses.segmentation_loss(logits, maps, second)}


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
                logits = slide(network, image, args.image_size)
            place = place._replace(rows=logits.shape[1], columns=logits.shape[2])
        else:
            logits = outputs[number]
        pairs.append((data.maps_to_image(logits, place).argmax(dim=0).cpu(), truth))
    return pairs


def slide(network, image, side):
    """Mean logits (classes, h, w) of all windows of an image (3, h, w), h and w `side` or more.

    PAPER SILENT: measuring. MMSegmentation's windows, side x side, each two thirds of a side after
    the one before; the last end where the image ends.
    """
    starts, step = [], 2 * side // 3
    for length in image.shape[1:]:
        count = 1 + math.ceil((length - side) / step)
        starts.append([min(i * step, length - side) for i in range(count)])
    places = [(slice(y, y + side), slice(x, x + side)) for y in starts[0] for x in starts[1]]
    windows = network(torch.stack([image[:, rows, columns] for rows, columns in places]))
    total = windows.new_zeros(windows.shape[1], *image.shape[1:])
    count = torch.zeros_like(total[:1])
    for (rows, columns), logits in zip(places, windows, strict=True):
        total[:, rows, columns] += logits
        count[:, rows, columns] += 1
    return total / count


@torch.no_grad()
def evaluate_segmenter(run, loader, known, args):
    """`losses.segmentation_scores` over the whole validation set, in per cent -> row.

    Measured at the images' own size. Draws the picture. loader, known: see `evaluate_classifier`.
    """
    network, found, classes = train.unwrap(run.network).eval(), {}, len(args.classes)
    matrix, images = torch.zeros(classes, classes, dtype=torch.long), 0
    for batch in loader:
        found |= dict(batch[3])
        for labels, truth in segment(run, batch, args):
            matrix += losses.confusion_matrix(labels, truth["map"], classes)
            images += 1
    note_unread(found, known, loader.dataset)
    matrices, counts = zip(*train.of_all_processes((matrix, images)), strict=True)
    row = losses.segmentation_scores(sum(matrices))
    if is_main():
        draw_scenes("segmentation", run, loader.dataset, args)
    network.train()
    return {name: 100 * value for name, value in row.items()} | {"val_images": sum(counts)}


