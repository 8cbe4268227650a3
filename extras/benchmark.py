"""What a training step costs: Table 4 of the paper, and the steps of fine-tuning.

    python -m extras.benchmark --loss all --batch-size 4        # Table 4: every row
    python -m extras.benchmark --loss msg_gan_p --steps 20
    torchrun --nproc_per_node=8 -m extras.benchmark --loss msg_gan_p
    python -m extras.benchmark --task detect --image-size 512   # or linear, finetune, segment

Times steps on random images, in the process that runs it; no loader, and nothing is written. All
other flags are those of what is timed: train.py's or extras/siblings.py's with --loss (with --loss
all those that both have); those of finetune.py, extras/detect.py or extras/segment.py with --task
(there --checkpoint none, random weights, unless given). Prints one JSON line: seconds per step,
images per second, peak memory, parameters; --loss all a table, from a process for each row.

With --loss the perceptual term, eq. 3, is on; ADA is at p = .5 unless --ada-p says otherwise, since
it costs nothing at the p = 0 of a start; weights of phi and of a teacher that are not given are
random, which takes as long.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import data
import finetune
import losses
import model
import train
from train import fail, say

# ---- Timing --------------------------------------------------------------------------------------


def time_steps(step, count, places, device):
    """Seconds per step: the mean, over a round of `places` steps, of each place's median.

    step(number, place): does one. At least `count` are timed, whole rounds of them, after two
    that are not, at place 0, where a step holds all that it can.
    """
    seconds = [[] for _ in range(places)]
    for number in range(2 + math.ceil(count / places) * places):
        place = max(0, number - 2) % places
        began = time.perf_counter()
        step(number, place)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            seconds[place].append(time.perf_counter() - began)
    return statistics.mean(statistics.median(place) for place in seconds)


def report(run, seconds, args, **about):
    """Print what was measured, as one JSON line. about: what else to say of it."""
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # Unix alone

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    row = {
        "model": args.model,
        "image_size": args.image_size,
        "batch_size": train.images_per_step(args),
        "device": run.device.type,
        "amp": str(run.dtype or torch.float32).removeprefix("torch."),
        "seconds_per_step": round(seconds, 4),
        "images_per_second": round(train.images_per_step(args) / seconds, 2),
        "peak_memory_mib": round(peak / 2**20),
    }
    say(json.dumps(about | row))


def parameters(network):
    """How many parameters a network trains."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad) if network else 0


def random_batch(args, views=1):
    """Random images (B, 3, S, S) uint8, or (B, views, 3, S, S), and noise of masks (B, N)."""
    generator = torch.Generator().manual_seed(args.seed)
    B, patches = args.batch_size, (args.image_size // args.patch_size) ** 2
    shape = (B, *data.sample_shape(args.image_size, views))
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return images, torch.rand(B, patches, generator=generator)


# ---- Pre-training --------------------------------------------------------------------------------


def time_row(loss, flags, count, device):
    """A row of `losses.LOSSES`: train.py's step, eq. 3 on.

    Steps with a lazy regulariser take longer: they come in rounds (see `time_steps`).
    """
    recipe = losses.LOSSES[loss]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        if recipe["phi"] in model.PUBLISHED:  # a stand-in for phi's published weights
            phi = {"dvae": model.DVAEEncoder, "vgg": model.VGGFeatures}[recipe["phi"]]
            torch.save(phi().state_dict(), f"{folder}/phi.pth")
            files = [f"--{recipe['phi']}-weights={folder}/phi.pth"]
        args = train.parse_args([*files, *flags, "--loss", loss])
        if args.ada_p is None:
            args.ada_p = 0.5
        run = train.build_run(args, device)
    images, mask_noise = random_batch(args)
    progress, eq3_on = train.new_progress(), recipe["phi"] is not None
    train.set_rate(run.opt_g, args.lr)
    places = math.lcm(
        args.path_every if recipe["path"] and args.path_weight else 1,
        args.r1_every if recipe["adversary"] and args.r1_gamma else 1,
    )

    def step(number, place):
        progress["step"] = place
        batch = (images, mask_noise, torch.arange(len(images)) + len(images) * number)
        train.step_gradients(run, [batch] * args.accum, eq3_on, progress, args)
        train.update(run, apply=True)

    seconds = time_steps(step, count, places, device)
    sizes = dict(parameters_g=parameters(run.mae), parameters_d=parameters(run.disc))
    report(run, seconds, args, loss=loss, **sizes)


def time_sibling(loss, flags, count, device):
    """A row of extras/siblings.py: its step."""
    from extras import siblings

    with tempfile.TemporaryDirectory() as folder:
        stand_in = f"{folder}/teacher.pth"
        own = [f"--teacher={stand_in}"] if loss == "feature_mae" else []
        args = siblings.parse_args([*own, *flags, "--loss", loss])
        teacher = model.build_mae(args.model, args.image_size, args.patch_size).state_dict()
        torch.save(teacher, stand_in)
        run = siblings.build_run(args, device)
    run.epoch = 1  # says how much a teacher moves
    batch = random_batch(args, siblings.SIBLINGS[loss]["views"])
    seconds = time_tuning(run, batch, count, args)
    report(run, seconds, args, loss=loss, parameters_g=parameters(run.network), parameters_d=0)


def all_rows():
    """Names of the rows of train.py and of extras/siblings.py."""
    from extras import siblings

    return *losses.LOSSES, *siblings.SIBLINGS


def time_all(argv):
    """Table 4: a process for each row -> exit status.

    Its 113 M and 119 M parameters are about those of G alone, without D. Our G: 111.7 M (`mse`) and
    115.5 M with skips and scales (the authors' heads of small scales are larger).
    """
    say("loss             relative time  seconds/step  images/s  peak MiB  parameters G, D")
    base = None
    for loss in all_rows():
        command = [sys.executable, "-m", "extras.benchmark", *argv, "--loss", loss]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        row = json.loads(done.stdout.splitlines()[-1])
        seconds = row["seconds_per_step"]
        base = base or seconds
        sizes = " ".join(f"{row[f'parameters_{n}'] / 1e6:7.1f} M" for n in "gd")
        speed = f"{row['images_per_second']:8.2f}  {row['peak_memory_mib']:8}"
        say(f"{loss:15}  {seconds / base:13.2f}  {seconds:12.3f}  {speed}  {sizes}")
    return 0


# ---- Training of one network ---------------------------------------------------------------------

CLASSES = {"linear": 1000, "finetune": 1000, "detect": 80, "segment": 150}  # as the paper's data


def time_task(task, flags, count, device):
    """A step of --task, of as many classes as the paper's data set has."""
    flags = ["--checkpoint", "none", *flags]
    if task in finetune.TASKS:
        args = finetune.parse_args([*flags, "--task", task])
    elif task == "detect":
        from extras import detect as script

        args = script.parse_args(flags)
    else:
        from extras import segment as script

        args = script.parse_args(flags)
    weights, args = finetune.open_checkpoint(args)
    args.classes = [str(number) for number in range(CLASSES[task])]
    if task in finetune.TASKS:
        run = finetune.build_classifier_run(args, weights, device)
        batch = random_batch(args)[0], torch.arange(args.batch_size) % CLASSES[task]
    else:
        run, batch = script.build_run(args, weights, device), script.random_batch(args)
    seconds = time_tuning(run, batch, count, args)
    of_all = sum(p.numel() for p in run.network.parameters())
    trained = parameters(run.network)
    report(run, seconds, args, task=task, parameters=of_all, parameters_trained=trained)


def time_tuning(run, batch, count, args):
    """`time_steps` of a run of `finetune.train_network`."""
    run.network.train()
    train.set_rate(run.opt, args.lr)

    def step(number, place):
        progress = train.new_progress() | {"step": number}
        finetune.step_gradients(run, [batch] * args.accum, progress, args)
        finetune.update(run, apply=True)

    return time_steps(step, count, 1, run.device)


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    """Command line -> (namespace, flags of what is timed)."""
    parser = argparse.ArgumentParser(
        description="Time training steps on random images.",
        usage="python -m extras.benchmark --loss ROW|all|--task TASK [--steps N] [flags of "
        "train.py, finetune.py or the script in extras/ that is timed]",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--loss", choices=("all", *all_rows()), help="a row; all: Table 4")
    what.add_argument("--task", choices=CLASSES, help="training of one network")
    parser.add_argument("--steps", type=train.COUNT, default=10, help="to time; default: 10")
    args, flags = parser.parse_known_args(argv)
    if args.loss == "all" and "RANK" in os.environ:
        fail("--loss all starts a process for each row: name one row, or leave torchrun off")
    if args.loss == "all":
        refuse_flags_of_some_rows(flags)
    return args, flags


def refuse_flags_of_some_rows(flags):
    """Status 2, before anything is timed, for a flag that only train.py or siblings.py has."""
    from extras import siblings

    for script, rows in ((train, losses.LOSSES), (siblings, siblings.SIBLINGS)):
        for loss in [row for row in all_rows() if row in rows][:1]:
            unknown = script.build_parser().parse_known_args([*flags, "--loss", loss])[1]
            if unknown:
                fail(f"{loss} has no {unknown[0]}: time rows that have it one by one, --loss ROW")


def main(argv=None):
    args, flags = parse_args(argv)
    if args.loss == "all":
        return time_all(sys.argv[1:] if argv is None else argv)
    device = train.start_processes()
    if args.task:
        time_task(args.task, flags, args.steps, device)
    elif args.loss in losses.LOSSES:
        time_row(args.loss, flags, args.steps, device)
    else:
        time_sibling(args.loss, flags, args.steps, device)
    train.stop_processes()
    return 0


if __name__ == "__main__":
    train.run_script(main)
