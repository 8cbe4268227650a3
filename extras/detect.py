"""Detect objects with a pre-trained encoder: Mask R-CNN (paper, Table 3; supplement A.2).

    python -m extras.detect --checkpoint runs/mse/checkpoint.pt --data path/to/coco
    torchrun --nproc_per_node=8 -m extras.detect --checkpoint runs/mse/checkpoint.pt --data ...
    python -m extras.detect --eval --checkpoint runs/mse/detect/best.pt --data path/to/coco

--checkpoint as in finetune.py; --data: COCO's own layout, or shapes. In order: what a step
minimises; the network; measuring; average precision; samples; COCO's masks and files; pictures; the
command line. What segmentation has, too, is in dense.py.

Writes to OUT as finetune.py does: best.pt is that of the highest box AP; log.jsonl has, in per
cent, ap... of boxes and mask_ap... of masks, as COCO defines them (-1: no such objects). Each
measurement, --eval's too, writes results_bbox.json and results_segm.json, in COCO's result format,
and pictures/detections.png.
"""

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.models.detection import MaskRCNN, faster_rcnn, mask_rcnn, rpn
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, masks_to_boxes, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import data
import finetune
import train
from extras import dense

SCRIPT = "extras/detect.py"  # who writes the checkpoints
CURVES = {  # panels of curves.png, see data.CURVES
    "loss": {"loss": ""},
    "boxes, %": {"ap": "AP", "ap50": "AP50"},
    "masks, %": {"mask_ap": "AP", "mask_ap50": "AP50"},
}
MASK_SIDE = 28  # cells of a predicted mask, which spans its box
SURE = 0.5  # score of the detections that are drawn
LAYER_DECAY = 0.7

# ---- One step: what is minimised -----------------------------------------------------------------


def detection_terms(run, images, objects, progress, args):
    """Mask R-CNN's five losses of a batch -> {name: scalar}; see `Detector`.

    objects: a dict for each image, boxes (N, 4), labels (N,) and masks (N, S, S); N may be 0.
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
    PAPER SILENT: width of the FPN (256, its own), norm (GroupNorm), and the heads' depth: an RPN of
    two convolutions, a box head of four and a linear layer, as detectors with a plain ViT have
    them (Li et al. 2021, ViTDet).
    """

    def __init__(self, encoder, classes, width):
        super().__init__(encoder, width)
        self.classes, p, S = classes, encoder.patch_size, self.image_size
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
        labels, int64 (N,), 1 to `classes`; masks, (N, S, S), 0 or 1. N may be 0.
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
        hits = [found > 0 for found in labels]
        boxes = [b[hit] for b, hit in zip(boxes, hits, strict=True)]
        each = zip(targets, boxes, matched, hits, strict=True)
        wanted = torch.cat([mask_targets(t["masks"], b, m[hit]) for t, b, m, hit in each])
        x = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, boxes, sizes)))
        of_class = torch.cat(labels)[torch.cat(hits)]  # (R,)
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
    """A batch's detections -> [(found, objects)] of its readable images, in their own pixels.

    batch: of a `DetectionSet` that does not augment. found: as `Detector` gives it, but with
    masks (D, H, W) bool, on the CPU.
    """
    images, targets, *_ = batch
    with run.autocast():
        outputs = train.unwrap(run.network)(data.to_float(images.to(run.device)))
    pairs = []
    for output, objects in zip(outputs, targets, strict=True):
        if objects is None:
            continue
        place = objects["letterbox"]
        boxes = dense.boxes_to_image(output["boxes"], place)
        masks = paste_masks(output["masks"], boxes, place.height, place.width)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # not in the padding
        found = output | {"boxes": boxes, "masks": masks}
        pairs.append(({k: v[inside].cpu() for k, v in found.items()}, objects))
    return pairs


@torch.no_grad()
def evaluate_detector(run, loader, known, args):
    """COCO's average precision of boxes and masks over the whole validation set, in per cent.

    -> row of `coco_ap`, the masks' under mask_..., -1 = no object of that size. Draws the picture,
    and writes OUT/results_bbox.json and results_segm.json: the latest measurement's. loader, known:
    see `finetune.evaluate_classifier`.
    """
    network, found, rows = train.unwrap(run.network).eval(), {}, []
    for batch in loader:
        found |= dict(batch[3])
        for detections, objects in detect(run, batch):
            pair = [match_detections(detections, objects, masks=m) for m in (False, True)]
            index = objects["index"]
            rows.append((index, *pair, coco_results(detections, loader.dataset.source, index)))
    finetune.note_unread(found, known, loader.dataset)
    parts, row = train.gathered_on_main(rows), {}
    if train.is_main():
        rows = sorted(sum(parts, []), key=lambda row: row[0])  # COCO's order
        _, boxes, masks, results = zip(*rows, strict=True)
        row = coco_ap(boxes)
        row |= {f"mask_{name}": value for name, value in coco_ap(masks).items()}
        row = {name: 100 * value if value >= 0 else value for name, value in row.items()}
        row["val_images"] = len(rows)
        write_results(args.out, [entry for image in results for entry in image])
        draw_detections(run, loader.dataset, args)
    network.train()
    return train.of_all_processes(row)[0]


def coco_results(found, source, index):
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
    """Write `coco_results` of all images: a file of boxes, and one of masks."""
    for kind, other in (("bbox", "segmentation"), ("segm", "bbox")):
        # Apart: COCO's tools take the area of an entry with both from its box.
        rows = [{k: v for k, v in row.items() if k != other} for row in results]
        path = Path(out) / f"results_{kind}.json"
        with train.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))


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
        pixels = found[0].size  # float32: fast, and exact up to 16.7 million of them
        found, truth = (x.reshape(-1, pixels).astype(np.float32) for x in (found, truth))
        shared, area, other = found @ truth.T, found.sum(axis=1), truth.sum(axis=1)
        shared, area, other = (x.astype(np.float64) for x in (shared, area, other))
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
    """Compare an image's detections with its objects -> a dict of small arrays for `coco_ap`.

    found: {"scores" (D,), "labels" (D,), "boxes" (D, 4) or, with masks=True, "masks" (D, H, W)}.
    truth: {"labels" (G,), "crowd" (G,), "area" (G,), and the same}. CPU tensors; boxes are xyxy,
    all in pixels of the image itself, since AREAS are. The best 100 of each class take part.
    """
    key = "masks" if masks else "boxes"
    found, truth = ({k: np.asarray(v) for k, v in x.items()} for x in (found, truth))
    found[key], truth[key] = (x[key].astype(bool if masks else np.float64) for x in (found, truth))
    low, high = AREAS.T[:, :, None]
    ignored = (truth["area"] < low) | (truth["area"] > high) | truth["crowd"]  # (A, G)
    chosen, hits, unseen = [np.zeros(0, np.int64)], [], []
    for label in np.unique(found["labels"]):
        best = np.flatnonzero(found["labels"] == label)
        best = best[np.argsort(-found["scores"][best], kind="stable")][:100]
        mine = np.flatnonzero(truth["labels"] == label)
        ious, area = overlaps(found[key][best], truth[key][mine], truth["crowd"][mine])
        hit, skip = match_class(ious, truth["crowd"][mine], ignored[:, mine])
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


def coco_ap(matches):
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


# ---- Samples -------------------------------------------------------------------------------------


class DetectionSet(dense.DenseSet):
    """`dense.DenseSet` of objects: in training those of a view, {"boxes" (N, 4), "labels" (N,),
    "masks" (N, S, S) bool}, boxes around what is left of the masks, groups (crowd) left out.

    PAPER SILENT: augmentation. Scale jitter of .1 to 2, where 1 makes the longer side S, crops,
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
        return image, objects_in(masks, target["labels"][single])


def objects_in(masks, labels):
    """Masks (N, S, S) and labels (N,) -> torchvision's target of those with any pixel."""
    masks = masks.bool()
    kept = masks.any(dim=2).any(dim=1)
    masks = masks[kept]
    return {"boxes": mask_boxes(masks), "labels": labels[kept], "masks": masks}


def shape_objects(shapes, index):
    """The objects of a picture of `data.Shapes`, their visible parts, as `CocoScenes` has them."""
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
    return CocoScenes(path, part)


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


# ---- COCO's masks and files ----------------------------------------------------------------------


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
    """Masks (N, H, W), none empty -> their boxes (N, 4), xyxy, which end where the last pixel ends
    (torchvision's: where it begins)."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0, 1, 1])


class CocoScenes(Dataset):
    """COCO's own layout: `scenes[i]` is (PIL image, its objects); the image is opened, not decoded.

    Objects are a dict of tensors: boxes (N, 4) float64, xyxy in pixels; labels (N,) int64 from 1 (0
    is the background); masks (N, H, W) bool; crowd (N,) bool, is it a group of objects; area (N,)
    float64, as COCO lists it. classes[label - 1] is a label's name, category_ids[label - 1] its
    number in COCO's files, image_ids[i] that of image i, ascending.

    ValueError, one line, for whatever is wrong in folder/annotations/instances_{split}2017.json or
    does not fit folder/{split}2017; reading an image of another size than listed raises it, too.
    """

    FAR = 10  # image sides; a corner further away is an error, and would take gigabytes to draw

    def __init__(self, folder, split):
        self.path = Path(folder) / "annotations" / f"instances_{split}2017.json"
        if not self.path.is_file():
            ade = (Path(folder) / "annotations" / "training").is_dir()
            hint = "this is ADE20K's layout, of segmentation" if ade else "give COCO's own layout"
            raise ValueError(f"{self.path} is missing: {hint}")
        try:
            content = json.loads(self.path.read_text())
            listed = sorted(content["images"], key=lambda row: row["id"])
            self._check_images(listed)
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

    def _check_images(self, listed):
        """ValueError if an image is listed twice, or lies outside of its folder."""
        ids = {row["id"] for row in listed}
        if len(ids) < len(listed):
            twice = next(a["id"] for a, b in pairwise(listed) if a["id"] == b["id"])
            raise ValueError(f"{self.path}: image {twice} is listed twice; replace the file")
        for row in listed:
            if ".." in Path(row["file_name"]).parts or Path(row["file_name"]).is_absolute():
                raise ValueError(
                    f"{self.path}: file_name {row['file_name']} of image {row['id']} leaves the "
                    "folder of images; give it relative to that"
                )

    def _check(self, row, place):
        """ValueError if an annotation does not fit the lists of images and categories."""
        wrong, outline = None, row["segmentation"]
        size = self.sizes[place[row["image_id"]]] if row["image_id"] in place else None
        if size is None:
            wrong = f"is of image {row['image_id']}, which is not listed"
        elif row["category_id"] not in self.category_ids:
            wrong = f"is of category {row['category_id']}, which is not listed"
        elif len(row["bbox"]) != 4:
            wrong = f"has a box of {len(row['bbox'])} numbers, not 4"
        elif not all(map(math.isfinite, row["bbox"])) or min(row["bbox"][2:]) < 0:
            wrong = f"has a box of width and height {row['bbox'][2:]}"
        elif isinstance(outline, dict):
            if outline["size"] != size:
                wrong = f"has a mask of {outline['size']}, its image {size} (height, width)"
        else:
            reach = self.FAR * max(size)
            if not all(-reach <= min(part) <= max(part) <= reach for part in outline if part):
                wrong = f"has corners more than {self.FAR} sides away from its image"
        if wrong:
            raise ValueError(f"{self.path}: annotation {row['id']} {wrong}; replace the file")

    def _object(self, row):
        """What is kept of an annotation: (box, label, draw, outline, crowd, area)."""
        x, y, w, h = map(float, row["bbox"])
        label, outline = self.category_ids.index(row["category_id"]) + 1, row["segmentation"]
        if isinstance(outline, dict):
            draw, outline = rle_to_mask, outline["counts"]
        else:  # arrays: a quarter of the memory of lists, and shared by loader workers
            draw, outline = polygons_to_mask, [np.asarray(part, np.float64) for part in outline]
        return [x, y, x + w, y + h], label, draw, outline, bool(row.get("iscrowd")), row["area"]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = Image.open(self.files[i], formats=data.IMAGE_FORMATS)
        height, width = self.sizes[i]
        if not dense.lies_as(image, (width, height)):
            raise ValueError(
                f"{self.files[i]} has {data.upright_size(image)} pixels (width, height), its masks "
                f"{(width, height)}, says {self.path}; replace one of them"
            )
        rows = zip(*self.objects[i], strict=True) if self.objects[i] else [()] * 6
        boxes, labels, draw, outlines, crowd, area = rows
        masks = np.zeros((len(boxes), height, width), bool)
        for n, outline in enumerate(outlines):
            masks[n] = draw[n](outline, height, width)
        return image, {
            "boxes": torch.tensor(boxes, dtype=torch.float64).view(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(masks),
            "crowd": torch.tensor(crowd, dtype=torch.bool),
            "area": torch.tensor(area, dtype=torch.float64),
        }


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
    image; maybe scores (N,). names: of the classes, label 1 first.
    """
    canvas = np.array(dense.view(image))
    boxes = (objects["boxes"] * (dense.VIEW / max(image.size))).tolist()
    order = objects["masks"].flatten(1).sum(dim=1).argsort(descending=True).tolist()
    numbers = (objects["labels"] - 1).tolist()
    for n in order:  # small ones last, on top
        mask = np.array(dense.view(Image.fromarray(objects["masks"][n].byte().numpy()))) > 0
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
    own = dict(what="Detect objects", layout="COCO", width=256, scales=[0.1, 2.0], fits="fits")
    parser = dense.build_parser("detect", layer_decay=LAYER_DECAY, **own)
    return dense.settle(parser.parse_args(argv), LAYER_DECAY)


def main(argv=None):
    args = parse_args(argv)
    device = train.start_processes()
    weights, args = finetune.open_checkpoint(args, "detector", SCRIPT, keep=("width",))
    train_set, val_set, args = dense.build_data(args, DetectionSet, open_source)
    run = build_run(args, weights, device)
    stopped = dense.train_or_measure(run, train_set, val_set, args)
    train.stop_processes()
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    train.run_script(main)
