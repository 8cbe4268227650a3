"""Measure what pre-training is worth: linear probe, fine-tuning, k-NN.

    python finetune.py --demo                                   # 2 minutes, after train.py --demo
    python finetune.py --checkpoint runs/mse/checkpoint.pt --task linear
    torchrun --nproc_per_node=8 finetune.py --checkpoint runs/mse/checkpoint.pt --task finetune
    python finetune.py --eval --checkpoint runs/mse/finetune/best.pt

Implements sec. 4 of the paper ("Fine-tuning") and the supplement's Table 2 for classification.
Reads down: weights, networks and optimiser, the training step, accuracy, k-NN, benchmark, data,
command line, and `main`. The training loop (`fit`), processes, precision and checkpoints are
train.py's, the networks are in model.py, the images in data.py.

--checkpoint takes those of train.py, published MAE files ({"model": weights}), or `none`: random
weights. Writes to OUT: checkpoint.pt, best.pt (highest top-1) and log.jsonl, where top1 and top5
are per cent of the validation images. Run the same command again after any interruption and it
continues where the checkpoint was saved.
"""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torchvision.transforms import v2

from data import (
    LabelledSet,
    check_classes,
    choose_images,
    sample_seed,
    to_float,
)
from model import MAE_SIZES, build_classifier, encoder_weights
from train import (
    across_processes,
    at_least,
    autocast,
    choose_precision,
    fail,
    fit,
    images_per_step,
    is_main,
    learning_rate,
    load_whole,
    new_progress,
    note_bad_images,
    open_data,
    parameter_groups,
    read_any_weights,
    read_checkpoint,
    save_checkpoint,
    say,
    shard,
    start_output,
    start_processes,
    unwrap,
    world_size,
    wrap,
)

# What --task means for the flags that are not given.
# PAPER: supplement, Table 2, "for linear probing and fine-tuning". DIFFERS: a probe gets none of
# the table's regularisation (MAE's does not either): one linear layer would underfit.
# PAPER SILENT: layer-wise decay and stochastic depth; ours are MAE's for ViT-B.
OFF = dict(
    label_smoothing=0.0, mixup=0.0, cutmix=0.0, rand_augment=0.0,
    weight_decay=0.0, layer_decay=1.0, drop_path=0.0,
)  # fmt: skip
TASKS = {
    "linear": OFF,
    "finetune": dict(
        label_smoothing=0.1, mixup=0.8, cutmix=1.0, rand_augment=9.0,
        weight_decay=0.05, layer_decay=0.75, drop_path=0.1,
    ),
    "knn": OFF,
}  # fmt: skip
# `--demo`: measures what `train.py --demo` wrote against random weights, on two CPU cores.
DEMO = dict(
    checkpoint="runs/demo/checkpoint.pt",
    data="shapes",
    pool="mean",
    limit_images=1600,
    val_images=1000,
    batch_size=50,
    epochs=4,
    lr=1e-2,
    crop_min=0.5,
    workers=1,
    out="runs/demo/finetune",
    resume=["off"],
    task="linear",
)
# A checkpoint continues only under the same values of these.
ARGUMENTS_THAT_MUST_FIT = (
    "task",
    "checkpoint",
    "data",
    "model",
    "image_size",
    "patch_size",
    "pool",
    "fraction",
    "shots",
    "limit_images",
    "val_images",
    "layer_decay",
    "seed",
    "classes",
)


# ---- Weights -------------------------------------------------------------------------------------


def read_weights(args):
    """Read --checkpoint; take from it the sizes that no flag gives -> {name: tensor}, None = none.

    Sets args.model, image_size and patch_size; with --eval also what else the classifier depends
    on. A file that is none of ours nor a published MAE, or flags that contradict it, end the run.
    """
    saved, weights = dict(model="base", image_size=224, patch_size=16), None
    if args.checkpoint != "none":
        kind = "a checkpoint of train.py, finetune.py or a ViT-MAE of another project"
        checkpoint = {}
        if not args.checkpoint.endswith(".safetensors"):
            with torch.serialization.safe_globals(
                [argparse.Namespace]
            ):  # see train.read_any_weights
                checkpoint = read_checkpoint(args.checkpoint, (), kind)
        if args.eval != ("classifier" in checkpoint):
            what = "" if args.eval else ": --eval measures it, --resume continues it"
            fail(f"{args.checkpoint} is {'not ' * args.eval}a checkpoint of finetune.py{what}")
        own = next((k for k in ("classifier", "mae") if k in checkpoint), None)
        if own and not (isinstance(checkpoint[own], dict) and "arguments" in checkpoint):
            fail(f"{args.checkpoint} is not {kind} (it lacks arguments)")
        if own:
            saved, weights = checkpoint["arguments"], checkpoint[own]
        else:
            weights, left_out = read_any_weights(args.checkpoint, kind)
            saved = published_sizes(weights, args)
            if left_out:
                say(f"{args.checkpoint}: left out {', '.join(left_out)}")
    for what in ("model", "patch_size"):
        given = getattr(args, what)
        if weights is not None and given not in (None, saved[what]):
            flag = what.replace("_", "-")
            fail(f"--{flag} {given}, but {args.checkpoint} has {saved[what]}; leave --{flag} off")
    for what in ("model", "image_size", "patch_size"):
        setattr(args, what, getattr(args, what) or saved[what])
    if args.eval:
        for what in ("task", "pool", "seed", "classes"):
            setattr(args, what, saved[what])
    return weights


def published_sizes(weights, args):
    """Model, image and patch size of a published MAE, from the shapes of its weights -> dict."""
    dimensions = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    missing = [k for k, n in dimensions.items() if getattr(weights.get(k), "ndim", None) != n]
    if missing:
        kept = ", ".join(map(str, weights))
        fail(
            f"{args.checkpoint} is no MAE encoder; missing: {', '.join(missing)}; there is: {kept}"
        )
    width, patch_size = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    sizes = {(v["width"], v["depth"]): k for k, v in MAE_SIZES.items()}
    model = sizes.get((width, depth), args.model)
    if model is None:
        fail(f"{args.checkpoint} is {width} wide with {depth} blocks, which is none of "
             f"{', '.join(MAE_SIZES)}; --model names the one it should be")  # fmt: skip
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    return dict(model=model, image_size=side * patch_size, patch_size=patch_size)


def load_weights(network, weights, args):
    """Give the classifier what `read_weights` read: its encoder, or with --eval all of it."""
    prefix, side = "encoder.", network.encoder.side
    encoder = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    try:
        encoder = encoder_weights(encoder if args.eval else weights, side)
    except (ValueError, RuntimeError, AttributeError) as error:
        fail(f"{args.checkpoint} has positions that cannot be resized: {error}")
    if not args.eval:
        return load_whole(network.encoder, encoder, args.checkpoint)
    rest = {k: v for k, v in weights.items() if not k.startswith(prefix)}
    load_whole(network, rest | {prefix + k: v for k, v in encoder.items()}, args.checkpoint)


# ---- Networks and optimiser ----------------------------------------------------------------------


def build_run(args, weights, classes, device):
    """What trains -> namespace of classifier, opt, scaler, mix, device and dtype (see train.py).

    weights: from `read_weights`. mix: function of a batch (images, labels) that mixes samples, or
    None.
    """
    dtype = choose_precision(args.amp, device)
    torch.manual_seed(args.seed)  # the same initial weights on every process
    try:
        network = build_classifier(
            args.model,
            classes,
            image_size=args.image_size,
            patch_size=args.patch_size,
            pool=args.pool,
            frozen=args.task != "finetune",
            drop=args.drop_path,
        )
    except ValueError as error:  # sizes that do not fit each other
        fail(str(error))
    if weights is not None:
        load_weights(network, weights, args)
    network.to(device)
    groups = layer_groups(network, args.weight_decay, args.layer_decay)
    return SimpleNamespace(
        classifier=wrap(network, device),
        opt=torch.optim.AdamW(groups, betas=tuple(args.betas), fused=True),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        mix=build_mix(args, classes),
        device=device,
        dtype=dtype,
    )


def layer_groups(network, weight_decay, layer_decay):
    """AdamW groups with an `lr_scale`: 1 for the head, times `layer_decay` for each layer below."""
    layers, groups = network.layers(), []
    if layer_decay == 1:
        layers = [sum(layers, [])]  # fewer groups are faster
    for below, parameters in enumerate(reversed(layers)):
        scale = {"lr_scale": layer_decay**below}
        for group in parameter_groups(torch.nn.ParameterList(parameters), weight_decay):
            groups += [group | scale] if group["params"] else []
    return groups


def build_mix(args, classes):
    """Mixup or CutMix, with equal chances where both are on; None if neither is.

    PAPER: supplement, Table 2: mixup .8, cutmix 1. PAPER SILENT: how the two share batches; ours is
    MAE's way, every batch gets one of them, with one draw a batch and process.
    """
    mixes = []
    if args.mixup:
        mixes.append(v2.MixUp(alpha=args.mixup, num_classes=classes))
    if args.cutmix:
        mixes.append(v2.CutMix(alpha=args.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes).forward if mixes else None  # not a module: nothing to save


def set_learning_rates(run, progress, steps_per_epoch, args):
    """Put the optimiser where the schedule has come to -> the head's learning rate."""
    position = (progress["epoch"] - 1) * steps_per_epoch + progress["epoch_step"]
    schedule = (position, args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch)
    lr = learning_rate(*schedule, args.lr)
    for group in run.opt.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


# ---- The training step ---------------------------------------------------------------------------


def classification_loss(logits, targets, label_smoothing):
    """Mean cross-entropy in float32. targets: labels (B,) or class probabilities (B, classes)."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def accumulate(run, batches, progress, args):
    """Gradients of the batches of one step, averaged -> {"loss": their mean}."""
    total, share = 0, 1 / len(batches)
    rank = dist.get_rank() if dist.is_initialized() else 0
    for number, (images, labels, *_) in enumerate(batches):
        # Mixing and stochastic depth depend on where the run is, not on what was drawn before.
        torch.manual_seed(sample_seed(args.seed, progress["step"], number, rank))
        images = to_float(images.to(run.device, non_blocking=True))
        targets = labels.to(run.device, non_blocking=True)
        if run.mix is not None:
            images, targets = run.mix(images, targets)
        last = number == len(batches) - 1  # processes exchange gradients with the last one
        with nullcontext() if last or not dist.is_initialized() else run.classifier.no_sync():
            with autocast(run):
                logits = run.classifier(images)
            loss = classification_loss(logits, targets, args.label_smoothing)
            run.scaler.scale(loss * share).backward()
        total += loss.detach() * share
    return {"loss": total}


def update(run, apply):
    """Step the optimiser if `apply`, then clear the gradients. The scaler skips fp16 overflows."""
    if apply:
        run.scaler.step(run.opt)
        run.scaler.update()
    run.opt.zero_grad(set_to_none=True)


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
def evaluate(run, loader, known):
    """Accuracy and loss over the whole validation set -> row, see `as_row`.

    loader: this process's `shard`. known: list of unreadable images' indices, added to here; they
    are left out.
    """
    network, found = unwrap(run.classifier).eval(), {}
    sums = dict.fromkeys(("top1", "top5", "images", "val_loss"), 0)
    for images, labels, _, bad in loader:
        found |= dict(bad)
        labels = labels.to(run.device, non_blocking=True)
        with autocast(run):
            logits = network(to_float(images.to(run.device, non_blocking=True)))
        loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
        for name, value in {**count_correct(logits, labels), "val_loss": loss}.items():
            sums[name] += value
    network.train()
    note_unread(found, known, loader.dataset)
    return as_row(across_processes(sums, run.device), network.head.out_features)


def note_unread(found, known, dataset):
    """Name the unreadable images of a measurement that are not yet in `known`, and add them."""
    found = {index: reason for index, reason in found.items() if index not in known}
    note_bad_images(found, known, dataset, fate="left out")


# ---- k-NN ----------------------------------------------------------------------------------------


def gathered(tensor, dim=0):
    """Every process's tensor, concatenated along `dim`, on every process; lengths may differ."""
    if not dist.is_initialized():
        return tensor
    parts = [None] * world_size()
    dist.all_gather_object(parts, tensor.cpu())
    return torch.cat(parts, dim).to(tensor.device)


@torch.no_grad()
def extract(run, dataset, args):
    """Features of this process's part of a data set -> (unit vectors (n, C), labels (n,))."""
    network, found = unwrap(run.classifier).eval(), {}
    width = network.head.in_features
    features, targets = [torch.zeros(0, width, device=run.device)], [torch.zeros(0).long()]
    for images, labels, _, bad in shard(dataset, args):
        found |= dict(bad)
        with autocast(run):
            x = network.features(to_float(images.to(run.device, non_blocking=True)))
        features.append(F.normalize(x.float(), dim=1)[labels >= 0])
        targets.append(labels[labels >= 0])
    note_unread(found, [], dataset)
    return torch.cat(features), torch.cat(targets).to(run.device)


def knn_scores(queries, bank, bank_labels, *, classes, k, temperature):
    """Votes of the k training images most alike, each weighing exp(cosine / temperature).

    The weights are relative to the most alike one's; classes without a vote get -inf.

    queries: (Q, C), the same on every process. bank: (n, C) and bank_labels (n,), this process's
    part of the training set. All of unit length. Returns (Q, classes), over all processes' parts.
    Wu et al. 2018.
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


def measure_knn(run, train_set, val_set, args):
    """k-NN accuracy over the whole validation set -> row, see `as_row`."""
    bank, bank_labels = extract(run, train_set, args)
    queries, labels = (gathered(part) for part in extract(run, val_set, args))
    classes = len(args.classes)
    scores = knn_scores(
        queries, bank, bank_labels, classes=classes, k=args.k, temperature=args.temperature
    )
    counts = {name: int(count) for name, count in count_correct(scores, labels).items()}
    return as_row(counts, classes)  # every process has all queries: nothing to add up


# ---- Benchmark -----------------------------------------------------------------------------------


def benchmark(args, device, world):
    """Time the training step on random images of 1000 classes; print one JSON line."""
    run = build_run(args, read_weights(args), 1000, device)
    run.classifier.train()
    generator = torch.Generator().manual_seed(args.seed)
    B, size = args.batch_size, args.image_size
    images = torch.randint(0, 256, (B, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 1000, (B,), generator=generator)
    progress, seconds = new_progress(), []
    set_learning_rates(run, progress, 1, args)
    for number in range(2 + args.benchmark):  # two steps to warm up
        began = time.perf_counter()
        accumulate(run, [(images, labels)] * args.accum, progress, args)
        update(run, apply=True)
        progress["step"] += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = list(run.classifier.parameters())
    row = {
        "task": args.task,
        "model": args.model,
        "image_size": size,
        "batch_size": B * args.accum * world,
        "device": device.type,
        "amp": str(run.dtype or torch.float32).removeprefix("torch."),
        "seconds_per_step": round(median, 4),
        "images_per_second": round(B * args.accum * world / median, 2),
        "peak_memory_mib": round(peak / 2**20),
        "parameters": sum(p.numel() for p in parameters),
        "parameters_trained": sum(p.numel() for p in parameters if p.requires_grad),
    }
    say(json.dumps(row))


# ---- Data and log --------------------------------------------------------------------------------


def build_data(args):
    """-> (training, validation) `LabelledSet`; one line and status 2 if that cannot be.

    Sets args.classes, the names of the classes; with --eval they must be the checkpoint's.
    """
    train_source, val_source = open_data(args)
    try:
        if len(train_source.classes) < 2:
            raise ValueError(f"--data {args.data} has no classes: keep images in class folders")
        check_classes(train_source.classes, val_source.classes, ("train", "val"))
        if args.eval:
            check_classes(args.classes, val_source.classes, (args.checkpoint, args.data))
        args.classes = list(val_source.classes)
        chosen = choose_images(
            train_source.targets,
            seed=args.seed,
            fraction=args.fraction,
            shots=args.shots,
            limit=args.limit_images,
        )
    except ValueError as error:
        fail(str(error))
    common = dict(image_size=args.image_size, seed=args.seed)
    train_set = LabelledSet(
        train_source,
        chosen.tolist(),
        augment=args.task != "knn",
        crop_min=args.crop_min,
        magnitude=args.rand_augment,
        **common,
    )
    if len(train_set) < images_per_step(args) and args.task != "knn" and not args.eval:
        fail(f"{len(train_set)} training images are fewer than the {images_per_step(args)} of one "
             "step; lower --batch-size")  # fmt: skip
    kept = choose_images(
        val_source.targets, seed=args.seed, limit=args.val_images or len(val_source)
    )
    return train_set, LabelledSet(val_source, kept.tolist(), augment=False, **common)


def report(row, out=None):
    """Print a row of results, after writing it to OUT/log.jsonl if `out` is given."""
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    if out is not None and is_main():
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
    say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def finish_epoch(run, progress, lr, val, args):
    """Measure, log, keep the best, and move `progress` on. val: (loader, unreadable images)."""
    counted, out = max(1, progress["counted"]), Path(args.out)
    row = {"epoch": progress["epoch"], "step": progress["step"], "lr": lr}
    row |= {name: total / counted for name, total in progress["sums"].items()}
    last = row["epoch"] == args.epochs
    measured = evaluate(run, *val) if last or row["epoch"] % args.eval_every == 0 else {}
    row |= measured
    row["images_per_second"] = progress["epoch_step"] * images_per_step(args) / progress["seconds"]
    row["seconds"] = progress["seconds"]
    row["bad_images"] = len(progress["bad_images"]) + len(val[1])
    report(row, out)
    top1, best = measured.get("top1", -1.0), progress.get("best", -1.0)
    kept = {name: progress[name] for name in ("step", "bad_images", "layout")}
    progress |= new_progress() | kept | {"epoch": row["epoch"] + 1, "best": max(top1, best)}
    if top1 > best:
        save_checkpoint(out / "best.pt", run, progress, args)


# ---- Command line --------------------------------------------------------------------------------


def build_parser():
    """Every flag of finetune.py; `--help` is the manual. Table 2's values are the defaults."""
    parser = argparse.ArgumentParser(
        description="Linear probe, fine-tuning or k-NN on a pre-trained encoder.",
        usage="finetune.py --checkpoint FILE|none --task linear|finetune|knn "
        "[--data PATH|shapes|cifar10] [flags; see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    positive, number = at_least(1e-12, float), at_least(0, float)

    g = parser.add_argument_group("what to measure")
    g.add_argument("--demo", action="store_true", help="after train.py --demo: against random")
    g.add_argument(
        "--checkpoint",
        metavar="FILE|none",
        help="of train.py, or a published MAE; none: random weights; with --eval: of finetune.py",
    )
    g.add_argument("--task", choices=TASKS, default="finetune", help="what is done with it")
    g.add_argument("--eval", action="store_true", help="only measure --checkpoint on --data")
    g.add_argument(
        "--pool", choices=["cls", "mean"], default="cls", help="CLS, or mean patch token"
    )
    g.add_argument("--model", choices=MAE_SIZES, help="None = the checkpoint's; base for none")
    g.add_argument(
        "--image-size",
        type=at_least(16),
        help="side in pixels; None = the checkpoint's (positions are resized to another); 224",
    )
    g.add_argument("--patch-size", type=at_least(2), help="None = the checkpoint's; 16 for none")
    g.add_argument("--k", type=at_least(1), default=20, help="neighbours that vote; knn")
    g.add_argument("--temperature", type=positive, default=0.07, help="of the votes; knn")

    g = parser.add_argument_group("data")
    g.add_argument("--data", default="data/imagenet", help="folder with classes, shapes or cifar10")
    g.add_argument("--fraction", type=positive, help="of each class's training labels, seeded")
    g.add_argument("--shots", type=at_least(1), help="training images a class, a seeded choice")
    g.add_argument("--limit-images", type=at_least(1), help="train on so many, a seeded choice")
    g.add_argument("--val-images", type=at_least(1), help="measure on so many; None = all")
    g.add_argument(
        "--crop-min", type=positive, default=0.08, help="smallest crop, part of the area"
    )
    g.add_argument(
        "--workers", type=at_least(0), default=min(8, os.cpu_count()), help="loaders a process"
    )

    g = parser.add_argument_group("regularisation (None = by --task: paper's for finetune, or off)")
    g.add_argument("--label-smoothing", type=number, help="paper: 0.1")
    g.add_argument("--mixup", type=number, help="alpha of its Beta; 0 = off; paper: 0.8")
    g.add_argument("--cutmix", type=number, help="alpha of its Beta; 0 = off; paper: 1.0")
    g.add_argument("--rand-augment", type=number, help="magnitude, 0 to 10; 0 = off; paper: 9")
    g.add_argument("--drop-path", type=number, help="stochastic depth of the last block; 0.1")

    g = parser.add_argument_group("optimisation")
    # PAPER SILENT: it contradicts itself on warm-up (5 or 10 epochs) and Adam's second beta (.95 or
    # .999), and does not say whether the learning rate scales with the batch. Ours: its Table 2
    # where the two disagree (.999 is also MAE's), and MAE's linear scaling, 1e-3 at 8 x 32.
    g.add_argument("--epochs", type=at_least(1), default=130, help="paper: 130")
    g.add_argument("--warmup-epochs", type=number, help="None = 10/130 of the epochs, as the paper")
    g.add_argument("--batch-size", type=at_least(1), default=32, help="images a process and pass")
    g.add_argument("--accum", type=at_least(1), default=1, help="passes a step")
    g.add_argument(
        "--blr", type=positive, default=1e-3, help="learning rate for 256 images a step; scales"
    )
    g.add_argument("--lr", type=positive, help="learning rate as it is, instead of --blr")
    g.add_argument("--betas", type=number, nargs=2, default=[0.9, 0.999], help="AdamW")
    g.add_argument("--weight-decay", type=number, help="of matrices; None = by --task; paper: 0.05")
    g.add_argument(
        "--layer-decay",
        type=positive,
        help="learning rate of a layer relative to the one above; None = 0.75 for finetune, "
        "1 for other tasks and random weights",
    )

    g = parser.add_argument_group("the run")
    g.add_argument(
        "--amp", choices=["auto", "off", "fp16", "bf16"], default="auto", help="autocast"
    )
    g.add_argument("--seed", type=at_least(0), default=0, help="of weights, data and subsets")
    g.add_argument("--out", help="folder for everything written; None = TASK/ beside --checkpoint")
    g.add_argument(
        "--resume",
        nargs="+",
        default=["auto"],
        metavar="auto|off|PATH",
        help="auto: continue OUT/checkpoint.pt if there is one; off: start anew",
    )
    g.add_argument(
        "--eval-every",
        type=at_least(1),
        default=1,
        help="epochs between measurements; and the last",
    )
    g.add_argument("--save-every", type=at_least(1), default=1, help="epochs between checkpoints")
    g.add_argument("--save-steps", type=at_least(1), help="steps between checkpoints, in addition")
    g.add_argument("--steps", type=at_least(1), help="stop after so many steps; the schedule stays")
    g.add_argument(
        "--benchmark", type=at_least(1), metavar="STEPS", help="time so many steps; no training"
    )
    return parser


def parse_args(argv=None):
    """Command line -> namespace, complete but for what `read_weights` and `build_data` add.

    Ends with status 2 on a conflict.
    """
    parser = build_parser()
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)  # flags that are given still win
    args = parser.parse_args(argv)
    if args.benchmark and args.checkpoint is None:
        args.checkpoint = "none"
    if args.checkpoint is None:
        fail("--checkpoint is missing: give a file, or none for random weights; or try --demo")
    if args.eval and args.checkpoint == "none":
        fail("--eval measures a checkpoint of finetune.py; give one with --checkpoint")
    if args.benchmark and args.task == "knn":
        fail("--benchmark times training steps, and --task knn has none")
    for name, value in TASKS[args.task].items():
        if getattr(args, name) is None:
            random = name == "layer_decay" and args.checkpoint == "none"
            setattr(args, name, 1.0 if random else value)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs * 10 / 130
    args.lr = args.lr or args.blr * images_per_step(args) / 256
    beside = "runs/none" if args.checkpoint == "none" else Path(args.checkpoint).parent
    args.out = args.out or str(Path(beside) / args.task)
    if sum(v is not None for v in (args.fraction, args.shots, args.limit_images)) > 1:
        fail("--fraction, --shots and --limit-images exclude each other; give one")
    for name in ("fraction", "crop_min", "layer_decay", "label_smoothing", "drop_path"):
        value, below = getattr(args, name), name in ("label_smoothing", "drop_path")
        if value is not None and (value > 1 or (below and value == 1)):
            fail(
                f"--{name.replace('_', '-')} {value} must be {'below 1' if below else '1 or less'}"
            )
    if args.task == "linear" and images_per_step(args) // args.accum < 2:
        fail("--batch-size 1 leaves the probe's batch normalisation no variance; give 2 or more")
    if args.rand_augment > 10:
        fail(f"--rand-augment {args.rand_augment} is beyond 10, the strongest")
    if max(args.betas) >= 1:
        fail("--betas must be below 1")
    return args


# ---- Main ----------------------------------------------------------------------------------------


def measure(args, device, rank):
    """Do what --task or --eval says -> (signal that ended it or 0, top-1 in per cent)."""
    weights = read_weights(args)
    train_set, val_set = build_data(args)
    run, out = build_run(args, weights, len(args.classes), device), Path(args.out)
    if args.eval:
        row = evaluate(run, shard(val_set, args), [])
        report(row)
    elif args.task == "knn":
        if is_main():
            start_output(out, 0)  # a new log
        row = measure_knn(run, train_set, val_set, args)
        report({"epoch": 0, "training_images": len(train_set), **row}, out)
    else:
        val = (shard(val_set, args), [])

        def gradients(batches, progress):
            return accumulate(run, batches, progress, args)

        def end_epoch(progress, lr):
            finish_epoch(run, progress, lr, val, args)

        run.classifier.train()
        stopped, progress = fit(
            run, train_set, rank, args,
            schedule=set_learning_rates, gradients=gradients, update=update, end_epoch=end_epoch,
            must_fit=ARGUMENTS_THAT_MUST_FIT, script="finetune.py",
        )  # fmt: skip
        return stopped, progress.get("best", 0.0)
    return 0, row["top1"]


def demo(args, device, rank):
    """k-NN and linear top-1 of the demo's encoder and of random weights; prints a table."""
    if not Path(args.checkpoint).exists():
        fail(f"{args.checkpoint} does not exist: run `python train.py --demo` first")
    sizes, lines = {}, []
    for checkpoint in (args.checkpoint, "none"):
        results = []
        for task in ("knn", "linear"):
            kind = "random" if checkpoint == "none" else "pretrained"
            out = f"{args.out}/{task}_{kind}"
            one = argparse.Namespace(**vars(args) | sizes)
            one.checkpoint, one.task, one.out = checkpoint, task, out
            stopped, top1 = measure(one, device, rank)
            if stopped:
                return stopped
            results.append(top1)
        sizes = {name: getattr(one, name) for name in ("model", "image_size", "patch_size")}
        name = "random weights" if checkpoint == "none" else "pre-trained"
        lines.append(f"{name:15}  {results[0]:5.1f}  {results[1]:6.1f}")
    say(f"top-1, %         k-NN  linear    (chance: {100 / len(one.classes):.1f})")
    for line in lines:
        say(line)
    say("next: your own, python finetune.py --checkpoint runs/LOSS/checkpoint.pt --data PATH")
    return 0


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = start_processes()
    if args.benchmark:
        return benchmark(args, device, world)
    stopped = demo(args, device, rank) if args.demo else measure(args, device, rank)[0]
    if dist.is_initialized():
        dist.destroy_process_group()
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full: lower --batch-size (and raise --accum as much)"
        fail(message, everywhere=True)
