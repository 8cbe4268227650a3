"""What an encoder is worth: linear probe, fine-tuning, k-NN, logistic regression.

    python finetune.py --demo                                   # 3.5 minutes, after train.py --demo
    python finetune.py --task linear --checkpoint runs/mse/checkpoint.pt
    torchrun --nproc_per_node=8 finetune.py --task finetune --checkpoint runs/mse/checkpoint.pt
    python finetune.py --eval --checkpoint runs/mse/finetune/best.pt
    python finetune.py --predict photo.jpg --checkpoint runs/mse/finetune/best.pt

--task linear and finetune are sec. 5.1 and 4 of the paper and its Table 2; knn and logistic
measure features computed once, without augmentation. In order: what a step minimises, the loop,
network and optimiser; accuracy; k-NN and logistic regression; then, under a banner, checkpoints,
data, command line. What keeps a run alive (processes, precision, checkpoints) is train.py's.

--checkpoint takes those of train.py, any project's file of ViT-MAE weights, or `none`: random
weights. --data: a folder of images in class folders, shapes, or cifar10. Writes to OUT: a training
checkpoint.pt, best.pt (highest top-1) and log.jsonl, in per cent: top1 and top5 of the validation
images; knn and logistic log.jsonl alone. OUT of --eval is the checkpoint's folder. Run the same
command again after any interruption and a training continues where its checkpoint was saved (--demo
starts anew).
"""

import argparse
import json
import math
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torchvision.transforms import v2

import data
import model
import train
from train import fail, is_main, say

# ---- One step: what a task minimises -------------------------------------------------------------


def classification_loss(logits, targets, label_smoothing):
    """Mean cross-entropy in float32. targets: labels (B,) or class probabilities (B, classes)."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def classification_terms(run, images, labels, progress, args):
    """Loss of a batch -> {"loss": scalar}. images: (B, 3, H, W) in [0, 1]. labels: (B,)."""
    targets = labels.to(run.device, non_blocking=True)
    if run.mix is not None:
        images, targets = run.mix(images, targets)  # (B, classes)
    with run.autocast():
        logits = run.network(images)  # (B, classes)
    return {"loss": classification_loss(logits, targets, args.label_smoothing)}


def step_gradients(run, batches, progress, args):
    """Accumulate the mean gradient of a step's batches -> {name: mean of the term over them}.

    The gradient is that of "loss", the sum of the terms of `run.terms`, here the one above.
    """
    totals, share = {}, 1 / len(batches)
    for number, (images, targets, *_) in enumerate(batches, start=1):
        # What is drawn (mixing, stochastic depth) depends on where the run is, not on what was
        # drawn before; W processes draw as one with W times the --accum.
        place = (number - 1) * train.world_size() + train.rank()
        torch.manual_seed(data.sample_seed(args.seed, progress["step"], place))
        images = data.to_float(images.to(run.device, non_blocking=True))  # (B, 3, H, W)
        # Processes exchange gradients during the last backward pass of a step alone.
        with train.exchange(number == len(batches), run.network):
            terms = run.terms(run, images, targets, progress, args)
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


CURVES = {  # panels of curves.png, see data.CURVES
    "loss": {"loss": "training", "val_loss": "held out"},
    "accuracy, %": {"top1": "top-1", "top5": "top-5"},
}


# ---- The loop over epochs ------------------------------------------------------------------------


def train_network(run, train_set, val_set, args):
    """Train one network -> (signal that stopped it or 0, best).

    run: from `build_run`. best: highest `run.score`, top-1 for instance, in per cent. The loop is
    that of train.py's `pretrain`, with one player. But each epoch is saved first and measured then,
    since measuring may take long. A run that was killed while it measured begins with that.
    """
    run.network.train()
    val = (shard(val_set, args), [])  # and the unreadable ones among its images
    progress, sampler, loader = train.open_run(run, train_set, args)
    if nothing_left := train.finished(progress, args):
        say(nothing_left)
        return 0, progress["best"]
    stop, told, stopping = train.catch_stop_signals(), False, False

    while progress["epoch"] <= args.epochs and not stopping:
        run.epoch = epoch = progress["epoch"]
        sampler.epoch, sampler.start = epoch, progress["epoch_step"]  # resumes in mid-epoch
        bar, stream, clock = train.progress_bar(sampler, args), iter(loader), perf_counter()
        due = progress["epoch_step"] == sampler.steps  # of a run that was ended while measuring

        while batches := list(islice(stream, args.accum)):  # one step
            position = (epoch - 1) * sampler.steps + progress["epoch_step"]
            warmup, total = args.warmup_epochs * sampler.steps, args.epochs * sampler.steps
            # The head's rate; lower layers have a part of it.
            lr = train.learning_rate(position, warmup, total, args.lr)
            train.set_rate(run.opt, lr)
            terms = step_gradients(run, batches, progress, args)
            means, told = train.agree(run, terms, batches, stop["signal"], progress, train_set)
            finite = math.isfinite(means["loss"])
            update(run, apply=finite)
            clock = train.book_step(progress, means, finite, lr, clock, bar, args)
            stopping = told or progress["step"] == args.steps
            due = train.save_is_due(progress, stopping, args)
            if progress["epoch_step"] == sampler.steps:
                due = due or epoch % args.save_every == 0 or epoch == args.epochs
            if due:
                train.save_checkpoint(Path(args.out) / "checkpoint.pt", run, progress, args)
            if stopping:
                break

        bar.close()
        if progress["epoch_step"] == sampler.steps and not told:  # what all processes know
            finish_epoch(run, progress, val, args)  # measures, logs, keeps the best; moves on
            if due:
                train.save_checkpoint(Path(args.out) / "checkpoint.pt", run, progress, args)
    say(train.ending(progress, args))
    return train.stopped_by(stop, progress, args), progress["best"]


def finish_epoch(run, progress, val, args):
    """Measure, log, keep the best, and move `progress` on. val: (loader, unreadable images)."""
    lr = run.opt.param_groups[0]["lr"]  # of the head
    row, measured = train.epoch_row(progress, lr, args), {}
    if row["epoch"] % args.eval_every == 0 or row["epoch"] == args.epochs:
        measured = run.evaluate(run, *val, args)
    row["bad_images"] += len(val[1])
    train.write_row(row | measured, args.out)
    if is_main():
        picture = Path(args.out) / "pictures" / "curves.png"
        with train.writing(picture):
            picture.parent.mkdir(exist_ok=True)
            data.draw_curves(picture, Path(args.out) / "log.jsonl", run.curves)
    best = measured.get(run.score, -1.0) > progress["best"]
    if best:
        progress["best"] = measured[run.score]
    train.next_epoch(progress)
    if best:
        train.save_checkpoint(Path(args.out) / "best.pt", run, progress, args)


# ---- Network and optimiser -----------------------------------------------------------------------


def build_run(
    network, groups, args, device, *, part, terms, evaluate, score, script, must_fit, curves
):
    """What trains -> namespace of network, opt, scaler, device, dtype and autocast (see train.py).

    network:  on the device, with its weights
    groups:   of AdamW
    part:     the network's name in a checkpoint
    terms:    function of (run, images, targets, progress, args) -> {name: scalar}; their sum is
              minimised
    evaluate: function of (run, loader, unreadable images, args) -> row of the log
    score:    what of such a row picks best.pt; None: nothing does
    script:   who writes the checkpoint
    must_fit: arguments under which alone a checkpoint continues
    curves:   panels of pictures/curves.png, as data.CURVES
    """
    dtype = train.choose_precision(args.amp, device)
    run = SimpleNamespace(device=device, dtype=dtype, script=script, must_fit=must_fit)
    run.autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    run.terms, run.evaluate, run.score, run.curves = terms, evaluate, score, curves
    run.network, run.scaler = train.wrap(network, device), train.scaler(device, dtype)
    run.opt = torch.optim.AdamW(groups, betas=tuple(args.betas), fused=True)
    run.parts = {part: network, "opt": run.opt, "scaler": run.scaler}
    return run


def build_classifier_run(args, weights, device):
    """`build_run` of a classifier, with `mix`: a function that mixes a batch's samples, or None.

    args: complete, as `open_checkpoint` and `build_data` leave them; weights: the former's.
    """
    torch.manual_seed(args.seed)  # the same initial weights on every process
    sizes = dict(image_size=args.image_size, patch_size=args.patch_size, drop=args.drop_path)
    sizes |= dict(pool=args.pool, frozen=args.task != "finetune")
    with train.refusals():  # sizes that do not fit each other, or weights that do not
        network = model.build_classifier(args.model, len(args.classes), **sizes)
        if weights is not None:
            load_weights(network, weights, args)
    run = build_run(
        network.to(device),
        layer_groups(network, args.weight_decay, args.layer_decay),
        args,
        device,
        part="classifier",
        terms=classification_terms,
        evaluate=evaluate_classifier,
        score="top1",
        script="finetune.py",
        must_fit=MUST_FIT,
        curves=CURVES,
    )
    run.mix = build_mix(args, len(args.classes))
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

    scores: (B, classes), -inf: the class cannot be predicted. labels: (B,), -1: does not count.
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
    for images, labels, _, bad in train.renewing(loader, args.out):
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


@torch.no_grad()
def predict(run, args):
    """--predict: name what is on photographs; prints and writes OUT/predictions.jsonl, a line each.

    A row: file, classes (the best five, best first) and their probabilities.
    """
    with train.refusals():
        source = data.open_photographs(args.predict)
    sizes = dict(image_size=args.image_size, seed=args.seed)
    dataset = data.LabelledSet(source, range(len(source)), augment=False, **sizes)
    network, rows, unread = train.unwrap(run.network).eval(), [], {}
    number = train.rank()  # of the image, as `shard` deals them
    for images, labels, _, bad in shard(dataset, args):
        unread |= dict(bad)
        with run.autocast():
            logits = network(data.to_float(images.to(run.device)))
        best = logits.float().softmax(dim=1).topk(min(5, len(args.classes)))
        for label, values, classes in zip(labels, *map(torch.Tensor.tolist, best), strict=True):
            if label >= 0:  # it could be read
                names = [args.classes[n] for n in classes]
                values = [round(value, 4) for value in values]
                row = {"file": source.files[number], "classes": names, "probabilities": values}
                rows.append((number, row))
            number += train.world_size()
    note_unread(unread, [], dataset)
    if found := train.gathered_on_main(rows):
        rows = [row for _, row in sorted(sum(found, []), key=lambda pair: pair[0])]
        out = Path(args.out)
        with train.writing(out):
            out.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row) + "\n" for row in rows]
            (out / "predictions.jsonl").write_text("".join(lines))
        for row in rows:
            pairs = zip(row["classes"], row["probabilities"], strict=True)
            say(f"{row['file']}: " + ", ".join(f"{name} {p:.2f}" for name, p in pairs))
        say(f"done: {out}/predictions.jsonl")


def note_unread(found, known, dataset):
    """Name the unreadable images of a measurement that are not yet in `known`, and add them."""
    found = {index: reason for index, reason in found.items() if index not in known}
    train.note_bad_images(found, known, dataset, fate="left out")


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
    for images, labels, _, bad in train.renewing(shard(dataset, args), args.out):
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
    if len(full) < 2:
        fail("--whiten needs two training images or more")
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
    row = as_row(counts, classes) | about  # every process has all queries: nothing to add up
    return row | {"chance": 100 / classes}


# ==================================================================================================
# What keeps it running: checkpoints, data, command line.
# ==================================================================================================

# ---- Checkpoints ---------------------------------------------------------------------------------

KIND = "a checkpoint of train.py, finetune.py or a ViT-MAE of another project"
# A checkpoint continues only under the same values of these.
MUST_FIT = (
    *("task", "checkpoint", "data", "model", "image_size", "patch_size", "pool", "fraction"),
    *("shots", "limit_images", "val_images", "layer_decay", "seed", "classes"),
)


def open_checkpoint(args, part="classifier", script="finetune.py", keep=("pool",)):
    """Read --checkpoint -> ({name: tensor}, None for `none`; args with the sizes that it settles).

    Model, image and patch size are the checkpoint's where no flag gives them, and a --model or
    --patch-size that contradicts it ends the run. With --eval the file is one of `script`, which
    holds `part`. Then task, seed and classes are its, too, and so is what `keep` names, which no
    flag may contradict. seen: on what the weights were trained, see `train.seen_by`.
    """
    path, saved, weights = args.checkpoint, dict(model="base", image_size=224, patch_size=16), None
    seen = []
    if path != "none":
        with train.refusals():
            content = model.load_file(path, KIND)
            saved = content.get("arguments")
            ours = "script" in content and isinstance(saved, dict)
            seen = train.seen_by(content) if ours else []
            if args.eval != (ours and "mae" not in content):
                fail(
                    f"{path} is not a checkpoint of {script}"
                    if args.eval
                    else f"{path} is a checkpoint of {content['script']}: --eval measures it, "
                    "--resume continues it"
                )
            if args.eval and not train.made_by(script, content, part):
                fail(f"{path} is a checkpoint of {content['script']}, not of {script}")
            if args.eval:
                weights = content[part]
            else:
                weights, notes = model.named_as_ours(content, path, KIND)
                if not ours:
                    saved = model.published_sizes(weights, path, args.model)
                if notes:
                    say(f"{path}: {'; '.join(notes)}")
    for what in ("model", "patch_size", *(keep if args.eval else ())):
        given, theirs, flag = getattr(args, what), saved.get(what), what.replace("_", "-")
        if weights is not None and given not in (None, theirs):
            fail(f"--{flag} {given}, but {path} has {theirs}; leave --{flag} off")
    sizes = ("model", "image_size", "patch_size")
    settled = {what: getattr(args, what) or saved[what] for what in sizes}
    if args.eval:
        settled |= {what: saved.get(what) for what in ("task", "seed", "classes", *keep)}
    args = argparse.Namespace(**vars(args) | settled)
    args.seen = [*seen, [train.folder_of(args.data), args.seed]]
    return weights, args


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


def build_data(args):
    """-> (training, validation `LabelledSet`, args with `classes`, the names of the classes).

    With --eval the classes must be the checkpoint's. One line and status 2 if that cannot be.
    """
    train_source, val_source = train.open_data(args, args.image_size, labelled=True)
    train.check_held_out(val_source, args)
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
    if getattr(val_source, "held_out", False) and len(val_set) < 100:
        say(
            f"{len(val_set)} images measure top-1: each is {100 / len(val_set):.1f} points; more "
            f"in {args.data}/val, with the others in train/, would tell more"
        )
    args = argparse.Namespace(**vars(args) | {"classes": list(val_source.classes)})
    shown, asked = ({part.source.targets[i] for i in part.indices} for part in (train_set, val_set))
    if unseen := sorted(asked - shown):
        say(
            f"no training image of {len(unseen)} classes with validation images, such as "
            f"{args.classes[unseen[0]]}: these cannot be named"
        )
    return train_set, val_set, args


# ---- Command line --------------------------------------------------------------------------------

# What --task means for the flags that are not given.
# PAPER: supplement, Table 2, "for linear probing and fine-tuning". DIFFERS: a probe gets none of
# the table's regularisation (MAE's does not either): one linear layer would underfit.
FINETUNE = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0, rand_augment=9.0, weight_decay=0.05)
PLAIN = dict.fromkeys(FINETUNE, 0.0)
# PAPER SILENT: layer-wise decay and stochastic depth; ours are those of MAE's paper.
FINETUNE |= dict(layer_decay=0.75, drop_path=0.1)
PLAIN |= dict(layer_decay=1.0, drop_path=0.0)
ONCE = ("knn", "logistic")  # see each image once, without augmentation
TASKS = dict.fromkeys(("linear", *ONCE), PLAIN) | {"finetune": FINETUNE}
TRAINING = ("crop_min", "epochs", "warmup_epochs", "steps", "accum", "lr", "blr", "betas")
TRAINING += ("resume", "eval_every", "save_every", "save_steps")
USED_BY = (  # tasks, and flags that they alone look at
    (("knn",), ("k", "temperature", "whiten")),
    (("linear", "finetune"), (*FINETUNE, *TRAINING)),
)
# Logistic regression: penalties on its weights, strongest first; where its descent ends, in nats
# per unit of `descend`; after how many iterations at the latest; parts that are held out in turn.
PENALTIES = [float(f"{m}e-{n}") for n in range(1, 7) for m in (10, 3)] + [1e-6]  # 1, .3, .1 ...
SLOPE, ITERATIONS, FOLDS = 1e-6, 5000, 5
# `--demo`: measures what `train.py --demo` wrote against random weights, on two CPU cores.
DEMO = dict(
    checkpoint="runs/demo/checkpoint.pt",
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


COUNT, NUMBER, POSITIVE = train.COUNT, train.NUMBER, train.POSITIVE
# What scripts that start from an encoder have, too.
CHECKPOINT_FLAGS = (
    ("--checkpoint", str, None, "of train.py, or another project's ViT-MAE; none: random weights"),
    ("--model", model.MAE_SIZES, None, "None = the checkpoint's; base for none"),
    ("--image-size", train.at_least(16), None, "side in pixels; None = the checkpoint's"),
    ("--patch-size", train.at_least(2), None, "None = the checkpoint's; 16 for none"),
)
# PAPER SILENT: it contradicts itself on warm-up (5 or 10 epochs) and Adam's second beta (.95 or
# .999), and does not say whether the learning rate scales with the batch. Ours: the supplement's
# Table 2 where the two disagree (.999 is also MAE's), and MAE's linear scaling (256 images: 1e-3).
OPTIMISER_FLAGS = (
    ("--epochs", COUNT, 130, "paper: 130"),
    ("--warmup-epochs", NUMBER, None, "None = 10/130 of the epochs, as the paper"),
    *train.BATCH_FLAGS,
    ("--blr", POSITIVE, 1e-3, "learning rate for 256 images per step; scales with them"),
    ("--betas", (NUMBER, NUMBER), [0.9, 0.999], "of AdamW"),
    ("--weight-decay", NUMBER, None, "of matrices; None = by task; paper: 0.05"),
    ("--layer-decay", POSITIVE, None, "rate of a layer relative to the one above; None = by task"),
    ("--drop-path", NUMBER, None, "stochastic depth of the last block; None = by task"),
)


def build_parser():
    """Every flag of finetune.py; `--help` is the manual.

    The defaults are the supplement's Table 2, but for what TASKS and OPTIMISER_FLAGS say.
    """
    parser = argparse.ArgumentParser(
        description="Classify with a pre-trained encoder: what is it worth?",
        usage="finetune.py --checkpoint FILE|none --task linear|finetune|knn|logistic "
        "[--data PATH|shapes|cifar10] [flags; see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--demo", action="store_true", help="after train.py --demo: against random")
    parser.add_argument("--eval", action="store_true", help="only measure finetune.py's checkpoint")
    parser.add_argument(
        "--predict", type=train.text, metavar="FILE|FOLDER", help="only name what is on photographs"
    )
    train.add_flags(
        parser,
        "what to do",
        ("--task", TASKS, "finetune", "what is done"),
        *CHECKPOINT_FLAGS,
        (
            "--pool",
            ("cls", "mean", "auto"),
            None,
            "what a classifier sees: CLS (None), the mean patch token, or (logistic) the one that "
            "does better in five-fold cross-validation",
        ),
        ("--k", COUNT, 20, "neighbours that vote; knn"),
        ("--temperature", POSITIVE, 0.07, "of the votes; knn"),
        ("--whiten", bool, False, "first give features the same variance in every direction; knn"),
    )
    train.add_flags(
        parser,
        "data",
        *train.DATA_FLAGS,
        ("--val-images", COUNT, None, "measure on so many; None = all"),
        ("--fraction", POSITIVE, None, "of each class's training labels, seeded"),
        ("--shots", COUNT, None, "training images per class, a seeded choice"),
        ("--crop-min", POSITIVE, 0.08, "smallest crop, part of the area; linear, finetune"),
    )
    train.add_flags(
        parser,
        "regularisation (None = by --task: paper's for finetune, or off)",
        ("--label-smoothing", NUMBER, None, "paper: 0.1"),
        ("--mixup", NUMBER, None, "alpha of its Beta; 0 = off; paper: 0.8"),
        ("--cutmix", NUMBER, None, "alpha of its Beta; 0 = off; paper: 1.0"),
        ("--rand-augment", NUMBER, None, "magnitude, 0 to 10; 0 = off; paper: 9"),
    )
    train.add_flags(parser, "optimisation", *OPTIMISER_FLAGS)
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
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)  # flags that are given still win
    args = parser.parse_args(argv)
    if args.pool == "auto" and (args.task != "logistic" or args.demo):
        fail("--pool auto is for --task logistic alone; give cls or mean")
    if args.demo and args.task != DEMO["task"]:
        fail(f"--demo runs knn and logistic; leave --task {args.task} off")
    runs = ONCE if args.demo else (args.task,)
    for tasks, flags in USED_BY:
        if not (args.eval or args.predict or set(runs) & set(tasks)):
            train.name_unused(args, flags, parser, "task")
    settle(args, TASKS[args.task], dict(pool="cls"))
    if sum(v is not None for v in (args.fraction, args.shots, args.limit_images)) > 1:
        fail("--fraction, --shots and --limit-images exclude each other; give one")
    train.check_parts(args, "fraction", "crop_min", "label_smoothing")
    if args.task == "linear" and train.images_per_step(args) // args.accum < 2:
        fail("--batch-size 1 leaves the probe's batch normalisation no variance; give 2 or more")
    if args.rand_augment > 10:
        fail(f"--rand-augment {args.rand_augment} is beyond 10, the strongest")
    return args


def settle(args, defaults, kept):
    """Give a value to each flag that has none: that of `defaults`, or one that follows from others.

    For scripts that start from --checkpoint; args.task names the folder beside it. kept: more
    defaults, but not with --eval, where `open_checkpoint` takes the checkpoint's values. Status 2
    for what cannot be.
    """
    args.eval = args.eval or bool(args.predict)  # either takes a checkpoint of the script's own
    if args.checkpoint is None:
        fail("--checkpoint is missing: give a file, or none for random weights; or try --demo")
    if args.checkpoint == "none" and args.eval:
        fail("random weights are nothing to measure; give a file with --checkpoint")
    for name, value in (defaults | ({} if args.eval else kept)).items():
        if getattr(args, name) is None:
            random = name == "layer_decay" and args.checkpoint == "none"
            setattr(args, name, 1.0 if random else value)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs * 10 / 130
    args.lr = args.lr or args.blr * train.images_per_step(args) / 256
    beside = "runs/none" if args.checkpoint == "none" else Path(args.checkpoint).parent
    args.out = args.out or str(beside if args.eval else Path(beside) / args.task)
    train.check_parts(args, "layer_decay", "drop_path")
    if max(args.betas) >= 1:
        fail("--betas must be below 1")


# ---- Main ----------------------------------------------------------------------------------------


def run_task(args, device):
    """Any --task, or --eval -> (signal that ended it or 0, top-1 in per cent)."""
    weights, args = open_checkpoint(args)
    if args.predict:
        predict(build_classifier_run(args, weights, device), args)
        return 0, None
    train_set, val_set, args = build_data(args)
    run = build_classifier_run(args, weights, device)
    if args.eval:
        row = run.evaluate(run, shard(val_set, args), [], args)
        train.write_row(row)
    elif args.task in ONCE:
        if is_main():
            train.open_output(Path(args.out))
        row = measure_features(run, train_set, val_set, args)
        kept = ("task", "checkpoint", "data", "seed", "pool")
        kept += ("k", "temperature", "whiten") if args.task == "knn" else ()
        about = {"epoch": 0, "training_images": len(train_set)} | {k: vars(args)[k] for k in kept}
        train.write_row(about | row, args.out)
        say(f"added to {args.out}/log.jsonl")
    else:
        return train_network(run, train_set, val_set, args)
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
    chance = 100 / len(train.open_data(args, settled.image_size, labelled=True)[0].classes)
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
    device = train.start_processes()
    stopped = 0
    if args.demo:
        demo(args, device)
    else:
        stopped, _ = run_task(args, device)
    train.stop_processes()
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    train.run_script(main)
