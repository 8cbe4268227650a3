"""Detect objects with a pre-trained encoder: Mask R-CNN (paper, Table 3; supplement A.2).

    python -m extras.detect --checkpoint runs/mse/checkpoint.pt --data path/to/coco
    torchrun --nproc_per_node=8 -m extras.detect --checkpoint runs/mse/checkpoint.pt --data ...
    python -m extras.detect --eval --checkpoint runs/mse/detect/best.pt --data path/to/coco
    python -m extras.detect --predict photo.jpg --checkpoint runs/mse/detect/best.pt

--checkpoint as in finetune.py; --data: COCO's own layout, other tools' (see `coco.find_files`), or
shapes. In order: what a step minimises; the network; measuring; samples; pictures; the command
line. COCO's files and average precision are in coco.py, what segmentation has, too, in dense.py.

Writes to OUT as finetune.py does: best.pt is that of the highest box AP; log.jsonl has, in per
cent, ap... of boxes and, if any object has an outline, mask_ap... of masks, as COCO defines them
(-1: no such objects). Each measurement, --eval's too, writes results_bbox.json and
results_segm.json, in COCO's result format, and pictures/detections.png. --predict writes the same
of photographs, with their files for image ids and classes counted from 1, and predictions/, a
picture each.
"""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN, faster_rcnn, mask_rcnn, rpn
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, masks_to_boxes, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2.functional import to_pil_image

import data
import finetune
import train
from extras import coco, dense

SCRIPT = "extras/detect.py"  # who writes the checkpoints
CURVES = {  # panels of curves.png, see data.CURVES
    "loss": {"loss": ""},
    "boxes, %": {"ap": "AP", "ap50": "AP50"},
    "masks, %": {"mask_ap": "AP", "mask_ap50": "AP50"},
}
MASK_SIDE = 28  # cells of a predicted mask, which spans its box
SURE = 0.5  # score of the detections that are drawn
LAYER_DECAY, WIDTH = 0.7, 256  # where no flag says otherwise

# ---- One step: what is minimised -----------------------------------------------------------------


def detection_terms(run, images, objects, progress, args):
    """Mask R-CNN's five losses of a batch -> {name: scalar}; see `Detector`.

    objects: a dict for each image, see `Detector`; N may be 0.
    """
    objects = [{k: v.to(run.device, non_blocking=True) for k, v in o.items()} for o in objects]
    with run.autocast():  # the heads turn it off
        return run.network(images, objects)


# ---- Mask R-CNN ----------------------------------------------------------------------------------


def mask_targets(masks, boxes, matched):
    """What the mask head should predict in each box: (R, 28, 28) in [0, 1].

    masks: (N, H, W), the image's objects. boxes: (R, 4), x0 y0 x1 y1 in pixels, (0, 0) = the
    image's corner. matched: (R,), the object in each box. Pixel i has its centre at i + .5
    (aligned=True), as `paste_masks` takes it; torchvision's own targets lie half a pixel off.
    """
    rois = torch.cat([matched[:, None].to(boxes), boxes], dim=1)  # (R, 5)
    return roi_align(masks[:, None].to(boxes), rois, MASK_SIDE, aligned=True)[:, 0]


def paste_masks(masks, boxes, height, width):
    """Masks of boxes -> masks of the image, bool (N, height, width).

    masks: (N, 28, 28), probabilities over each box. boxes: (N, 4), x0 y0 x1 y1 in pixels of the
    image of height x width. A pixel belongs to an object if its centre, i + .5, is in the box and
    the probability there, interpolated, is .5 or more. One mask at a time, and only inside its
    box: the float values of 100 whole images of 1024 px would take 400 MB.
    """
    pasted = masks.new_zeros((len(masks), height, width), dtype=torch.bool)
    rows, columns = (torch.arange(n, device=masks.device) + 0.5 for n in (height, width))
    limits = boxes.new_tensor([width, height, width, height])
    corners = (boxes - 0.5).ceil().clamp(min=0).minimum(limits).int().tolist()
    for i, (left, top, right, bottom) in enumerate(corners):
        if left >= right or top >= bottom:  # no pixel's centre in the box
            continue
        box, mask = boxes[i], masks[i][None, None].float()  # (1, 1, 28, 28)
        x = (columns[left:right] - box[0]) / (box[2] - box[0]) * 2 - 1  # -1 to 1 across the box
        y = (rows[top:bottom] - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)[None]  # (1, h, w, 2)
        inside = F.grid_sample(mask, grid, padding_mode="border", align_corners=False)
        pasted[i, top:bottom, left:right] = inside[0, 0] >= 0.5
    return pasted


class Anchors(rpn.AnchorGenerator):
    """torchvision's anchors, but as far apart as the cells of the maps are.

    torchvision's step is image side // map side, too short where a side was rounded up: 56 px for
    the 4 cells of 64 px that the coarsest map of a 224 px image has.
    """

    def __init__(self, sizes, ratios, steps):
        super().__init__(sizes, ratios)
        self.steps = steps  # pixels from cell to cell, of each map

    def grid_anchors(self, grid_sizes, strides):
        return super().grid_anchors(grid_sizes, [[torch.tensor(s)] * 2 for s in self.steps])


class Detector(dense.FeaturePyramid):
    """Mask R-CNN (He et al. 2017) over the pyramid of a ViT: boxes, classes and masks of objects.

    PAPER: supplement A.2, "the original Mask-RCNN head" over an FPN. FPN, RPN and heads are
    torchvision's; the model around them is ours: torchvision's resizes images, and pastes masks
    half a pixel off. RoI pooling infers the scales of its maps from the first batch, which is safe
    only because `maps` refuses all image sizes but one. To copy: needs torchvision too.
    PAPER SILENT: width of the FPN (256, its own) and norm (GroupNorm). DIFFERS: an RPN of two
    convolutions, a box head of four and a linear layer, as detectors with a plain ViT have them (Li
    et al. 2021, ViTDet). The original's have one convolution, and two linear layers.
    """

    def __init__(self, encoder, classes, width):
        super().__init__(encoder, width)
        self.classes, p, S = classes, encoder.patch_size, self.image_size
        if p & (p - 1):  # torchvision's pooling takes the maps' scales for powers of two
            raise ValueError(f"detection needs patches of a power of two, not of {p} px")
        norm = dict(norm_layer=dense.group_norm)
        self.fpn = FeaturePyramidNetwork(self.channels, width, LastLevelMaxPool(), **norm)
        # PAPER SILENT: anchors and sampling. One size per map, of FPN's 8 cells (32 to 512 px at
        # patches of 16), fewer where the largest would exceed the image; under 4 px they round
        # to nothing. An object of 14 patches is pooled from the map of one patch a cell. Heads
        # learn from 512 regions an image and judge 1000, or fewer where there are few patches.
        strides = [p * 2.0**i for i in range(-2, 3)]
        sizes = [(max(4.0, min(8.0, S / strides[-1]) * stride),) for stride in strides]
        scale = dict(
            featmap_names=["0", "1", "2", "3"],
            sampling_ratio=2,
            canonical_scale=14 * p,
            canonical_level=p.bit_length() - 1,
        )
        samples = min(512, 2 * encoder.side**2)
        layers, outputs = 4 * [width], classes + 1  # 0 = background
        parts = MaskRCNN(
            SimpleNamespace(out_channels=width),  # no backbone: `forward` calls the parts
            rpn_anchor_generator=Anchors(tuple(sizes), 5 * ((0.5, 1.0, 2.0),), strides),
            rpn_head=rpn.RPNHead(width, 3, conv_depth=2),
            box_roi_pool=MultiScaleRoIAlign(output_size=7, **scale),
            box_head=faster_rcnn.FastRCNNConvFCHead((width, 7, 7), layers, [4 * width], **norm),
            box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, outputs),
            mask_roi_pool=MultiScaleRoIAlign(output_size=MASK_SIDE // 2, **scale),
            mask_head=mask_rcnn.MaskRCNNHeads(width, layers, 1, **norm),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(width, width, outputs),
            box_batch_size_per_image=samples,
            rpn_post_nms_top_n_test=min(1000, 2 * samples),
        )
        self.rpn, self.roi_heads = parts.rpn, parts.roi_heads

    def forward(self, images, targets=None):
        """Images (B, 3, S, S) in [0, 1] -> five losses by name, or in evaluation mode detections.

        targets: in training, a dict for each image: boxes, float32 (N, 4), x0 y0 x1 y1 in pixels;
        labels, int64 (N,), 1 to `classes`; masks, (N, S, S), 0 or 1; maybe outlined, bool (N,):
        False where the mask is not known, and not learnt. N may be 0.
        Detections: a dict for each image, best first: boxes (N, 4), labels (N,), scores (N,) and
        masks (N, 28, 28), probabilities for `paste_masks`. At most 100 with scores above .05.
        Draws samples from torch's global generator. ValueError if targets are not as above.
        """
        sizes = [tuple(images.shape[2:])] * len(images)
        if self.training:
            self.check(targets)
        maps = self.fpn({str(i): x for i, x in enumerate(self.maps(images))})
        # float32 whatever the autocast: torchvision gives anchors and boxes the type of the maps,
        # and bf16 has steps of 4 px near 1000.
        with torch.autocast(images.device.type, enabled=False):
            maps = {name: x.float() for name, x in maps.items()}
            batch = SimpleNamespace(tensors=images, image_sizes=sizes)  # torchvision's ImageList
            proposals, losses = self.rpn(batch, maps, targets)
            if self.training:
                return losses | self.head_losses(maps, proposals, sizes, targets)
            found, _ = self.roi_heads(maps, proposals, sizes)
        return [image | {"masks": image["masks"].squeeze(1)} for image in found]

    def head_losses(self, maps, proposals, sizes, targets):
        """Losses of box and mask head on a sample of the RPN's proposals -> {name: scalar}.

        torchvision's own steps, written out for the sake of the masks (see `mask_targets`).
        """
        heads = self.roi_heads
        boxes, matched, labels, deltas = heads.select_training_samples(proposals, targets)
        features = heads.box_head(heads.box_roi_pool(maps, boxes, sizes))
        logits, offsets = heads.box_predictor(features)
        classifier, box_reg = fastrcnn_loss(logits, offsets, labels, deltas)
        # Masks are learnt where a sample hits an object, and for that object's class alone.
        hits = []
        for target, found, m in zip(targets, labels, matched, strict=True):
            hit = (found > 0).nonzero()[:, 0]
            hits.append(hit[target["outlined"][m[hit]]] if "outlined" in target else hit)
        boxes, matched, labels = (
            [x[hit] for x, hit in zip(values, hits, strict=True)]
            for values in (boxes, matched, labels)
        )
        each = zip(targets, boxes, matched, strict=True)
        wanted = torch.cat([mask_targets(t["masks"], b, m) for t, b, m in each])
        x = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, boxes, sizes)))
        of_class = torch.cat(labels)  # (R,)
        x = x[torch.arange(len(x), device=x.device), of_class]  # (R, 28, 28), as `wanted`
        # As a sum: without a hit, this is 0 and still gives every parameter a gradient.
        mask = F.binary_cross_entropy_with_logits(x, wanted, reduction="sum")
        mask = mask / max(1, wanted.numel())
        return {"loss_classifier": classifier, "loss_box_reg": box_reg, "loss_mask": mask}

    def check(self, targets):
        """ValueError for targets that would be taken, silently, for something else."""
        S = self.image_size
        for target in targets:
            boxes, labels, masks = (target[name] for name in ("boxes", "labels", "masks"))
            wrong = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
            wrong |= (labels < 1) | (labels > self.classes)  # 0 would be background
            if wrong.any() or masks.shape != (len(boxes), S, S):
                raise ValueError(
                    f"boxes without area, or labels that are not in 1 to {self.classes}: "
                    f"{boxes[wrong].tolist()}, {labels[wrong].tolist()}; or masks that are not "
                    f"{[len(boxes), S, S]}: {list(masks.shape)}"
                )


def build_run(args, weights, device):
    """What trains a detector; see `dense.build_run`."""
    task = dict(part="detector", terms=detection_terms, evaluate=evaluate_detector, score="ap")
    return dense.build_run(Detector, args, weights, device, script=SCRIPT, curves=CURVES, **task)


# ---- Measuring -----------------------------------------------------------------------------------


def detect(run, batch):
    """A batch's detections: yields (found, objects) of its readable images, in their own pixels.

    batch: of a `DetectionSet` that does not augment. found: as `Detector` gives it, but with
    masks (D, H, W) bool, on the CPU.
    """
    images, targets, *_ = batch
    with run.autocast():
        outputs = train.unwrap(run.network)(data.to_float(images.to(run.device)))
    # One image at a time: a hundred masks of a photograph may take a gigabyte.
    for output, objects in zip(outputs, targets, strict=True):
        if objects is None:
            continue
        place = objects["letterbox"]
        boxes = dense.boxes_to_image(output["boxes"], place)
        masks = paste_masks(output["masks"], boxes, place.height, place.width)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # not in the padding
        found = output | {"boxes": boxes, "masks": masks}
        yield {k: v[inside].cpu() for k, v in found.items()}, objects


@torch.no_grad()
def evaluate_detector(run, loader, known, args):
    """COCO's average precision of boxes and masks over the whole validation set, in per cent.

    -> row of `coco.average_precision`, the masks' under mask_... if any object has an outline; -1 =
    no object of that size.
    Draws the picture, and writes OUT/results_bbox.json and results_segm.json: the latest
    measurement's. loader, known: see `finetune.evaluate_classifier`.
    """
    network, found, rows = train.unwrap(run.network).eval(), {}, []
    for batch in train.renewing(loader, args.out):
        found |= dict(batch[3])
        for detections, objects in detect(run, batch):
            pair = [coco.match_detections(detections, objects, masks=m) for m in (False, True)]
            index = objects["index"]
            results = coco.as_results(detections, loader.dataset.source, index)
            rows.append((index, *pair, results))
    finetune.note_unread(found, known, loader.dataset)
    parts, row = train.gathered_on_main(rows), {}
    if train.is_main():
        rows = sorted(sum(parts, []), key=lambda row: row[0])  # COCO's order
        _, boxes, masks, results = zip(*rows, strict=True)
        row = coco.average_precision(boxes)
        of_masks = coco.average_precision(masks)
        if of_masks["ap"] >= 0:  # else there are boxes alone: no mask counts
            row |= {f"mask_{name}": value for name, value in of_masks.items()}
        row = {name: 100 * value if value >= 0 else value for name, value in row.items()}
        row["val_images"] = len(rows)
        results = [entry for image in results for entry in image]
        coco.write_results(args.out, results)
        if not any(entry["score"] >= SURE for entry in results):
            train.say(
                f"no detection has a score of {SURE} or more: more epochs or another --lr might "
                "help"
            )
        draw_detections(run, loader.dataset, args)
    network.train()
    return train.of_all_processes(row)[0]


@torch.no_grad()
def predict(run, dataset, args):
    """--predict: name and draw what is found on photographs, and write it as COCO's results."""
    train.unwrap(run.network).eval()
    unread, rows = {}, []
    for batch in finetune.shard(dataset, args):
        unread |= dict(batch[3])
        for found, about in detect(run, batch):
            index = about["index"]
            file = dataset.source.files[index]
            image, sure = data.to_rgb(dataset.source[index][0]), found["scores"] >= SURE
            shown = {k: v[sure] for k, v in found.items()}
            names = [args.classes[label - 1] for label in shown["labels"].tolist()]
            names = [f"{n} {s:.2f}" for n, s in zip(names, shown["scores"].tolist(), strict=True)]
            line = f"{file}: {', '.join(names) or f'nothing with a score of {SURE} or more'}"
            rows.append((index, line, coco.as_results(found, dataset.source, index)))
            drawn = draw_objects(image, shown, args.classes)
            path = dense.prediction_path(args, file, index)
            with train.writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                to_pil_image(drawn).save(path)
    finetune.note_unread(unread, [], dataset)
    if parts := train.gathered_on_main(rows):
        rows = sorted(sum(parts, []), key=lambda row: row[0])
        coco.write_results(args.out, [entry for *_, results in rows for entry in results])
        for _, line, _ in rows:
            train.say(line)
        train.say(f"done: {args.out}/predictions/, {args.out}/results_bbox.json, results_segm.json")


# ---- Samples -------------------------------------------------------------------------------------


class DetectionSet(dense.DenseSet):
    """`dense.DenseSet` of objects: in training those of a view, {"boxes" (N, 4), "labels" (N,),
    "masks" (N, S, S) bool, "outlined" (N,) bool}, boxes around what is left of the masks, groups
    (crowd) left out.

    PAPER SILENT: scales and crops. Scale jitter of .1 to 2, where 1 makes the longer side S, crops,
    flips, as in Li et al. 2021 and ViTDet.
    """

    def companion(self, index):
        """A target without objects."""
        size = self.image_size
        return objects_in(torch.zeros(0, size, size), torch.zeros(0, dtype=torch.int64))

    def random_sample(self, image, target, scale):
        """(image, objects) of a random view of an image (3, H, W)."""
        single, size = ~target["crowd"], self.image_size
        masks, ratio = target["masks"][single].byte(), scale * size / max(image.shape[1:])
        image, masks = dense.random_view(image, masks, size=size, ratio=ratio, fill=0)
        return image, objects_in(masks, target["labels"][single], target["outlined"][single])


def mask_boxes(masks):
    """Masks (N, H, W), none empty -> their boxes (N, 4), xyxy, which end where the last pixel ends
    (torchvision's: where it begins)."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0, 1, 1])


def objects_in(masks, labels, outlined=None):
    """Masks (N, S, S) and labels (N,) -> target of `Detector`, of those with any pixel.

    outlined: (N,) bool, None = all of them.
    """
    masks = masks.bool()
    kept = masks.any(dim=2).any(dim=1)
    masks = masks[kept]
    outlined = torch.ones_like(kept) if outlined is None else outlined
    outlined = outlined[kept]
    return dict(boxes=mask_boxes(masks), labels=labels[kept], masks=masks, outlined=outlined)


def shape_objects(shapes, index):
    """What of each object of a `data.Shapes` picture is visible, as `coco.CocoScenes` has it."""
    scene = shapes.scene(index)
    masks = dense.owners(scene, shapes.size) == torch.arange(len(scene))[:, None, None]
    objects = objects_in(masks, torch.tensor([obj.kind + 1 for obj in scene]))
    crowd = torch.zeros(len(objects["labels"]), dtype=torch.bool)
    return objects | {"crowd": crowd, "area": objects["masks"].sum(dim=(1, 2)).float()}


def open_source(path, part, image_size):
    """Scenes of one part, "train" or "val", of --data; see `dense.open_scenes`."""
    if path in data.DRAWN:
        shapes = data.DRAWN[path](part, image_size)
        return dense.ShapeScenes(shapes, shape_objects, data.SHAPE_CLASSES)
    scenes = coco.CocoScenes(path, part)
    if scenes.crowd.all():  # groups of objects, or none at all
        what = {"train": "to learn from", "val": "to measure by"}[part]
        raise ValueError(f"{scenes.note}: there is none {what}; add some")
    return scenes


def random_batch(args):
    """Random images (B, 3, S, S) uint8 and 7 objects each, as COCO has, as a loader gives them."""
    generator = torch.Generator().manual_seed(args.seed)
    B, S, classes = args.batch_size, args.image_size, len(args.classes)
    images = torch.randint(0, 256, (B, 3, S, S), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (B, 7), generator=generator)
    corners, rows = torch.randint(0, S // 2, (B, 7, 2, 1, 1), generator=generator), torch.arange(S)
    x, y = rows - corners[:, :, 0], rows[:, None] - corners[:, :, 1]
    masks = (x >= 0) & (x < S // 4) & (y >= 0) & (y < S // 4)  # squares, (B, 7, S, S)
    return images, [objects_in(m, n + 1) for m, n in zip(masks, labels, strict=True)]


# ---- Pictures ------------------------------------------------------------------------------------


def draw_detections(run, dataset, args):
    """OUT/pictures/detections.png: the first readable validation images, truth and prediction."""
    titles, rows = ("image", "truth", f"prediction, score {SURE} or more"), []
    for found, truth in detect(run, dense.picture_batch(dataset)):
        image, sure = data.to_rgb(dataset.source[truth["index"]][0]), found["scores"] >= SURE
        found = {name: values[sure] for name, values in found.items()}
        drawn = [draw_objects(image, objects, args.classes) for objects in (truth, found)]
        rows.append([dense.as_square(dense.view(image)), *drawn])
    dense.save_scenes("detections", titles, rows, args)


def draw_objects(image, objects, names):
    """PIL image -> float (3, VIEW, VIEW): boxes, masks in their class's colour, names, scores.

    objects: CPU tensors boxes (N, 4), masks (N, H, W) and labels (N,) from 1, in pixels of the
    image; maybe scores (N,) and outlined (N,), False where the mask is not known.
    names: of the classes, label 1 first.
    """
    canvas = np.array(dense.view(image))
    boxes = (objects["boxes"] * (dense.VIEW / max(image.size))).tolist()
    order = objects["masks"].flatten(1).sum(dim=1).argsort(descending=True).tolist()
    numbers = (objects["labels"] - 1).tolist()
    for n in order:  # small ones last, on top
        mask = np.array(dense.view(Image.fromarray(objects["masks"][n].byte().numpy()))) > 0
        if "outlined" in objects and not objects["outlined"][n]:  # a box alone
            continue
        canvas[mask] = 0.5 * canvas[mask] + 0.5 * dense.class_colour(numbers[n])
    canvas = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for n in order:
        colour, (x, y, *_) = tuple(dense.class_colour(numbers[n]).tolist()), boxes[n]
        draw.rectangle(boxes[n], outline=colour, width=2)
        score = f" {objects['scores'][n]:.2f}" if "scores" in objects else ""
        text = names[numbers[n]] + score
        length = draw.textlength(text, font)
        x, y = max(0, min(x, canvas.width - length - 6)), max(0, y - 18)  # inside the image
        draw.rectangle([x, y, x + length + 6, y + 18], colour)
        draw.text((x + 3, y + 9), text, "white", font, anchor="lm")
    return dense.as_square(canvas)


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    """Command line -> namespace, complete but for what a checkpoint and the data settle."""
    own = dict(what="Detect objects", layout="COCO", width=WIDTH, scales=[0.1, 2.0], fits="fits")
    parser = dense.build_parser("detect", layer_decay=LAYER_DECAY, **own)
    return dense.settle(parser.parse_args(argv), LAYER_DECAY, width=WIDTH)


def main(argv=None):
    args = parse_args(argv)
    device = train.start_processes()
    weights, args = finetune.open_checkpoint(args, "detector", SCRIPT, keep=("width",))
    if args.predict:
        dataset = dense.open_photographs(args, DetectionSet)
        predict(build_run(args, weights, device), dataset, args)
        train.stop_processes()
        return 0
    train_set, val_set, args = dense.build_data(args, DetectionSet, open_source)
    run = build_run(args, weights, device)
    stopped = dense.train_or_measure(run, train_set, val_set, args)
    train.stop_processes()
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    train.run_script(main)
