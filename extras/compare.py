"""Runs against each other: their curves, or several seeds of several losses with their errors.

    python -m extras.compare runs/mse runs/msg_gan_p        # curves of two runs in one picture
    python -m extras.compare runs/mse --tensorboard         # its log as TensorBoard's events
    python -m extras.compare runs/seeds                     # means, differences in pairs, a picture

Of runs, folders with a log.jsonl, it draws each value of their logs over the epochs, under the
folders' names, into compare.png in the folder that holds them all.

Of seeds it reads the logs in FOLDER/ROW/SEED/ and below, for instance runs/seeds/mse/0/log.jsonl
of train.py --seed 0 --out runs/seeds/mse/0, and runs/seeds/mse/0/knn/log.jsonl of finetune.py
--task knn. ROW may be any name. Prints a table, and writes compare.json and compare.png into
FOLDER.

README's study took about an hour of one core a run. In data/cifar10, train/CLASS/ and val/CLASS/
hold 2,500 and 500 of each class of CIFAR-10's photographs. Eq. 3 alone: --loss msg_gan_p
--adversarial-weight 0 --d-lr 0. Random weights: --checkpoint none in FROM, and --layer-decay 1 to
fine-tune. The study of 30,000 images had --epochs 5 and seeds 0 1 2. The other weight of eq. 5:
--adversarial-weight 1 --d-lr 4e-5, for stylegan2_ada_p .1 and 2.5e-3, with seed 0; the latter on
few images: --limit-images 2000 --epochs 10.

    SIZE="--model tiny --image-size 32 --patch-size 4 --data data/cifar10 --workers 0"
    for SEED in 0 1; do for ROW in mse ms_ssim ls_gan_p msg_gan msg_gan_p stylegan2_ada_p; do
        OUT=runs/seeds/$ROW/$SEED; FROM="--checkpoint $OUT/checkpoint.pt --seed $SEED --pool mean"
        python train.py --loss $ROW --seed $SEED --out $OUT $SIZE --epochs 20 --epoch-images 6000 \\
            --batch-size 32 --lr 1e-3 --warmup-epochs 1 --val-images 1000 --eval-every 5
        for TASK in logistic knn; do
            python finetune.py --task $TASK $FROM --out $OUT/$TASK $SIZE --limit-images 5000 \\
                --batch-size 250
        done
        python finetune.py --task finetune $FROM --out $OUT/finetune $SIZE --fraction 0.1 \\
            --epochs 5 --eval-every 5 --lr 1e-3 --crop-min 0.5 --mixup 0 --cutmix 0 --rand-augment 0
    done; done; python -m extras.compare runs/seeds
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import losses
import train
from train import fail, say

# What is looked for in logs, and how the picture calls it.
SCORES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "top1": "top-1, %",
    "ap": "box AP, %",
    "miou": "mIoU, %",
}
FINE = 3  # the picture is drawn at three times its size, then averaged: no jaggies
LINE = 20  # pixels from row to row in it


# ---- Curves of runs ------------------------------------------------------------------------------

# Of a log, what is no result.
NO_CURVE = ("epoch", "step", "lr", "seconds", "images_per_second", "bad_images", "val_images")
NO_CURVE += ("training_images", "chance", "seed", "k", "temperature")


def draw_runs(folders):
    """Curves of several runs -> the picture's path. Status 2 if there is nothing to draw."""
    parent = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    charts = {}  # {value: {run: [(epoch, value), ...]}}
    for folder in folders:
        name = str(folder.resolve().relative_to(parent))
        for row in read_rows(folder):
            for key in [k for k in row if k not in NO_CURVE and isinstance(row[k], (int, float))]:
                if is_score(row[key]) and not isinstance(row[key], bool):
                    line = charts.setdefault(key, {}).setdefault(name, [])
                    line.append((row["epoch"], row[key]))
    if not charts:
        fail(f"no results in {', '.join(map(str, folders))}: a first epoch must have ended")
    epochs = [epoch for lines in charts.values() for line in lines.values() for epoch, _ in line]
    span = ("epoch", min(epochs), max(epochs))
    names = list(dict.fromkeys(name for lines in charts.values() for name in lines))
    charts = {
        title: (*span, {name: lines.get(name, []) for name in names})  # each in its own colour
        for title, lines in charts.items()
    }
    with train.writing(parent):
        data.save_charts(parent / "compare.png", charts, legend=True)
    return parent / "compare.png"


def read_rows(folder):
    """Rows of a run's log; status 2 if it has none, or some of another kind."""
    rows = data.read_log(folder / "log.jsonl")
    if not rows or not all("epoch" in row for row in rows):
        fail(f"no results in {folder}/log.jsonl, a row with its epoch each; name other runs")
    return rows


def write_events(folder):
    """A run's log as TensorBoard's events, in RUN/tensorboard -> that folder."""
    rows = read_rows(folder)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fail("--tensorboard needs the package tensorboard: pip install tensorboard")
    with train.writing(folder), SummaryWriter(folder / "tensorboard") as writer:
        for row in rows:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, row["epoch"])
    return folder / "tensorboard"


# ---- Seeds: reading ------------------------------------------------------------------------------


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
                fail(f"{log} is not of ROW/SEED/, SEED a number; there must be no other logs")
            *_, last = data.read_log(log) or [{}]
            scores = [name for name in SCORES if is_score(last.get(name))]
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


def is_score(value):
    """Is it a measured value? A log may also hold nan, or AP's -1: no such objects in the truth."""
    return value is not None and math.isfinite(value) and value != -1


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


# ---- Seeds: the picture --------------------------------------------------------------------------


def round_ticks(low, high):
    """Two to six multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    least = (high - low) / 5  # between two ticks
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * part for part in (1, 2, 5, 10) if power * part >= least * (1 - 1e-9))
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def save_dots(path, charts):
    """Write a PNG of values by row: a dot for each, and where there are two or more their mean, in
    a bar of one standard error to either side.

    charts: {title: {row: [value, ...]}}, each chart with its own axis, three in a row.
    """
    names = list(dict.fromkeys(name for rows in charts.values() for name in rows))
    left = 20 + int(max(map(ImageFont.load_default(size=11).getlength, names)))  # for the names
    across, width, high = min(3, len(charts)), 260, LINE * len(names) + 62
    size = (left + width * across, high * math.ceil(len(charts) / across))
    canvas = Image.new("RGB", tuple(FINE * side for side in size), "white")
    draw = ImageDraw.Draw(canvas)
    lines = {}  # {row: (height of its line in a chart, colour)}
    for number, name in enumerate(names):
        colour = data.CURVE_COLOURS[number % len(data.CURVE_COLOURS)]
        lines[name] = LINE * (number + 0.5) * FINE, colour
    for place, (title, rows) in enumerate(charts.items()):
        x0, y0 = (left + place % across * width) * FINE, (place // across * high + 34) * FINE
        if place % across == 0:
            for name, (y, colour) in lines.items():
                draw.text((x0 - 10 * FINE, y0 + y), name, colour, font(11), anchor="rm")
        draw_chart(draw, title, rows, lines, x0, y0, x0 + (width - 50) * FINE)
    canvas.reduce(FINE).save(path)


def font(points):
    """The font of so many points, in a picture drawn `FINE` times as large."""
    return ImageFont.load_default(size=points * FINE)


def draw_chart(draw, title, rows, lines, x0, y0, x1):
    """One chart of `save_dots`, {row: [value, ...]}, between x0 and x1, from y0 downwards."""
    y1 = y0 + LINE * len(lines) * FINE
    values = [value for row in rows.values() for value in row]
    low, span = min(values), max(values) - min(values)
    margin = span / 12 if span > 1e-5 * abs(low) else 0.5  # equal values: in the middle
    low, span = low - margin, span + 2 * margin

    def x_of(value):
        return x0 + (x1 - x0) * (value - low) / span

    draw.text((x0, y0 - 10 * FINE), title, "black", font(14), anchor="ls")
    for tick in round_ticks(low, low + span):
        draw.line([(x_of(tick), y0), (x_of(tick), y1)], "#dddddd", FINE)
        draw.text((x_of(tick), y1 + 4 * FINE), f"{tick:.6g}", "#555555", font(11), anchor="mt")
    for name, row in rows.items():
        y, colour = y0 + lines[name][0], lines[name][1]
        top, bottom, radius = y - 5 * FINE, y + 5 * FINE, 3 * FINE
        if len(row) > 1:
            mean, error = mean_and_error(row)
            start, end = x_of(mean - error), x_of(mean + error)
            draw.rectangle([start, top, end, bottom], fill="#e2e2e2")
            middle = (start + end) / 2
            draw.line([(middle, top), (middle, bottom)], colour, 2 * FINE)
        for x in map(x_of, row):
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)


# ---- Seeds: comparing ----------------------------------------------------------------------------


def compare(folder):
    """Means over seeds, and differences to the first row in pairs of one seed: a table, a picture.

    Pairs share what a seed fixes: the order of the images; between rows of one kind of mask, their
    crops and the masks; between rows whose networks are the same, the weights at the start.
    """
    found = read_runs(folder)
    if not found:
        fail(f"{folder} has no results: there must be logs in {folder}/ROW/SEED/ and below")
    results = {score: summary(rows, next(iter(rows))) for score, rows in found.items()}
    print_table(results)
    charts = {}
    for name, rows in found.items():
        *task, score = name.split()
        title = " ".join([*task, SCORES[score]])
        charts[title] = {row: list(seeds.values()) for row, seeds in rows.items()}
    with train.writing(folder):
        (folder / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
        save_dots(folder / "compare.png", charts)
    say(f"done: {folder}/compare.json, {folder}/compare.png")


def print_table(results):
    """The table on the screen: a part for each score, a line for each row."""

    def with_error(value, error, digits):
        return f"{value:{digits}}" + ("" if error is None else f" +- {error:6.2g}")

    says = "difference to the first row +- its own, * = above two of it"
    say(f"mean +- standard error (runs); {says}")
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


# ---- Command line --------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Compare runs, or several seeds of several losses.",
        usage="python -m extras.compare RUN [RUN ...] [--tensorboard], or FOLDER of ROW/SEED/",
    )
    parser.add_argument("folders", type=Path, nargs="+", help="runs, or one folder of ROW/SEED/")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's events")
    args = parser.parse_args(argv)
    first, *others = args.folders
    if args.tensorboard:
        say(f"done: {', '.join(str(write_events(folder)) for folder in args.folders)}")
    elif others or (first / "log.jsonl").exists():
        say(f"done: {draw_runs(args.folders)}")
    else:
        compare(first)


if __name__ == "__main__":
    train.run_script(main)
