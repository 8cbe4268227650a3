"""Everything that is done with a checkpoint: what it is worth, what it shows, where it goes.

    python finetune.py --demo                                   # 2 minutes, after train.py --demo
    python finetune.py --task linear --checkpoint runs/mse/checkpoint.pt
    torchrun --nproc_per_node=8 finetune.py --task finetune --checkpoint runs/mse/checkpoint.pt
    python finetune.py --task detect --data path/to/coco --checkpoint runs/mse/checkpoint.pt
    python finetune.py --task segment --data path/to/ade20k --checkpoint runs/mse/checkpoint.pt
    python finetune.py --eval --checkpoint runs/mse/finetune/best.pt
    python finetune.py --task reconstruct --checkpoint runs/mse/checkpoint.pt [MORE ...]
    python finetune.py --task cka --checkpoint runs/mse/checkpoint.pt [MORE ...] none
    python finetune.py --compare runs/seeds                     # several seeds of several rows
    python finetune.py --export encoder.pt --format timm --checkpoint runs/mse/checkpoint.pt

--task linear, finetune, detect and segment are sec. 4 of the paper ("Fine-tuning"), the
supplement's A.2 and Table 2; knn and logistic measure features computed once, without augmentation;
reconstruct measures and draws reconstructions: Table 1, Figures 2 and 3; cka how alike an encoder's
features of masked and of whole images are. In order: what a step of each task minimises, the loop,
network and optimiser; accuracy; average precision and mean IoU (Table 3); k-NN and logistic
regression; reconstructions; CKA; seeds against each other; then, under a banner, checkpoints, data,
benchmark, command line.
What keeps a run alive (processes, precision, checkpoints) is train.py's.

--checkpoint takes those of train.py, any project's file of ViT-MAE weights, or `none`: random
weights. --data: a folder of images in class folders, COCO's own layout for detect, ADE20K's for
segment, or shapes. Writes to OUT: a training checkpoint.pt, best.pt (highest top-1, box AP or mIoU)
and log.jsonl, in per cent: top1 and top5 of the validation images; ap... of boxes, mask_ap... of
masks, as COCO defines them (-1: no such objects); miou over the classes in truth or prediction,
miou_all over all. Each measurement of a detector, --eval's too, also writes results_bbox.json and
results_segm.json in COCO's result format, and either dense task pictures/. knn and logistic write
log.jsonl; reconstruct eval.json and pictures/, cka cka.json and pictures/; --compare compare.json
and compare.png into its folder; OUT of --eval is the checkpoint's folder. Run the same command
again after any interruption and a training continues where its checkpoint was saved (--demo starts
anew).
"""

import argparse
import hashlib
import json
import math
import re
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torchvision.models import Inception_V3_Weights
from torchvision.transforms import v2
from tqdm import tqdm

import data
import losses
import model
import train
from train import fail, is_main, say

# ---- One step: what a task minimises -------------------------------------------------------------


def classification_loss(logits, targets, label_smoothing):
    """Mean cross-entropy in float32. targets: labels (B,) or class probabilities (B, classes)."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def classification_terms(run, images, labels, args):
    """Loss of a batch -> {"loss": scalar}. images: (B, 3, H, W) in [0, 1]. labels: (B,)."""
    targets = labels.to(run.device, non_blocking=True)
    if run.mix is not None:
        images, targets = run.mix(images, targets)  # (B, classes)
    with run.autocast():
        logits = run.network(images)  # (B, classes)
    return {"loss": classification_loss(logits, targets, args.label_smoothing)}


def detection_terms(run, images, objects, args):
    """Mask R-CNN's five losses of a batch -> {name: scalar}; see `model.Detector`.

    objects: a dict for each image, boxes (N, 4), labels (N,) and masks (N, S, S); N may be 0.
    """
    objects = [{k: v.to(run.device, non_blocking=True) for k, v in o.items()} for o in objects]
    with run.autocast():  # the heads turn it off
        return run.network(images, objects)


def segmentation_terms(run, images, maps, args):
    """Loss of a batch -> {"loss": scalar}. maps: classes (B, S, S), 255 = not known."""
    with run.autocast():
        logits, second = run.network(images)  # (B, classes, S, S) each
    maps = maps.to(run.device, non_blocking=True)
    return {"loss": losses.segmentation_loss(logits, maps, second)}


def step_gradients(run, batches, progress, args):
    """Accumulate the mean gradient of a step's batches -> {name: mean of the term over them}.

    The gradient is that of "loss", the sum of the terms of `run.terms`, one of the above.
    """
    totals, share = {}, 1 / len(batches)
    for number, (images, targets, *_) in enumerate(batches, start=1):
        # What is drawn (mixing, stochastic depth, a detector's samples) depends on where the run
        # is, not on what was drawn before; W processes draw as one with W times the --accum.
        place = (number - 1) * train.world_size() + train.rank()
        torch.manual_seed(data.sample_seed(args.seed, progress["step"], place))
        images = data.to_float(images.to(run.device, non_blocking=True))  # (B, 3, H, W)
        # Processes exchange gradients during the last backward pass of a step alone.
        with train.exchange(number == len(batches), run.network):
            terms = run.terms(run, images, targets, args)
            loss = sum(terms.values())
            run.scaler.scale(loss * share).backward()
        for name, value in {**terms, "loss": loss}.items():
            totals[name] = totals.get(name, 0) + value.detach() * share
    return totals


def update(run, apply):
    """Step the optimiser if `apply`, then clear the gradients. The scaler skips fp16 overflows."""
    if apply:
        run.scaler.step(run.opt)
        run.scaler.update()
    run.opt.zero_grad(set_to_none=True)


# ---- The loop over epochs ------------------------------------------------------------------------


def train_task(args, weights, train_set, val_set, device):
    """Linear probe, fine-tuning, detection or segmentation -> (signal that stopped it or 0, best).

    weights: from `open_checkpoint`. best: highest `run.score`, top-1 for instance, in per cent. The
    loop is that of train.py's `pretrain`, with one player.
    """
    run = build_run(args, weights, device)
    run.network.train()
    val = (shard(val_set, args), [])  # and the unreadable ones among its images
    progress, sampler, loader = train.open_run(run, train_set, args)
    if nothing_left := train.finished(progress, args):
        say(nothing_left)
        return 0, progress["best"]
    stop, stopping = train.catch_stop_signals(), False

    while progress["epoch"] <= args.epochs and not stopping:
        epoch = progress["epoch"]
        sampler.epoch, sampler.start = epoch, progress["epoch_step"]  # resumes in mid-epoch
        bar, stream, clock = train.progress_bar(sampler, args), iter(loader), perf_counter()

        while batches := list(islice(stream, args.accum)):  # one step
            position = (epoch - 1) * sampler.steps + progress["epoch_step"]
            warmup, total = args.warmup_epochs * sampler.steps, args.epochs * sampler.steps
            lr = train.learning_rate(position, warmup, total, args.lr)
            train.set_rate(run.opt, lr)  # of the head; lower layers have a part of it
            terms = step_gradients(run, batches, progress, args)
            means, stopping = train.agree(run, terms, batches, stop["signal"], progress, train_set)
            finite = math.isfinite(means["loss"])
            update(run, apply=finite)
            clock = train.book_step(progress, means, finite, clock, bar, args)
            stopping = stopping or progress["step"] == args.steps
            ended = progress["epoch_step"] == sampler.steps
            due = train.save_is_due(progress, stopping, args)
            if due and not ended:  # else after the epoch's measurements
                train.save_checkpoint(Path(args.out) / "checkpoint.pt", run, progress, args)
            if stopping:
                break

        bar.close()
        if ended:
            finish_epoch(run, progress, lr, val, args)  # measures, logs, keeps the best; moves on
            if due or epoch % args.save_every == 0 or epoch == args.epochs:
                train.save_checkpoint(Path(args.out) / "checkpoint.pt", run, progress, args)
    say(train.ending(stopping, progress, args))
    return stop["signal"], progress["best"]


def finish_epoch(run, progress, lr, val, args):
    """Measure, log, keep the best, and move `progress` on. val: (loader, unreadable images)."""
    row, measured = train.epoch_row(progress, lr, args), {}
    if row["epoch"] % args.eval_every == 0 or row["epoch"] == args.epochs:
        measured = run.evaluate(run, *val, args)
    row["bad_images"] += len(val[1])
    train.write_row(row | measured, args.out)
    best = measured.get(run.score, -1.0) > progress["best"]
    if best:
        progress["best"] = measured[run.score]
    train.next_epoch(progress)
    if best:
        train.save_checkpoint(Path(args.out) / "best.pt", run, progress, args)


# ---- Network and optimiser -----------------------------------------------------------------------


def by_task(task):
    """-> (the network's name in a checkpoint, terms of a step, measurement, what picks best.pt)."""
    rows = {
        "detect": ("detector", detection_terms, evaluate_detector, "ap"),
        "segment": ("segmenter", segmentation_terms, evaluate_segmenter, "miou"),
    }
    return rows.get(task, ("classifier", classification_terms, evaluate_classifier, "top1"))


def build_network(args):
    """The encoder of --model with the head of --task, random weights; ValueError: sizes misfit."""
    classes = len(args.classes)
    sizes = dict(image_size=args.image_size, patch_size=args.patch_size, drop=args.drop_path)
    if args.task == "detect":
        return model.build_detector(args.model, classes, width=args.width, **sizes)
    if args.task == "segment":
        return model.build_segmenter(args.model, classes, width=args.width, **sizes)
    frozen = args.task != "finetune"
    return model.build_classifier(args.model, classes, pool=args.pool, frozen=frozen, **sizes)


def build_run(args, weights, device):
    """What trains -> namespace of network, opt, scaler, device and dtype (see train.py).

    args: complete, as `open_checkpoint` and `build_data` leave them. terms, evaluate, score: the
    task's, from `by_task`. mix: function of a batch (images, labels) that mixes samples, or None.
    parts, script, must_fit: what a checkpoint holds.
    """
    dtype = train.choose_precision(args.amp, device)
    torch.manual_seed(args.seed)  # the same initial weights on every process
    with train.refusals():  # sizes that do not fit each other, or weights that do not
        network = build_network(args)
        if weights is not None:
            load_weights(network, weights, args)
    network.to(device)
    groups = layer_groups(network, args.weight_decay, args.layer_decay)
    run = SimpleNamespace(device=device, dtype=dtype, script="finetune.py", must_fit=MUST_FIT)
    run.autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    part, run.terms, run.evaluate, run.score = by_task(args.task)
    run.mix = build_mix(args, len(args.classes))
    run.network, run.scaler = train.wrap(network, device), train.scaler(device, dtype)
    run.opt = torch.optim.AdamW(groups, betas=tuple(args.betas), fused=True)
    run.parts = {part: network, "opt": run.opt, "scaler": run.scaler}
    return run


def load_weights(network, weights, args):
    """Give the network what `open_checkpoint` read: its encoder, or with --eval all of it."""
    path, side = args.checkpoint, network.encoder.side
    if not args.eval:
        encoder = model.encoder_weights(weights, side, path)
        return model.load_whole(network.encoder, encoder, path)
    prefix = "encoder."
    encoder = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    encoder = model.encoder_weights(encoder, side, path)
    rest = {k: v for k, v in weights.items() if not k.startswith(prefix)}
    model.load_whole(network, rest | {prefix + k: v for k, v in encoder.items()}, path)


def layer_groups(network, weight_decay, layer_decay):
    """AdamW groups with an `lr_scale`: 1 for the head, times `layer_decay` for each layer below."""
    layers, groups = network.layers(), []
    if layer_decay == 1:
        layers = [[p for layer in layers for p in layer]]  # fewer groups are faster
    for below, parameters in enumerate(reversed(layers)):
        for group in train.parameter_groups(parameters, weight_decay):
            if group["params"]:
                groups.append(group | {"lr_scale": layer_decay**below})
    return groups


def build_mix(args, classes):
    """Mixup or CutMix, with equal chances where both are on; None if neither is.

    PAPER: supplement, Table 2: mixup .8, cutmix 1. PAPER SILENT: how the two share batches; ours is
    MAE's way, every batch gets one of them, with one draw per batch and process.
    """
    mixes = []
    if args.mixup:
        mixes.append(v2.MixUp(alpha=args.mixup, num_classes=classes))
    if args.cutmix:
        mixes.append(v2.CutMix(alpha=args.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes) if mixes else None


# ---- Accuracy ------------------------------------------------------------------------------------


def count_correct(scores, labels):
    """-> {"top1", "top5": how many labels are among the highest scores; "images": how many count}.

    scores: (B, classes), -inf = not even a guess. labels: (B,), -1 = does not count.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    hits = (best.indices == labels[:, None]) & best.values.isfinite()  # (B, 5)
    return {"top1": hits[:, 0].sum(), "top5": hits.sum(), "images": (labels >= 0).sum()}


def as_row(sums, classes):
    """Sums over all images -> {name: mean}, accuracies in per cent; no top5 up to five classes."""
    count = max(1, sums["images"])
    row = {"top1": 100 * sums["top1"] / count}
    if classes > 5:
        row["top5"] = 100 * sums["top5"] / count
    if "val_loss" in sums:
        row["val_loss"] = sums["val_loss"] / count
    return row | {"val_images": int(sums["images"])}


@torch.no_grad()
def evaluate_classifier(run, loader, known, args):
    """Accuracy and loss over the whole validation set -> row, see `as_row`.

    loader: this process's `shard`. known: list of unreadable images' indices, added to here; they
    are left out.
    """
    network, found = train.unwrap(run.network).eval(), {}
    sums = dict.fromkeys(("top1", "top5", "images", "val_loss"), 0)
    for images, labels, _, bad in loader:
        found |= dict(bad)
        labels = labels.to(run.device, non_blocking=True)
        with run.autocast():
            logits = network(data.to_float(images.to(run.device, non_blocking=True)))
        loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
        for name, value in {**count_correct(logits, labels), "val_loss": loss}.items():
            sums[name] += value
    network.train()
    note_unread(found, known, loader.dataset)
    return as_row(train.sum_over_processes(sums, run.device), network.head.out_features)


def note_unread(found, known, dataset):
    """Name the unreadable images of a measurement that are not yet in `known`, and add them."""
    found = {index: reason for index, reason in found.items() if index not in known}
    train.note_bad_images(found, known, dataset, fate="left out")


# ---- Detection and segmentation: Table 3 ---------------------------------------------------------


def detect(run, batch, args):
    """A batch's detections -> [(found, objects)] of its readable images, in their own pixels.

    batch: of a `DenseSet` that does not augment. found: as `model.Detector` gives it, but with
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
        boxes = data.boxes_to_image(output["boxes"], place)
        masks = model.paste_masks(output["masks"], boxes, place.height, place.width)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # not in the padding
        found = output | {"boxes": boxes, "masks": masks}
        pairs.append(({k: v[inside].cpu() for k, v in found.items()}, objects))
    return pairs


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
def evaluate_detector(run, loader, known, args):
    """COCO's average precision of boxes and masks over the whole validation set, in per cent.

    -> row of `losses.coco_ap`, the masks' under mask_..., -1 = no object of that size. Draws the
    picture, and writes OUT/results_bbox.json and results_segm.json, in COCO's result format: the
    latest measurement's. loader, known: see `evaluate_classifier`.
    """
    network, found, rows = train.unwrap(run.network).eval(), {}, []
    source = loader.dataset.source
    for batch in loader:
        found |= dict(batch[3])
        for detections, objects in detect(run, batch, args):
            pair = [losses.match_detections(detections, objects, masks=m) for m in (False, True)]
            index = objects["index"]
            rows.append((index, *pair, coco_results(detections, source, index)))
    note_unread(found, known, loader.dataset)
    rows = sorted(sum(train.of_all_processes(rows), []), key=lambda row: row[0])  # COCO's order
    _, boxes, masks, results = zip(*rows, strict=True)
    row = losses.coco_ap(boxes)
    row |= {f"mask_{name}": value for name, value in losses.coco_ap(masks).items()}
    row = {name: 100 * value if value >= 0 else value for name, value in row.items()}
    if is_main():
        write_results(args.out, [entry for image in results for entry in image])
        draw_scenes("detections", run, loader.dataset, args)
    network.train()
    return row | {"val_images": len(rows)}


def coco_results(found, source, index):
    """An image's detections as entries of COCO's result format, boxes and masks together."""
    return [
        {
            "image_id": source.image_ids[index],
            "category_id": source.category_ids[label - 1],
            "score": score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": data.mask_to_rle(mask),
        }
        for (x0, y0, x1, y1), label, score, mask in zip(
            *(found[name].tolist() for name in ("boxes", "labels", "scores")),
            found["masks"],
            strict=True,
        )
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


# ---- Without training: k-NN, and logistic regression on features computed once -------------------


def gathered(tensor, dim=0):
    """Every process's tensor, concatenated along `dim`, on every process; lengths may differ."""
    return torch.cat(train.of_all_processes(tensor.cpu()), dim).to(tensor.device)


def pools_of(args):
    """The tokens that --pool names."""
    return ("cls", "mean") if args.pool == "auto" else (args.pool,)


@torch.no_grad()
def extract(run, dataset, args):
    """Features of this process's part -> (float32 (n, C), labels (n,), places in the set (n,)).

    With --pool auto CLS and the mean token, side by side: (n, 2 C).
    """
    network, found = train.unwrap(run.network).eval(), {}
    pools = pools_of(args)
    width = len(pools) * network.head.in_features
    features, targets = [torch.zeros(0, width, device=run.device)], [torch.zeros(0).long()]
    for images, labels, _, bad in shard(dataset, args):
        found |= dict(bad)
        with run.autocast():
            tokens = network.encoder(data.to_float(images.to(run.device, non_blocking=True)))
            x = torch.cat([model.pooled(tokens, pool) for pool in pools], dim=1)
        features.append(x.float()[labels >= 0])
        targets.append(labels)
    note_unread(found, [], dataset)
    features, labels = torch.cat(features), torch.cat(targets)  # labels: -1 where unreadable
    places = torch.arange(train.rank(), len(dataset), train.world_size())[labels >= 0]
    return features, labels[labels >= 0].to(run.device), places


def whiten(bank, queries):
    """Both, turned and scaled alike, so that the bank of all processes has mean 0, covariance 1."""
    full = gathered(bank).double()
    values, vectors = torch.linalg.eigh(torch.cov(full.T))
    scale = (values + 1e-6 * values.max()).rsqrt()  # directions without variance stay finite
    return [((x - full.mean(dim=0)) @ vectors * scale).float() for x in (bank, queries)]


def knn_scores(queries, bank, bank_labels, *, classes, k, temperature):
    """Votes of the k nearest training images, each weighing exp((cosine - the nearest's) /
    temperature); classes without a vote get -inf (Wu et al. 2018).

    queries: (Q, C), the same on every process. bank: (n, C), this process's part of the training
    set, and bank_labels (n,). Vectors have unit length. Returns (Q, classes), over all processes.
    """
    scores = []
    for chunk in queries.split(1024):
        # The nearest k of all are among the nearest k of each process.
        near = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        similarity, labels = gathered(near.values, 1), gathered(bank_labels[near.indices], 1)
        top = similarity.topk(min(k, similarity.shape[1]), dim=1)
        weights = ((top.values - top.values[:, :1]) / temperature).exp()  # 1 for the nearest
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        votes.scatter_add_(1, labels.gather(1, top.indices), weights)
        scores.append(votes.masked_fill(votes == 0, -math.inf))
    return torch.cat(scores)


def fit_logistic(x, labels, *, classes, penalties):
    """Multinomial logistic regression, once per penalty -> list of (weight (classes, C), bias).

    Minimises mean cross-entropy + penalty / 2 |W|^2 over all of x (n, C) at once, in float64. W is
    that of features standardised by the mean and deviation of x; weight and bias are for features
    as they are. Each penalty starts at the one before: give the strongest first.
    """
    x = x.double()
    mean, deviation = x.mean(dim=0), (x.var(dim=0, correction=0) + 1e-6).sqrt()
    x = (x - mean) / deviation
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    x = x @ axes  # uncorrelated features, so that `descend` can scale each by itself
    start, heads = (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)), []
    for penalty in penalties:
        start = descend(x, labels, *start, penalty=penalty, variances=variances)
        weight = start[0] @ axes.T / deviation
        heads.append((weight, start[1] - weight @ mean))
    return heads


def descend(x, labels, weight, bias, *, penalty, variances):
    """L-BFGS from weight (classes, C) and bias (classes,), tensors -> both at the minimum.

    x: (n, C), uncorrelated features of these variances (C,). Each is moved in units of
    1 / sqrt(curvature at the start), in which slopes compare and small features need no more steps
    than large ones. Ends where no slope is above SLOPE; says so if ITERATIONS were too few.
    """
    chunks = x.split(16384)  # bounds memory
    spread = torch.zeros_like(bias)  # the cross-entropy's curvature by a class's logit: p (1 - p)
    for some in chunks:
        p = F.linear(some, weight, bias).softmax(dim=1)
        spread += (p - p.square()).sum(dim=0) / len(x)
    spread = spread.mean().clamp(min=1e-9)
    scale, bias_scale = (spread * variances.clamp(min=0) + penalty).rsqrt(), spread.rsqrt()
    u, v = (weight / scale).requires_grad_(), (bias / bias_scale).requires_grad_()
    steps = dict(max_iter=ITERATIONS, max_eval=2 * ITERATIONS, history_size=10)
    ends = dict(tolerance_grad=SLOPE, tolerance_change=0)
    solver = torch.optim.LBFGS([u, v], **steps, **ends, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        total = penalty / 2 * (u * scale).square().sum()
        total.backward()
        for some, own in zip(chunks, labels.split(16384), strict=True):
            logits = some @ (u * scale).T + v * bias_scale
            part = F.cross_entropy(logits, own, reduction="sum") / len(x)
            part.backward()
            total = total.detach() + part.detach()
        return total

    solver.step(loss)
    loss()  # the line search may have looked elsewhere last
    slope = max(u.grad.abs().max().item(), v.grad.abs().max().item())
    if not slope <= SLOPE:
        say(
            f"logistic regression did not reach its minimum in {ITERATIONS} iterations: slope "
            f"{slope:.1e}, not {SLOPE:.0e}, at penalty {penalty:g}; do not trust its accuracy"
        )
    return (u * scale).detach(), (v * bias_scale).detach()


def folds_of(labels, seed):
    """Indices (n,) of up to FOLDS disjoint parts of the images, about equal also in each class.

    No part has an image that is alone in its class: without it the class could not be learnt.
    Every other class is in the rest of each part. Ends with status 2 if no class has two images.
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=data.sample_generator(seed))
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    order, alone = order[counts[labels[order]] > 1], int((counts == 1).sum())
    if len(order) == 0:
        fail(
            f"no class has two training images ({len(labels)} in all): none can be held out to "
            "choose the penalty of logistic regression; give more"
        )
    if alone:
        say(f"classes with a single training image: {alone}; they do not help choose the penalty")
    return [order[i::FOLDS] for i in range(min(FOLDS, len(order)))]  # each class dealt in turn


def logistic_scores(queries, bank, labels, *, classes, seed):
    """Logistic regression -> (logits of the queries (Q, classes), {name: what was chosen}).

    queries, bank: {token: features (Q, C) or (n, C)}. labels: (n,). Chosen are the token and the
    one of PENALTIES whose fits to all but one of `folds_of` name most images of that fold, over all
    folds: pool, penalty and held_out_top1, in per cent. Among equals the strongest penalty, which
    follows the images least, then the first token. Then all images are used. A class without
    images gets -inf. Every process fits the same.
    """
    present, labels = labels.unique(return_inverse=True)
    folds = folds_of(labels, seed)
    right = {(penalty, pool): 0 for penalty in PENALTIES for pool in bank}
    for pool, x in bank.items():
        for fold in folds:
            rest = torch.ones_like(labels, dtype=torch.bool)
            rest[fold] = False
            fit = fit_logistic(x[rest], labels[rest], classes=len(present), penalties=PENALTIES)
            for penalty, head in zip(PENALTIES, fit, strict=True):
                guesses = F.linear(x[fold].double(), *head).argmax(dim=1)
                right[penalty, pool] += int((guesses == labels[fold]).sum())
    penalty, pool = max(right, key=right.get)  # the first of equals
    if penalty in (PENALTIES[0], PENALTIES[-1]):
        say(
            f"logistic regression chose penalty {penalty:g}, an end of {PENALTIES[0]:g} to "
            f"{PENALTIES[-1]:g}: one beyond might do better"
        )
    down_to = PENALTIES[: PENALTIES.index(penalty) + 1]
    *_, head = fit_logistic(bank[pool], labels, classes=len(present), penalties=down_to)
    scores = torch.full((len(queries[pool]), classes), -math.inf, device=labels.device).double()
    scores[:, present] = F.linear(queries[pool].double(), *head)
    top1 = 100 * right[penalty, pool] / sum(len(fold) for fold in folds)
    return scores, {"pool": pool, "penalty": penalty, "held_out_top1": top1}


def measure_features(run, train_set, val_set, args):
    """--task knn or logistic: accuracy over the whole validation set -> row, see `as_row`.

    PAPER SILENT: it has no k-NN. The field's compares features as they are; --whiten first gives
    every direction the same variance, lest the few that vary most decide.
    """
    bank, bank_labels, places = extract(run, train_set, args)
    queries, labels, _ = (gathered(part) for part in extract(run, val_set, args))
    classes, about = len(args.classes), {}
    if args.task == "knn":
        if args.whiten:
            bank, queries = whiten(bank, queries)
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
        scores = knn_scores(
            queries, bank, bank_labels, classes=classes, k=args.k, temperature=args.temperature
        )
    else:
        order = gathered(places).argsort().to(bank.device)  # that of one process
        x, x_labels = gathered(bank)[order], gathered(bank_labels)[order]
        pools = pools_of(args)
        queries, x = (
            dict(zip(pools, features.chunk(len(pools), dim=1), strict=True))
            for features in (queries, x)
        )
        scores, about = logistic_scores(queries, x, x_labels, classes=classes, seed=args.seed)
    counts = {name: int(count) for name, count in count_correct(scores, labels).items()}
    return as_row(counts, classes) | about  # every process has all queries: nothing to add up


# ---- Reconstructions (Table 1, Figures 2 and 3) --------------------------------------------------


def open_autoencoders(args, device):
    """--checkpoint's autoencoders -> ({name of the row: run}, args with what they settle).

    run: mae, device, dtype and its autocast, its own args, path. Sizes must agree; the seed is the
    first checkpoint's.
    """
    runs, first = {}, None
    sizes = ("image_size", "patch_size", "mask_ratio")
    for path in args.checkpoints:
        with train.refusals():
            checkpoint = model.load_file(path, "a checkpoint of train.py")
        if not train.made_by("train.py", checkpoint, "mae"):
            fail(f"{path} is not a checkpoint of train.py: reconstructions need its decoder")
        own = argparse.Namespace(**checkpoint["arguments"])
        first = first or own
        for what in sizes:
            flag, here = "--" + what.replace("_", "-"), getattr(own, what)
            if here != getattr(first, what):
                there = getattr(first, what)
                fail(f"{path} has {flag} {here}, {args.checkpoint} {there}: evaluate them apart")
            if getattr(args, what, None) not in (None, here):
                fail(f"{path} has {flag} {here}, not {getattr(args, what)}; leave {flag} off")
        if not losses.LOSSES[own.loss]["pixel"]:
            fail(f"{path} is of --loss {own.loss}, which paints nothing: see --task knn, linear")
        mae = train.build_autoencoder(own)
        with train.refusals():
            model.load_whole(mae, checkpoint["mae"], path)
        name = own.loss
        if own.arch != losses.LOSSES[own.loss]["arch"]:
            name += f" ({own.arch})"
        if own.norm_pix_loss:
            name += " (true contrast)"  # see train.py's `reconstruct`
        if name in runs:
            name += f" {len(runs) + 1}"
        dtype, mae = train.choose_precision(args.amp, device), mae.to(device).eval()
        runs[name] = SimpleNamespace(mae=mae, device=device, dtype=dtype, args=own, path=path)
        on = dtype is not None
        runs[name].autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=on)
    settled = {what: getattr(first, what) for what in (*sizes, "seed")}
    return runs, argparse.Namespace(**vars(args) | settled)


def load_inception(args, device):
    """-> (`InceptionFeatures` or None, what it is or why there is none)."""
    source = args.inception_weights
    get = "give --inception-weights pt_inception-2015-12-05-6726825d.pth, a release of "
    get += "github.com/mseitzer/pytorch-fid (fid_weights)"
    if source == "none":
        return None, "none, so neither IS nor FID"
    if source == "torchvision":
        weights = reason = None
        try:
            with train.first_of_a_node_first():
                weights = Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(
                    progress=False, check_hash=True, weights_only=True
                )
        except (OSError, RuntimeError) as error:  # no network, or half a download
            reason = error
        if train.sum_over_processes({"missing": weights is None}, device)["missing"]:
            why = reason or "on another process"
            return None, f"none, so neither IS nor FID (cannot be downloaded: {why}); {get}"
        what = f"torchvision's, not those of published FIDs; for these {get}"
    else:
        with train.refusals():
            weights = model.load_file(source, "a file of Inception weights")
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
        what = f"{source}, those of published FIDs"
        if not digest.startswith("6726825d"):
            what = f"{source}, not the file of published FIDs; for these {get}"
    try:
        inception = model.InceptionFeatures(weights)
    except ValueError as error:
        fail(f"{source} is not a file of Inception weights: {error}; {get}")
    return inception.to(device), what


@torch.no_grad()
def measure_reconstructions(args, device):
    """Table 1 and Figures 2 and 3 of --checkpoint's autoencoders, on the whole validation set.

    The same random masks for all, also for `boot_mae`, whose log has the PSNR of masks in blocks.
    """
    runs, args = open_autoencoders(args, device)
    out = Path(args.out)
    with train.writing(out):
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    _, source = train.open_data(args, args.image_size)
    patches = (args.image_size // args.patch_size) ** 2
    common = dict(image_size=args.image_size, num_patches=patches, seed=args.seed)
    val_set = data.PretrainSet(source, augment=False, limit=args.val_images, **common)
    seeds = {run.args.seed for run in runs.values()}
    if len(seeds) > 1 and getattr(source, "held_out", False):
        fail(
            f"the checkpoints held out different images (seeds {seeds}): evaluate them apart, or "
            f"put validation images into {args.data}/val"
        )
    inception, what = load_inception(args, device)
    say(f"Inception weights: {what}")
    totals, sums, unread = measure(runs, val_set, inception, args, device)
    if not is_main():  # the sums are all processes', what follows is not shared
        return

    count = totals.pop("images")
    results = {"real": {}} if inception else {}
    results |= {name: {} for name in runs}
    for (name, metric), total in totals.items():
        results[name][metric] = total / count
    for (name, kind), part in sums.items():
        end = f"_{kind}" if kind else ""
        results[name]["is" + end], results[name]["is_std" + end] = losses.inception_score(part)
        if kind and count > 1:
            both = (
                *losses.mean_and_covariance(part),
                *losses.mean_and_covariance(sums["real", ""]),
            )
            results[name]["fid" + end] = losses.frechet_distance(*both)
    about = {"data": args.data, "images": int(count), "unreadable": unread}
    about |= {k: getattr(args, k) for k in ("image_size", "patch_size", "mask_ratio", "seed")}
    about |= {"inception": what, "checkpoints": {name: str(r.path) for name, r in runs.items()}}
    with train.writing(out):
        text = json.dumps(about | {"results": results}, indent=1)
        (out / "eval.json").write_text(text + "\n")
        draw_figures(out / "pictures", runs, val_set, device)
    print_table(results, runs, int(count))
    say(f"done: {out}/eval.json, {out}/pictures/")


def measure(runs, val_set, inception, args, device):
    """One pass over the images -> (totals, sums for IS and FID, unreadable images left out).

    totals: {"images": number, (run's name, metric): sum}. sums: {(run's name, kind):
    `inception_sums`}, ("real", "") for the originals. Both over all processes.
    """
    splits = min(10, len(val_set))  # of IS
    totals = {"images": 0} | {(name, metric): 0 for name in runs for metric in losses.METRICS}
    sums, unread, found = {}, [], {}

    def count_features(name, kind, images, split):
        if inception is None:
            return
        features, logits = inception(images)
        for key, value in losses.inception_sums(features, logits, split, splits).items():
            sums[name, kind][key] += value

    if inception is not None:  # sums of no images, so that every process has them all
        features = torch.zeros(0, inception.classify.in_features, device=device)
        logits = torch.zeros(0, inception.classify.out_features, device=device)
        for name, kind in [("real", ""), *((name, kind) for name in runs for kind in losses.KINDS)]:
            nothing = torch.zeros(0, dtype=torch.long, device=device)
            sums[name, kind] = losses.inception_sums(features, logits, nothing, splits)
    rank = train.rank()
    indices = torch.arange(rank, len(val_set), train.world_size())
    loader, done = shard(val_set, args), 0
    for images, mask_noise, _, bad in tqdm(
        loader, disable=None if is_main() else True, unit="batches"
    ):
        index = indices[done : done + len(images)]
        done += len(images)
        found |= dict(bad)
        kept = readable(index, bad)
        split = (index[kept] * splits // len(val_set)).to(device)
        real = data.to_float(images[kept].to(device))
        if not len(real):
            continue
        totals["images"] += len(real)
        count_features("real", "", real, split)
        for name, run in runs.items():
            fake, hidden = train.reconstruct(run, real, mask_noise[kept].to(device), run.args)
            values, fakes = losses.image_quality(fake, real, hidden)
            for metric, value in values.items():
                totals[name, metric] += value
            for kind, fake in fakes.items():
                count_features(name, kind, fake, split)
    train.note_bad_images(found, unread, val_set, fate="left out")
    if dist.is_initialized():
        for part in sums.values():
            for tensor in part.values():
                dist.all_reduce(tensor)
    return train.sum_over_processes(totals, device), sums, len(unread)


def print_table(results, runs, count):
    """Table 1 on the screen: a line for each checkpoint and kind of reconstruction."""
    width = max(len(name) for name in [*runs, "original"])

    def line(name, kind, pixels, row):
        end = f"_{kind}" if kind else ""
        score = distance = "-"
        if "is" + end in row:
            score = f"{row['is' + end]:.2f} +- {row['is_std' + end]:.2f}"
        if "fid" + end in row:
            distance = f"{row['fid' + end]:.2f}"
        say(f"{name:{width}}  {kind:6}  {pixels:20}  {score:>15}  {distance:>8}")

    say(f"{count} images; L1 of pixels in [0, 1], PSNR in dB")
    say(f"{'':{width}}              L1   PSNR   SSIM               IS       FID")
    if "real" in results:
        line("original", "", "", results["real"])
    for name in runs:
        for kind in losses.KINDS:
            l1, decibels, similarity = (
                results[name][f"{m}_{kind}"] for m in ("l1", "psnr", "ssim")
            )
            pixels = f"{l1:.4f}  {decibels:5.2f}  {similarity:.3f}"
            line(name if kind == losses.KINDS[0] else "", kind, pixels, results[name])


def draw_figures(folder, runs, val_set, device, rows=8):
    """Figures 2 and 3 of the first images, and every checkpoint's curves, as PNG files.

    reconstruction.png: a column for each checkpoint, its hidden part pasted into the visible
    patches (PAPER SILENT: whether Figure 2's are; MSE trains nothing else). attention.png: the
    last layer's attention of CLS, each head and their mean; of several checkpoints the means side
    by side, and the heads in attention_NAME.png each.
    """
    images, mask_noise = data.collate([val_set[0, i] for i in range(min(rows, len(val_set)))])[:2]
    real, mask_noise = data.to_float(images.to(device)), mask_noise.to(device)
    figure_2, figure_3 = {"original": real}, {"original": real}
    for name, run in runs.items():
        fake, hidden = train.reconstruct(run, real, mask_noise, run.args)
        figure_2["masked"] = data.grey_out(real, hidden)
        figure_2[name] = torch.where(hidden > 0, fake, real)
        maps = run.mae.cls_attention(real).cpu()  # (B, heads, side, side)
        heads = {f"head {n + 1}": data.heat(maps[:, n]) for n in range(maps.shape[1])}
        mean = data.heat(maps.mean(dim=1))
        figure_3[name] = mean
        end = "" if len(runs) == 1 else "_" + re.sub(r"\W+", "_", name).strip("_")
        data.save_picture(
            folder / f"attention{end}.png", {"original": real, "mean of heads": mean} | heads
        )
        data.draw_curves(folder / f"curves{end}.png", Path(run.path).parent / "log.jsonl")
    data.save_picture(folder / "reconstruction.png", figure_2)
    if len(runs) > 1:
        data.save_picture(folder / "attention.png", figure_3)


# ---- CKA of the features of masked and of whole images -------------------------------------------

RATIOS = [n / 10 for n in range(1, 10)]  # hidden parts of the patches


def open_encoders(args, device):
    """--checkpoint's encoders -> ({name of the row: encoder}, args with what they settle).

    `none`: random weights of the first file's sizes. All must take images and patches of one size,
    so that they see the same patches.
    """
    encoders, first = {}, None
    for path in args.checkpoints:  # `none` comes last
        asked = args if path != "none" else first or args
        weights, own = open_checkpoint(argparse.Namespace(**vars(asked) | {"checkpoint": path}))
        first = first or own
        first.seen_seeds = sorted({*first.seen_seeds, *own.seen_seeds})
        sizes, others = ((x.image_size, x.patch_size) for x in (own, first))
        if sizes != others:
            fail(
                f"{path} has --image-size and --patch-size {sizes}, {first.checkpoint} {others}: "
                "compare them apart"
            )
        torch.manual_seed(args.seed)  # the same random weights on every process
        with train.refusals():
            encoder = model.build_encoder(own.model, *sizes)
            if weights is not None:
                weights = model.encoder_weights(weights, encoder.side, path)
                model.load_whole(encoder, weights, path)
        file = Path(path).absolute()  # checkpoint.pt is what all of train.py's files are called
        name = file.parent.name if file.name == "checkpoint.pt" else file.stem
        name = "random weights" if path == "none" else name
        name += f" {len(encoders) + 1}" if name in encoders else ""
        encoders[name] = encoder.to(device).eval()
    return encoders, first


def block_features(encoder, images, ids_keep, pool):
    """CLS or mean patch token after each block, before the last norm: (blocks, B, C) float32.

    images: (B, 3, H, W) in [0, 1]. ids_keep: (B, K), the patches to look at. pool: "cls", "mean".
    """
    levels, parts = range(1, len(encoder.blocks) + 1), []
    for some, ids in zip(images.split(32), ids_keep.split(32), strict=True):  # less memory
        _, outputs = encoder.encode(some, ids, levels)  # [(b, 1 + K, C)]
        parts.append(torch.stack([model.pooled(x.float(), pool) for x in outputs]))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def measure_cka(args, device):
    """How little does an encoder mind what is hidden? CKA of its features of masked and of whole
    images, for each of RATIOS and each block: Figure 1 of Kong and Zhang, "Understanding Masked
    Image Modeling via Learning Occlusion Invariant Feature", CVPR 2023.

    PAPER SILENT (theirs): tokens, batches, images. Ours: CLS or, with --pool mean, the mean of the
    patches that the encoder sees; 256 images, --batch-size; the whole validation set. --seed fixes
    an image's masks; what a low ratio hides, a higher one hides, too.
    """
    encoders, args = open_encoders(args, device)
    patches = (args.image_size // args.patch_size) ** 2
    if int(patches * (1 - RATIOS[-1])) < 1:
        fail(f"with {RATIOS[-1]} hidden, none of {patches} patches is left; lower --patch-size")
    _, source = train.open_data(args, args.image_size)
    check_held_out(source, args)
    common = dict(image_size=args.image_size, num_patches=patches, seed=args.seed)
    val_set = data.PretrainSet(source, augment=False, limit=args.val_images, **common)
    if len(val_set) < 4 * train.world_size():
        fail(f"{len(val_set)} images are too few for CKA: it needs 4 per process, better hundreds")
    dtype, found, unread = train.choose_precision(args.amp, device), {}, []
    sums = {k: torch.zeros(len(RATIOS), len(e.blocks), 3).double() for k, e in encoders.items()}
    mine = torch.arange(train.rank(), len(val_set), train.world_size()).split(args.batch_size)
    bar, count = tqdm(shard(val_set, args), disable=None if is_main() else True), 0
    for index, (images, mask_noise, _, bad) in zip(mine, bar, strict=True):
        found |= dict(bad)
        kept = readable(index, bad)
        if kept.sum() < 4:  # too few for an estimate
            continue
        count += kept.sum().item()
        images, mask_noise = data.to_float(images[kept].to(device)), mask_noise[kept].to(device)
        for name, encoder in encoders.items():
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                seen = (model.random_masking(mask_noise, ratio)[0] for ratio in [0, *RATIOS])
                whole, *masked = (block_features(encoder, images, ids, args.pool) for ids in seen)
            sums[name] += torch.stack([losses.cka_sums(x, whole) for x in masked]).cpu()
    note_unread(found, unread, val_set)
    parts, counts = zip(*train.of_all_processes((sums, count)), strict=True)
    values = {name: losses.cka(sum(part[name] for part in parts)) for name in encoders}
    if not all(value.isfinite().all() for value in values.values()):
        fail(f"{sum(counts)} images in batches of {args.batch_size} are too few for CKA")
    about = {"data": args.data, "images": sum(counts), "unreadable": len(unread), "ratios": RATIOS}
    settings = ("image_size", "patch_size", "batch_size", "seed", "pool")
    about |= {k: getattr(args, k) for k in settings}
    about["checkpoints"] = dict(zip(encoders, args.checkpoints, strict=True))
    if is_main():
        write_cka(Path(args.out), values, about)


def write_cka(out, values, about):
    """OUT/cka.json; a table and OUT/pictures/cka.png of the first, a middle and the last block.

    values: {name: CKA (ratios, blocks)}.
    """
    width, charts = max(map(len, values)), {}
    say(f"CKA of masked and whole images ({about['images']}), by the hidden part:")
    say(" " * (width + 8) + "".join(f"{ratio:7}" for ratio in RATIOS))
    for place, part in (("first", 0), ("middle", 0.5), ("last", 1)):
        lines = {}
        for name, value in values.items():
            row = value[:, round(part * (value.shape[1] - 1))].tolist()
            lines[name] = list(zip(RATIOS, row, strict=True))
            say(f"{place:6}  {name:{width}}" + "".join(f"{v:7.3f}" for v in row))
        charts[f"{place} block"] = ("part hidden", RATIOS[0], RATIOS[-1], lines)
    lowest = math.floor(10 * min(value.min().item() for value in values.values())) / 10
    with train.writing(out):
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        results = {name: value.tolist() for name, value in values.items()}
        (out / "cka.json").write_text(json.dumps(about | {"cka": results}, indent=1) + "\n")
        data.save_charts(out / "pictures/cka.png", charts, bounds=(lowest, 1), legend=True)
    say(f"done: {out}/cka.json, {out}/pictures/cka.png")


# ---- Several seeds against each other ------------------------------------------------------------


def read_runs(folder):
    """Runs in FOLDER/ROW/SEED -> {"TASK score": {row: {seed: value}}}, from the ends of their logs.

    TASK is where a log lies below the run, such as knn; nothing for pre-training. A log that ends
    without a score, as an unfinished run's may, is named and left out.
    """
    found, ends = {}, {}
    rows = sorted(p.name for p in folder.glob("*/") if p.is_dir())
    order = [*(name for name in losses.LOSSES if name in rows), *rows]
    for row in dict.fromkeys(order):
        logs = (folder / row).glob("*/**/log.jsonl")
        for log in sorted(logs, key=lambda log: (len(log.parts), log)):
            seed, *task = log.parent.relative_to(folder / row).parts
            if not seed.isdigit():
                fail(f"{log} is not of ROW/SEED/, SEED a number; --compare looks for no other logs")
            *_, last = data.read_log(log) or [{}]
            scores = [name for name in SCORES if name in last]
            if not scores:
                say(f"{log} is left out: it does not end with any of {', '.join(SCORES)}")
            for score in scores:
                name = " ".join([*task, score])
                found.setdefault(name, {}).setdefault(row, {})[seed] = last[score]
                ends.setdefault(name, set()).add(last.get("epoch"))
    for name, epochs in ends.items():
        if len(epochs) > 1:
            epochs = sorted(epochs, key=str)
            say(f"{name}: logs end at different epochs, {epochs}; are some runs unfinished?")
    return found


def mean_and_error(values):
    """Mean of a list and its standard error, deviation / sqrt(n); None for a single value."""
    values = torch.tensor(values, dtype=torch.float64)
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return values.mean().item(), error


def summary(rows, first):
    """{row: {seed: value}} -> {row: {values, mean, error, difference, difference_error}}.

    Differences are to the row `first`, in pairs of one seed; errors are standard errors.
    """
    found = {}
    for row, seeds in rows.items():
        mean, error = mean_and_error(list(seeds.values()))
        found[row] = dict(values=seeds, mean=mean, error=error)
        pairs = [value - rows[first][seed] for seed, value in seeds.items() if seed in rows[first]]
        if row != first and pairs:
            found[row]["difference"], found[row]["difference_error"] = mean_and_error(pairs)
    return found


def compare(folder):
    """Means over seeds, and differences to the first row in pairs of one seed: a table, a picture.

    Pairs share what a seed fixes: the order of the images; between rows of one kind of mask, their
    crops and the masks; between rows whose networks are the same, the weights at the start.
    """
    found = read_runs(folder)
    if not found:
        fail(f"{folder} has no results: --compare takes logs in {folder}/ROW/SEED/ and below")
    results = {score: summary(rows, next(iter(rows))) for score, rows in found.items()}
    say(
        "mean +- standard error (runs); difference to the first row +- its own, * = above two of it"
    )

    def with_error(value, error, digits):
        return f"{value:{digits}}" + ("" if error is None else f" +- {error:6.2g}")

    for score, rows in results.items():
        say(f"\n{score}")
        for row, entry in rows.items():
            text = with_error(entry["mean"], entry["error"], "8.4g")
            text = f"{row:16} {text} ({len(entry['values'])})"
            if "difference" in entry:
                more, error = entry["difference"], entry["difference_error"]
                text += "   " + with_error(more, error, "+8.3g")
                text += " *" * (error is not None and abs(more) > 2 * error)
            say(text)
    charts = {}
    for name, rows in found.items():
        *task, score = name.split()
        title = " ".join([*task, SCORES[score]])
        charts[title] = {row: list(seeds.values()) for row, seeds in rows.items()}
    with train.writing(folder):
        (folder / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
        data.save_dots(folder / "compare.png", charts)
    say(f"done: {folder}/compare.json, {folder}/compare.png")


# ==================================================================================================
# What keeps it running: checkpoints in and out, data, benchmark, command line.
# ==================================================================================================

# ---- Checkpoints in and out ----------------------------------------------------------------------

KIND = "a checkpoint of train.py, finetune.py or a ViT-MAE of another project"
# A checkpoint continues only under the same values of these.
MUST_FIT = (
    *("task", "checkpoint", "data", "model", "image_size", "patch_size", "pool", "fraction"),
    *("shots", "limit_images", "val_images", "layer_decay", "seed", "classes", "width"),
)


def open_checkpoint(args):
    """Read --checkpoint -> ({name: tensor}, None for `none`; args with the sizes that it settles).

    Model, image and patch size are the checkpoint's where no flag gives them, and a --model or
    --patch-size that contradicts it ends the run. With --eval, task, token, seed and classes are
    the checkpoint's, too. seen_seeds: [seed of its training], if that was on the same --data.
    """
    path, saved, weights = args.checkpoint, dict(model="base", image_size=224, patch_size=16), None
    if path != "none":
        with train.refusals():
            content = model.load_file(path, KIND)
            names = (by_task(task)[0] for task in TASKS)
            part = next((n for n in names if train.made_by("finetune.py", content, n)), "mae")
            if args.eval != (part != "mae"):
                what = "" if args.eval else ": --eval measures it, --resume continues it"
                fail(f"{path} is {'not ' * args.eval}a checkpoint of finetune.py{what}")
            if part != "mae" or train.made_by("train.py", content, "mae"):
                weights, saved = content[part], content["arguments"]
            else:
                weights, left_out = model.named_as_ours(content, path, KIND)
                saved = model.published_sizes(weights, path, args.model)
                if left_out:
                    say(f"{path}: left out {', '.join(left_out)}")
    for what in ("model", "patch_size"):
        given, flag = getattr(args, what), what.replace("_", "-")
        if weights is not None and given not in (None, saved[what]):
            fail(f"--{flag} {given}, but {path} has {saved[what]}; leave --{flag} off")
    sizes = ("model", "image_size", "patch_size")
    settled = {what: getattr(args, what) or saved[what] for what in sizes}
    settled["seen_seeds"] = [saved["seed"]] if saved.get("data") == args.data else []
    if args.eval:
        settled |= {what: saved[what] for what in ("task", "pool", "seed", "classes")}
        settled["width"] = saved.get("width")
    return weights, argparse.Namespace(**vars(args) | settled)


def export(args):
    """--export FILE: write --checkpoint's weights by --format's names; says what it left out."""
    if not is_main():
        return
    with train.refusals():
        checkpoint = model.load_file(args.checkpoint, "a checkpoint of train.py")
        if not train.made_by("train.py", checkpoint, "mae"):
            fail(
                f"{args.checkpoint} is not a checkpoint of train.py, whose weights --export writes"
            )
        count, rest = model.write_weights(args.export, checkpoint["mae"], args.format)
    say(f"wrote {args.export}: {count} tensors; left out: {rest}, of decoder or teacher")


# ---- Data ----------------------------------------------------------------------------------------


def shard(dataset, args):
    """Loader of this process's part of a data set: images rank, rank + world, ... in order.

    No padding, so that over all processes each image is counted once.
    """
    rank = train.rank()
    keys = [(0, i) for i in range(rank, len(dataset), train.world_size())]
    return data.build_loader(dataset, keys, batch_size=args.batch_size, workers=args.workers)


def readable(index, bad):
    """Which of a batch's images, (B,) places in the data set, are not among its unreadable ones."""
    return ~torch.isin(index, torch.tensor([i for i, _ in bad], dtype=torch.long))


def check_held_out(source, args):
    """Were the images that are held out of a folder here held out of pre-training, too?"""
    others = [seed for seed in args.seen_seeds if seed != args.seed]
    if others and getattr(source, "held_out", False):
        fail(
            f"training with --seed {others[0]} held out other images of {args.data}: give --seed "
            f"{others[0]}, or put validation images into {args.data}/val"
        )


def build_data(args):
    """-> (training, validation `LabelledSet`, args with `classes`, the names of the classes).

    `DenseSet` for detection and segmentation. With --eval the classes must be the checkpoint's. One
    line and status 2 if that cannot be.
    """
    if args.task in DENSE:
        return build_scenes(args)
    train_source, val_source = train.open_data(args, args.image_size)
    check_held_out(val_source, args)
    if len(train_source.classes) < 2:
        fail(f"--data {args.data} has no classes: keep images in class folders")
    with train.refusals():
        data.check_classes(train_source.classes, val_source.classes, ("train", "val"))
        if args.eval:
            data.check_classes(args.classes, val_source.classes, (args.checkpoint, args.data))
        chosen = data.choose_images(
            train_source.targets,
            seed=args.seed,
            fraction=args.fraction,
            shots=args.shots,
            limit=args.limit_images,
        )
    common = dict(image_size=args.image_size, seed=args.seed)
    train_set = data.LabelledSet(
        train_source,
        chosen.tolist(),
        augment=args.task not in ONCE,
        crop_min=args.crop_min,
        magnitude=args.rand_augment,
        **common,
    )
    if args.task not in ONCE and not args.eval:
        train.check_one_step(train_set, args)
    limit = args.val_images or len(val_source)
    kept = data.choose_images(val_source.targets, seed=args.seed, limit=limit)
    val_set = data.LabelledSet(val_source, kept.tolist(), augment=False, **common)
    args = argparse.Namespace(**vars(args) | {"classes": list(val_source.classes)})
    return train_set, val_set, args


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


# ---- Benchmark -----------------------------------------------------------------------------------


def random_batch(args):
    """Random images (B, 3, S, S) uint8 and targets, as a loader gives them for --task."""
    generator = torch.Generator().manual_seed(args.seed)
    B, S, classes = args.batch_size, args.image_size, len(args.classes)
    images = torch.randint(0, 256, (B, 3, S, S), generator=generator, dtype=torch.uint8)
    shape = {"detect": (B, 7), "segment": (B, S, S)}.get(args.task, (B,))  # COCO: 7 objects
    labels = torch.randint(0, classes, shape, generator=generator)
    if args.task != "detect":
        return images, labels
    corners, rows = torch.randint(0, S // 2, (B, 7, 2, 1, 1), generator=generator), torch.arange(S)
    x, y = rows - corners[:, :, 0], rows[:, None] - corners[:, :, 1]
    masks = (x >= 0) & (x < S // 4) & (y >= 0) & (y < S // 4)  # squares, (B, 7, S, S)
    return images, [data.objects_in(m, n + 1) for m, n in zip(masks, labels, strict=True)]


def benchmark(args, device):
    """Time the training step on random images, of as many classes as the paper's data sets have.

    Prints one JSON line.
    """
    weights, args = open_checkpoint(args)
    classes = range({"detect": 80, "segment": 150}.get(args.task, 1000))
    args = argparse.Namespace(**vars(args) | {"classes": list(classes)})
    run, batch = build_run(args, weights, device), random_batch(args)
    run.network.train()
    train.set_rate(run.opt, args.lr)

    def step(number, place):
        step_gradients(run, [batch] * args.accum, {"step": number}, args)
        update(run, apply=True)

    seconds = train.time_steps(step, args.benchmark, 1, device)
    row = train.benchmark_row(run, seconds, args, task=args.task)
    parameters = list(run.network.parameters())
    row["parameters"] = sum(p.numel() for p in parameters)
    row["parameters_trained"] = sum(p.numel() for p in parameters if p.requires_grad)
    say(json.dumps(row))


# ---- Command line --------------------------------------------------------------------------------

# What --task means for the flags that are not given.
# PAPER: supplement, Table 2, "for linear probing and fine-tuning". DIFFERS: a probe gets none of
# the table's regularisation (MAE's does not either): one linear layer would underfit.
FINETUNE = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0, rand_augment=9.0, weight_decay=0.05)
PLAIN = dict.fromkeys(FINETUNE, 0.0)
# PAPER SILENT: layer-wise decay and stochastic depth; ours are MAE's for ViT-B.
FINETUNE |= dict(layer_decay=0.75, drop_path=0.1)
PLAIN |= dict(layer_decay=1.0, drop_path=0.0)
TASKS = ("linear", "finetune", "detect", "segment", "knn", "logistic", "reconstruct", "cka")
TASKS = dict.fromkeys(TASKS, PLAIN) | {"finetune": FINETUNE}
# PAPER SILENT: settings of detection and segmentation beyond rates, decay and epochs, which sec. 4
# and Table 2 give for "all fine-tuned models". Ours: ViTDet's and MMSegmentation's layer-wise decay
# for ViT-B, both their stochastic depth, and the widths of both their heads.
SCENES = PLAIN | dict(weight_decay=0.05, drop_path=0.1)
TASKS["detect"] = SCENES | dict(layer_decay=0.7, width=256)
TASKS["segment"] = SCENES | dict(layer_decay=0.65, width=512)
DENSE = ("detect", "segment")
TRAINED = ("linear", "finetune", *DENSE)
ONCE = ("knn", "logistic")  # see each image once, without augmentation
SEVERAL = ("reconstruct", "cka")  # compare any number of checkpoints
CKA_BATCH = 256  # its estimate is the noisier, the fewer images are compared with each other
# What --compare looks for in logs, and how its picture calls it.
SCORES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "top1": "top-1, %",
    "ap": "box AP, %",
    "miou": "mIoU, %",
}
# Logistic regression: penalties on its weights, strongest first; where its descent ends, in nats
# per unit of `descend`; after how many iterations at the latest; parts that are held out in turn.
PENALTIES = [float(f"{m}e-{n}") for n in range(1, 7) for m in (10, 3)] + [1e-6]  # 1, .3, .1 ...
SLOPE, ITERATIONS, FOLDS = 1e-6, 5000, 5
# `--demo`: measures what `train.py --demo` wrote against random weights, on two CPU cores.
DEMO = dict(
    checkpoints=["runs/demo/checkpoint.pt"],
    data="shapes-large",
    limit_images=5000,
    val_images=1000,
    batch_size=50,
    workers=1,
    out="runs/demo/finetune",
    task="logistic",
    pool="mean",
    whiten=True,
)


def build_parser():
    """Every flag of finetune.py; `--help` is the manual. Table 2's values are the defaults."""
    COUNT, NUMBER, POSITIVE = train.COUNT, train.NUMBER, train.POSITIVE
    parser = argparse.ArgumentParser(
        description="Classify, detect or segment with a pre-trained encoder, measure "
        "reconstructions, export weights.",
        usage="finetune.py --checkpoint FILE|none --task linear|finetune|detect|segment|knn|"
        "logistic|reconstruct|cka [--data PATH|shapes|cifar10] [flags; see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text = "of train.py, or another project's ViT-MAE; none: random weights; with --eval: of "
    text += "finetune.py; reconstruct and cka take several"
    parser.add_argument("--demo", action="store_true", help="after train.py --demo: against random")
    parser.add_argument("--eval", action="store_true", help="only measure --checkpoint on --data")
    parser.add_argument("--checkpoint", dest="checkpoints", metavar="FILE", nargs="+", help=text)
    train.add_flags(
        parser,
        "what to do",
        ("--task", TASKS, "finetune", f"what is done (cka: --batch-size {CKA_BATCH} by default)"),
        ("--export", str, None, "file to write the checkpoint's weights to; no task"),
        ("--compare", str, None, "folder of runs ROW/SEED/: their means over seeds; no task"),
        ("--format", ("mae", "timm", "hf"), "mae", "whose names --export takes"),
        (
            "--pool",
            ("cls", "mean", "auto"),
            "cls",
            "what a classifier or CKA sees: CLS, the mean patch token, or (logistic) the one that "
            "does better in five-fold cross-validation",
        ),
        ("--model", model.MAE_SIZES, None, "None = the checkpoint's; base for none"),
        ("--image-size", train.at_least(16), None, "side in pixels; None = the checkpoint's"),
        ("--patch-size", train.at_least(2), None, "None = the checkpoint's; 16 for none"),
        ("--width", train.at_least(16), None, "of the heads; None = 256 detect, 512 segment"),
        ("--slide", bool, True, "measure in windows, at training's scale, or all at once; segment"),
        ("--k", COUNT, 20, "neighbours that vote; knn"),
        ("--temperature", POSITIVE, 0.07, "of the votes; knn"),
        ("--whiten", bool, False, "first give features the same variance in every direction; knn"),
        (
            "--inception-weights",
            str,
            "torchvision",
            "FILE, torchvision or none; for IS and FID of "
            "reconstruct; published FIDs: pt_inception-2015-12-05-6726825d.pth",
        ),
    )
    train.add_flags(
        parser,
        "data (detect: COCO's layout, segment: ADE20K's, or shapes)",
        *train.DATA_FLAGS,
        ("--val-images", COUNT, None, "measure on so many; None = all"),
        ("--fraction", POSITIVE, None, "of each class's training labels, seeded"),
        ("--shots", COUNT, None, "training images per class, a seeded choice"),
        ("--crop-min", POSITIVE, 0.08, "smallest crop, part of the area; linear, finetune"),
        (
            "--scales",
            (NUMBER, NUMBER),
            None,
            "of random enlargement; 1 = the image fits (detect) or fills (segment) --image-size; "
            "None = .1 to 2 detect, .5 to 2 segment",
        ),
    )
    train.add_flags(
        parser,
        "regularisation (None = by --task: paper's for finetune, or off)",
        ("--label-smoothing", NUMBER, None, "paper: 0.1"),
        ("--mixup", NUMBER, None, "alpha of its Beta; 0 = off; paper: 0.8"),
        ("--cutmix", NUMBER, None, "alpha of its Beta; 0 = off; paper: 1.0"),
        ("--rand-augment", NUMBER, None, "magnitude, 0 to 10; 0 = off; paper: 9"),
        ("--drop-path", NUMBER, None, "stochastic depth of the last block; 0.1"),
    )
    # PAPER SILENT: it contradicts itself on warm-up (5 or 10 epochs) and Adam's second beta (.95 or
    # .999), and does not say whether the learning rate scales with the batch. Ours: its Table 2
    # where the two disagree (.999 is also MAE's), and MAE's linear scaling, 1e-3 at 8 x 32.
    train.add_flags(
        parser,
        "optimisation",
        ("--epochs", COUNT, 130, "paper: 130"),
        ("--warmup-epochs", NUMBER, None, "None = 10/130 of the epochs, as the paper"),
        *train.BATCH_FLAGS,
        ("--blr", POSITIVE, 1e-3, "learning rate for 256 images per step; scales with them"),
        ("--betas", (NUMBER, NUMBER), [0.9, 0.999], "of AdamW"),
        ("--weight-decay", NUMBER, None, "of matrices; None = by --task; paper: 0.05"),
        (
            "--layer-decay",
            POSITIVE,
            None,
            "rate of a layer relative to the one above; None = 0.75 for finetune, 0.7 detect, 0.65 "
            "segment, 1 for other tasks and random weights",
        ),
    )
    train.add_flags(
        parser,
        "the run",
        ("--out", str, None, "folder for everything written; None = TASK/ beside --checkpoint"),
        *train.RUN_FLAGS,
    )
    return parser


def parse_args(argv=None):
    """Command line -> namespace, complete but for what a checkpoint and the data settle.

    Ends with status 2 on a conflict.
    """
    parser = build_parser()
    asked = parser.parse_known_args(argv)[0]
    if asked.demo:
        parser.set_defaults(**DEMO)  # flags that are given still win
    elif asked.task == "cka":
        parser.set_defaults(batch_size=CKA_BATCH)
    args = parser.parse_args(argv)
    if args.compare:
        if args.checkpoints or args.export or args.demo or args.benchmark:
            fail("--compare reads logs alone; leave off --checkpoint, --export and --demo")
        return args
    if args.benchmark and args.checkpoints is None:
        args.checkpoints = ["none"]
    if args.checkpoints is None:
        fail("--checkpoint is missing: give a file, or none for random weights; or try --demo")
    args.checkpoints.sort(key="none".__eq__)  # the files first, in their order
    args.checkpoint = args.checkpoints[0]
    if len(args.checkpoints) > 1 and (args.task not in SEVERAL or args.export):
        fail(f"only --task {' and '.join(SEVERAL)} take several checkpoints; give one")
    if "none" in args.checkpoints and (args.eval or args.export or args.task == "reconstruct"):
        fail("random weights are nothing to measure or export; give a file with --checkpoint")
    if args.eval and args.task in SEVERAL:
        fail(f"--eval measures a classifier; --task {args.task} measures by itself")
    if args.task == "cka" and args.batch_size < 4:
        fail(f"--batch-size {args.batch_size} is too small for CKA; give 4 or more")
    if args.pool == "auto" and (args.task != "logistic" or args.demo):
        fail("--pool auto is for --task logistic alone; give cls or mean")
    if args.benchmark and args.task not in TRAINED:
        fail(f"--benchmark times training steps, and --task {args.task} has none")
    if args.task in DENSE:
        check_dense(args)
    for name, value in TASKS[args.task].items():
        if getattr(args, name) is None:
            random = name == "layer_decay" and args.checkpoint == "none"
            setattr(args, name, 1.0 if random else value)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs * 10 / 130
    args.lr = args.lr or args.blr * train.images_per_step(args) / 256
    beside = "runs/none" if args.checkpoint == "none" else Path(args.checkpoint).parent
    args.out = args.out or str(beside if args.eval else Path(beside) / args.task)
    if sum(v is not None for v in (args.fraction, args.shots, args.limit_images)) > 1:
        fail("--fraction, --shots and --limit-images exclude each other; give one")
    for name in ("fraction", "crop_min", "layer_decay", "label_smoothing", "drop_path"):
        value, below = getattr(args, name), name in ("label_smoothing", "drop_path")
        if value is not None and (value > 1 or (below and value == 1)):
            most = "below 1" if below else "1 or less"
            fail(f"--{name.replace('_', '-')} {value} must be {most}")
    if args.task == "linear" and train.images_per_step(args) // args.accum < 2:
        fail("--batch-size 1 leaves the probe's batch normalisation no variance; give 2 or more")
    if args.rand_augment > 10:
        fail(f"--rand-augment {args.rand_augment} is beyond 10, the strongest")
    if max(args.betas) >= 1:
        fail("--betas must be below 1")
    return args


def check_dense(args):
    """End with status 2 for flags that detection and segmentation cannot follow."""
    names = ("fraction", "shots", "mixup", "cutmix", "label_smoothing", "rand_augment")
    for name in (name for name in names if getattr(args, name)):
        fail(f"--{name.replace('_', '-')} is for classification; leave it off for {args.task}")
    if args.width and args.width % 16:
        fail(f"--width {args.width} must be a multiple of 16")
    if args.scales and not 0 < args.scales[0] <= args.scales[1]:
        fail(f"--scales {args.scales} must be above 0, the smaller first")


# ---- Main ----------------------------------------------------------------------------------------


def run_task(args, device):
    """Any --task of one checkpoint, or --eval -> (signal that ended it or 0, score in per cent).

    The score is top-1, detection's box AP or segmentation's mIoU.
    """
    weights, args = open_checkpoint(args)
    train_set, val_set, args = build_data(args)
    if args.eval:
        run = build_run(args, weights, device)
        row = run.evaluate(run, shard(val_set, args), [], args)
        train.write_row(row)
    elif args.task in ONCE:
        run, out = build_run(args, weights, device), Path(args.out)
        if is_main():
            train.start_output(out, 0)  # a new log
        row = measure_features(run, train_set, val_set, args)
        train.write_row({"epoch": 0, "training_images": len(train_set), **row}, out)
    else:
        return train_task(args, weights, train_set, val_set, device)
    return 0, row[run.score]


def demo(args, device):
    """k-NN and linear top-1 of the demo's encoder and of random weights; prints a table."""
    if not Path(args.checkpoint).exists():
        fail(f"{args.checkpoint} does not exist: run `python train.py --demo` first")
    _, settled = open_checkpoint(args)
    sizes, table = {k: getattr(settled, k) for k in ("model", "image_size", "patch_size")}, []
    for checkpoint, name in ((args.checkpoint, "pre-trained"), ("none", "random weights")):
        results = []
        for task in ("knn", "logistic"):
            out = f"{args.out}/{task}_{name.split()[0].replace('-', '')}"
            own = sizes | {"checkpoint": checkpoint, "task": task, "out": out}
            _, top1 = run_task(argparse.Namespace(**vars(args) | own), device)
            results.append(top1)
        table.append((name, *results))
    chance = 100 / len(train.open_data(args, settled.image_size)[0].classes)
    say(f"top-1, %         k-NN  linear    (chance: {chance:.1f})")
    for name, knn, linear in table:
        say(f"{name:15}  {knn:5.1f}  {linear:6.1f}")
    (_, _, learnt), (_, _, random) = table
    say(
        f"A linear classifier on the encoder's features names the object in {learnt:.0f} % of the "
        f"held-out pictures; with random weights in the encoder, in {random:.0f} %. The difference "
        "is what it has learnt without labels.\n"
        f"What it can paint: {Path(args.checkpoint).parent}/pictures/. Next: your own, python "
        "finetune.py --checkpoint runs/LOSS/checkpoint.pt --data PATH"
    )


def main(argv=None):
    args = parse_args(argv)
    if args.compare:
        return compare(Path(args.compare))
    if args.export:
        return export(args)
    device = train.start_processes()
    stopped = 0
    if args.benchmark:
        benchmark(args, device)
    elif args.demo:
        demo(args, device)
    elif args.task == "reconstruct":
        measure_reconstructions(args, device)
    elif args.task == "cka":
        measure_cka(args, device)
    else:
        stopped, _ = run_task(args, device)
    train.stop_processes()
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    train.run_script(main)
