"""Pre-train a (Perceptual) masked autoencoder.

    python train.py --demo                                      # 3 to 5 minutes on two CPU cores
    python train.py --loss mse --data path/to/imagenet          # one GPU
    torchrun --nproc_per_node=8 train.py --loss msg_gan_p       # one node, data/imagenet

The method comes first: what one step computes (paper: eq. 1 to 7, with the schedule of sec. 4), the
update of both players, and the loop over epochs. It ends at the banner "What keeps a run alive";
below stand processes and precision, construction, data, checkpoints, validation and command line.
The losses are in losses.py, the networks in model.py, the images in data.py; finetune.py says what
the encoder is worth.

Writes to OUT: checkpoint.pt, pictures/, log.jsonl (a JSON object per epoch), steps.jsonl (about one
per minute) and arguments.jsonl (one per start: what ran). Run the same command again after any
interruption and it continues where the checkpoint was saved (--demo starts anew).
"""

import argparse
import atexit
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import losses
import model
from losses import LOSSES

# ---- What one batch adds to the gradients: eq. 1 to 7 --------------------------------------------


def backward(run, images, mask_noise, seeds, *, eq3_on, share, args):
    """Add the gradients of one batch to G's and D's parameters -> {name: detached scalar}.

    G, the autoencoder, and D, the discriminator, minimise

        L^G = ||G(I_m) - I||_1 + L_feat^G + L_adv^G     PAPER: eq. 6; without the last term, eq. 7
        L^D = 1/2 [(D(I) - 1)^2 + D(G(I_m))^2]          DIFFERS: eq. 4 halves the first alone

    with a weight before each term. `LOSSES` says which of them a row has, and what stands for the
    first: in `mse` the hidden patches' squared error, in `ms_ssim` eq. 2.

    run: networks, optimisers, scalers, ADA (see `build_run`). args: the command line.
    images: I, (B, 3, H, W) in [0, 1]. mask_noise: (B, N); the patches with the largest noise are
    hidden, which gives I_m. seeds: (B,), one per sample, for ADA. eq3_on: is L_feat^G applied in
    this epoch? share: 1 / (number of batches in a step). Returns each term, already weighted, and
    D's accuracies.
    """
    recipe, terms = LOSSES[args.loss], {}

    # G(I_m) at every scale that a row looks at, finest first, and I at the same sizes.
    with run.autocast():
        outputs, mask = run.mae(images, args.mask_ratio, mask_noise)  # [(B, 3, h, w)], (B, N)
    reals = losses.pyramid(images, len(outputs))

    # The pixel term compares them directly. PAPER: eq. 1, 2.
    scales = 1 if args.pixel_scales == "finest" else len(outputs)
    pixel = args.pixel_weight * losses.pixel_loss(
        recipe["pixel"],
        outputs[:scales],
        reals[:scales],
        mask,
        patch_size=args.patch_size,
        norm_pix=args.norm_pix_loss,
        alpha=args.alpha,
    )

    # All other terms look at the reconstructions through another network. They look at detached
    # copies, so that D's own loss cannot reach G. The terms' gradient at the copies is passed on to
    # G by hand, below. PAPER SILENT: are the true visible patches pasted in? Here not, as in eq. 1.
    fakes = [x.detach().requires_grad_() for x in outputs]
    if run.disc is not None:
        # PAPER: sec. 3.2, ADA "is also applied to all samples", of rows that have it.
        seen_real, seen_fake = augment(run, seeds, args, reals, fakes)
        with run.autocast():
            logits_real, phi_real = run.disc(seen_real)  # (B,), [(B, C_j, h_j, w_j)]
            logits_fake, phi_fake = run.disc(seen_fake)
        # PAPER: eq. 5.
        terms["adversarial"] = args.adversarial_weight * losses.lsgan_g_loss(logits_fake)
    elif run.loss_network is not None:
        # PAPER: eq. 7. PAPER SILENT: of several scales, phi sees the finest alone.
        with run.autocast():
            phi_fake = run.loss_network(fakes)
            with torch.no_grad():
                phi_real = run.loss_network(reals)
    if eq3_on:
        # PAPER: eq. 3. In eq. 6 phi is D itself: the features that it learns in order to tell
        # images from reconstructions are those which G has to match.
        terms |= losses.perceptual_terms(phi_fake, phi_real, args.delta_f, args.delta_s)

    # Eq. 6 is pixel + sum(terms). Its gradient is taken in two stages. First that of sum(terms) at
    # the images, through D or phi, whose own gradients it leaves alone. Then both parts' together,
    # in one pass through the MAE.
    image_grads = [torch.zeros_like(x) for x in fakes]  # DDP wants every output to have a gradient
    if terms:
        second_part = run.scaler_g.scale(sum(terms.values()) * share)
        image_grads = torch.autograd.grad(
            second_part,
            fakes,
            retain_graph=run.disc is not None,  # D's own loss goes back through it, below
            materialize_grads=True,  # zeros for scales that a single-scale D does not look at
        )
    first_part = run.scaler_g.scale(pixel * share)
    torch.autograd.backward([first_part, *outputs], [None, *image_grads])
    terms["pixel"] = pixel

    # D's gradient: from eq. 4 to its parameters, and no further.
    # PAPER SILENT: how many updates D makes per update of G, and in which order; phi's weights. D
    # and G make one update each per step. Both gradients are taken at the same weights, so that one
    # forward pass of D serves eq. 3, 4 and 5: eq. 3 compares two sets of features of the current D.
    # (The authors take a copy, refreshed every five epochs; with MSG-GAN's D, eq. 3 has no gradient
    # there.)
    if run.disc is not None:
        terms["discriminator"] = losses.lsgan_d_loss(logits_real, logits_fake)
        loss_d = run.scaler_d.scale(terms["discriminator"] * share)
        loss_d.backward(inputs=list(run.disc.parameters()))
        terms["d_accuracy_real"] = (logits_real > 0.5).float().mean()
        terms["d_accuracy_fake"] = (logits_fake < 0.5).float().mean()
    return {name: value.detach() for name, value in terms.items()}


def augment(run, seeds, args, *pyramids):
    """ADA on image pyramids, if the row has it -> list of as many.

    PAPER SILENT: "applied to all samples" leaves the pairing open. An image and its reconstruction,
    at all scales, share one draw, so that eq. 3 compares like with like.
    """
    if run.ada is None:
        return list(pyramids)
    transform = run.ada.sample(seeds, args.image_size)
    return [run.ada(images, *transform) for images in pyramids]


# ---- Lazy regularisers (sec. 3.2, StyleGANv2-ADA) ------------------------------------------------


def regularise(run, images, mask_noise, seeds, share, progress, args):
    """Add the lazy regularisers' gradients, in the steps whose turn it is -> {name: scalar}.

    Each runs in every n-th step only, with n times its weight (lazy regularisation, StyleGAN2): the
    same on average, at a fraction of the cost. The scalars contain the n, so that their mean over
    an epoch is the weighted term's.

    They use the bare networks: compiled graphs have no second derivative, and DDP expects one
    backward pass. They run before `backward`. Its exchange between processes averages both
    gradients.

    A run in bf16 computes them in bf16. That changes R1's gradient by 2 to 4 % and path lengths' by
    4 to 9 %; another batch of 32 changes them by 30 to 40 % and 90 to 160 %. A run in fp16 computes
    them in float32, since the small numbers of second derivatives vanish in fp16.
    """
    path, step, terms = LOSSES[args.loss]["path"], progress["step"], {}
    with run.autocast() if run.dtype == torch.bfloat16 else nullcontext():
        if path and args.path_weight and step % args.path_every == 0:
            batch = images, mask_noise, seeds
            terms["path_length"] = regularise_path(run, *batch, share, progress, args)
        if run.disc is not None and args.r1_gamma and step % args.r1_every == 0:
            terms["r1"] = regularise_r1(run, images, seeds, share, args)
    return terms


def regularise_path(run, images, mask_noise, seeds, share, progress, args):
    """Path-length regularisation of G; moves its running mean in `progress` -> detached penalty.

    PAPER: sec. 3.2, "perceptual path regularisation between the decoder input and discriminator
    feature maps". PAPER SILENT: of MSG-MAE's inputs, the skips are left out (sec. 2.3 speaks of
    "the input to the decoder", and a decoder without skips then has the same regulariser); half of
    the batch and every 4 steps, as StyleGAN2, since a backward pass through a backward pass costs
    much; D sees the reconstruction augmented, as everything it sees; the penalty reaches G alone.
    PAPER SILENT: the weight. StyleGAN2's 2 belongs to another unit, see `path_length_penalty`. Ours
    is the largest that did not lower the probes. In runs of 30,000 images the linear probe moves by
    -.2 +- .4 points against weight 0, k-NN by -.1 +- .2 (three seeds). Lengths vary 7 % less from
    image to image. The term is 1/500 of G's loss. At .02, 1/100, both probes lose 1.3 points. (With
    --adversarial-weight .1 --d-lr 2.5e-3; not measured again with the present ones.)
    """
    mae, disc = unwrap(run.mae), unwrap(run.disc)
    images, mask_noise, seeds = (x[: (len(x) + 1) // 2] for x in (images, mask_noise, seeds))
    ids_keep, ids_restore, _ = model.random_masking(mask_noise, args.mask_ratio)
    inputs = mae.decoder_inputs(images, ids_keep, ids_restore)  # [(B, 1 + N, d), then the skips]
    # From `inputs` on, everything is differentiated twice. Fused attention has no second
    # derivative, so the plain kernel is used here. The encoder lies before: once is enough.
    with sdpa_kernel(SDPBackend.MATH):
        outputs = mae.decode(inputs)  # [(B, 3, h, w)]

    # The chain rule in two stages, at copies of the images. Between two kinks of its leaky ReLUs D
    # is linear in what it sees, and so is ADA: how fast features move with the images, `slopes`,
    # is constant there, and needs no second derivative.
    fakes = [x.detach().requires_grad_() for x in outputs]
    (seen,) = augment(run, seeds, args, fakes)
    _, features = disc.forward(seen)  # .forward is never the compiled one
    probes = zip(*(feature_probe(seed, features) for seed in seeds.tolist()), strict=True)
    slopes = losses.feature_slopes(features, fakes, [torch.stack(p) for p in probes])
    lengths = losses.path_lengths(outputs, inputs[0], slopes)  # (B,)

    # Running mean: it moves by 1 % a batch, starting at the first value, and before the penalty
    # uses it, as in StyleGAN2. It stays on the device: reading it would make the step wait for it.
    now, before = mean_over_processes(lengths.detach().mean()), progress["path_mean"].to(lengths)
    moved = torch.where(before > 0, before.lerp(now, 0.01), now)
    # A length that is not finite is left out, or it would stay in the running mean for ever.
    progress["path_mean"] = torch.where(now.isfinite(), moved, before)

    penalty = losses.path_length_penalty(lengths, progress["path_mean"])
    penalty = args.path_weight * args.path_every * penalty
    scaled = run.scaler_g.scale(penalty * share)
    scaled.backward(inputs=[p for p in mae.parameters() if p.requires_grad])
    return penalty.detach()


def feature_probe(seed, features):
    """One sample's N(0, 1) direction in D's feature maps, a function of its seed: [(C, h, w)]."""
    device = features[0].device
    generator = torch.Generator(device).manual_seed(seed + 1)  # + 1: mask and crop use seed
    return [torch.randn(f.shape[1:], generator=generator, device=device) for f in features]


def regularise_r1(run, images, seeds, share, args):
    """R1 on D's real images -> detached penalty.

    PAPER SILENT: whether "all modifications made to the discriminator" include R1; off by default.
    x of R1 is the real image before augmentation, one leaf for each scale that D looks at.
    """
    scales = 1 if LOSSES[args.loss]["adversary"] == "conv" else image_scales(args)
    reals = [x.detach().requires_grad_() for x in losses.pyramid(images, scales)]
    (seen,) = augment(run, seeds, args, reals)
    logits, _ = unwrap(run.disc).forward(seen)
    penalty = args.r1_gamma / 2 * args.r1_every * losses.r1_penalty(logits, reals)
    run.scaler_d.scale(penalty * share).backward(inputs=list(run.disc.parameters()))
    return penalty.detach()


# ---- One step: gradients, then the update --------------------------------------------------------


def step_gradients(run, batches, eq3_on, progress, args):
    """Accumulate the mean gradient of a step's batches -> {name: mean of the term over them}."""
    # A batch's last item, the images that could not be read, is for `agree`.
    totals, share = {}, 1 / len(batches)
    for number, (images, mask_noise, seeds, *_) in enumerate(batches, start=1):
        images = data.to_float(images.to(run.device, non_blocking=True))  # (B, 3, H, W) in [0, 1]
        batch = images, mask_noise.to(run.device, non_blocking=True), seeds
        terms = {}
        if LOSSES[args.loss]["path"] or args.r1_gamma:
            terms = regularise(run, *batch, share, progress, args)
        # Processes exchange gradients during the last backward pass of a step alone.
        with exchange(number == len(batches), run.mae, run.disc):
            terms |= backward(run, *batch, eq3_on=eq3_on, share=share, args=args)
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value * share
    return totals


def update(run, apply):
    """Step both optimisers if `apply`, then clear the gradients. Scalers skip fp16 overflows."""
    for optimizer, scaler in ((run.opt_g, run.scaler_g), (run.opt_d, run.scaler_d)):
        if optimizer is None:
            continue
        if apply:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)


# ---- The loop over epochs (sec. 4, "Pre-training") -----------------------------------------------


def learning_rate(position, warmup, total, peak):
    """Linear warm-up, then cosine to 0. position, warmup, total: in steps. PAPER: sec. 4.

    DIFFERS: the paper writes "weight decay is 0.05 (cosine strategy)". The cosine is taken for the
    learning rate's, as in MAE and in the supplement's Table 1; the decay is constant.
    """
    if position < warmup:
        return peak * min(1, (position + 1) / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (position - warmup) / max(1, total - warmup)))


def eq3_is_on(epoch, args):
    """Is the perceptual term, eq. 3, applied in this epoch? PAPER: sec. 4, "only on even numbered
    epochs", "to give time for the discriminator to learn new features".

    PAPER SILENT: the first epoch's number, and what "the perceptual loss term L^G" includes: of all
    of L^G, G would learn nothing in odd epochs. Here epochs count from 1. D learns in every epoch,
    and all other terms are always on: eq. 2, eq. 5, and eq. 7, whose phi needs no time to learn.
    """
    phi = LOSSES[args.loss]["phi"]
    return phi in model.PUBLISHED or (phi == "disc" and epoch % args.feature_every == 0)


def pretrain(args, device):
    """Train the row that args name, from its checkpoint if there is one.

    Returns the signal that stopped it, 0 = none. `progress` is where the run stands: epoch, steps,
    sums for the log (see `new_progress`).
    """
    run = build_run(args, device)  # networks, optimisers, scalers, ADA
    if args.init:
        initialise(run, args)
    train_set, val_set = build_data(args)
    validation_part = read_validation_part(val_set, rank(), world_size())  # measured each epoch
    progress, sampler, loader = open_run(run, train_set, args)
    if nothing_left := finished(progress, args):
        say(nothing_left)
        return 0
    stop, stopping = catch_stop_signals(), False

    while progress["epoch"] <= args.epochs and not stopping:
        epoch = progress["epoch"]
        eq3_on = eq3_is_on(epoch, args)
        sampler.epoch, sampler.start = epoch, progress["epoch_step"]  # resumes in mid-epoch
        bar, stream, clock = progress_bar(sampler, args), iter(loader), time.perf_counter()

        while batches := list(itertools.islice(stream, args.accum)):  # one step
            # 1. Learning rates of both players. PAPER SILENT: D's schedule. G's, with its own peak.
            position = (epoch - 1) * sampler.steps + progress["epoch_step"]
            warmup, total = args.warmup_epochs * sampler.steps, args.epochs * sampler.steps
            lr = learning_rate(position, warmup, total, args.lr)
            set_rate(run.opt_g, lr)
            if run.disc is not None:
                set_rate(run.opt_d, learning_rate(position, warmup, total, args.d_lr))

            # 2. Gradients of G and D, averaged over batches and processes.
            terms = step_gradients(run, batches, eq3_on, progress, args)

            # 3. Share the terms, unreadable images and stop signals, so that all processes decide
            # alike; the only place of a step where the CPU waits for the GPU.
            means, stopping = agree(run, terms, batches, stop["signal"], progress, train_set)

            # 4. Update both players, or neither if a loss is not finite (in fp16, a scaler may
            # skip one of them by itself); then ADA's p, from how often D was right.
            finite = all(math.isfinite(value) for value in means.values())
            update(run, apply=finite)
            if run.ada is not None and finite:
                run.ada.update(means["d_accuracy_real"], images_per_step(args))

            # 5. Count the step, and save where it is time for it.
            clock = book_step(progress, means, finite, lr, clock, bar, args)
            stopping = stopping or progress["step"] == args.steps
            ended = progress["epoch_step"] == sampler.steps
            due = save_is_due(progress, stopping, args)
            if due and not ended:  # else after the epoch's measurements
                save_checkpoint(Path(args.out) / "checkpoint.pt", run, progress, args)
            if stopping:
                break

        bar.close()
        if ended:
            finish_epoch(run, progress, lr, validation_part, args)  # measures, logs, draws
            if due or epoch % args.save_every == 0 or epoch == args.epochs:
                save_checkpoint(Path(args.out) / "checkpoint.pt", run, progress, args)
    if stopping and not ended:
        draw_samples("stopped", run, validation_part, args)
    say(ending(progress, args))
    return stopped_by(stop, progress, args)


# ==================================================================================================
# What keeps a run alive. The method ends here.
# ==================================================================================================

# ---- Ending, saying ------------------------------------------------------------------------------


def fail(message, everywhere=False):
    """End with one clear line on standard error, exit status 2.

    Under torchrun one process per node prints it; with everywhere=True any that comes here.
    """
    if everywhere or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextmanager
def refusals():
    """A ValueError or OSError in the body, which says what is wrong, ends the run in one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))


@contextmanager
def writing(path):
    """An OSError while `path` is written, a full disk above all, ends the run in one line."""
    try:
        yield
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}")


def rank():
    """Number of this process, from 0, as torchrun gives it."""
    return int(os.environ.get("RANK", 0))


def is_main():
    """Is this the one process that writes?"""
    return rank() == 0


def say(message, file=None):
    """Print a line above the progress bar, from one process of all; file: None = stdout."""
    if is_main():
        with suppress(BrokenPipeError):  # Ctrl-C has ended the `tee` that reads it, too
            tqdm.write(message, file)


def catch_stop_signals():
    """Turn SIGTERM and SIGINT into a note, so that the loop can save and then exit.

    Returns a dict whose "signal" becomes the first one's number. Later ones change nothing: a
    launcher and a batch system may both send one, while the checkpoint is being written.
    """
    stop = {"signal": 0}

    def note(number, frame):
        first, stop["signal"] = not stop["signal"], stop["signal"] or number
        if first and is_main():
            with suppress(BrokenPipeError):
                os.write(2, b"\nsaving after this step; kill -9 ends at once\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return stop


# ---- Processes -----------------------------------------------------------------------------------


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes():
    """Join the process group that torchrun's environment describes -> this process's device.

    Without those variables: one process, on the GPU if there is one.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and "RANK" not in os.environ:
        fail(
            f"srun started this script {tasks} times, as {tasks} runs of their own: start one task "
            "per node, with torchrun in it: srun --ntasks-per-node=1 torchrun --nproc_per_node=8 "
            f"{Path(sys.argv[0]).name} ... (README, Your own data)"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        check_gpu(device)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # sizes never change: let cuDNN choose by trying
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    return device


def stop_processes():
    """Leave the process group, if there is one.

    gloo's threads may still hold the tensor that was exchanged last, and need Python's lock to free
    it; the group, as it ends, keeps the lock and waits for them for ever (seen on torch 2.6). A
    moment's sleep lets them have it first.
    """
    if dist.is_initialized():
        time.sleep(0.2)
        dist.destroy_process_group()


def check_gpu(device):
    """Is there a GPU for each process of this node, which the installed torch can run on?"""
    count, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if wanted > count:
        fail(f"{wanted} processes for {count} GPUs: lower --nproc_per_node to {count}")
    architectures = torch.cuda.get_arch_list()
    if not gpu_is_supported(torch.cuda.get_device_capability(device), architectures):
        fail(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} "
            f"(it has {', '.join(architectures)}); see V100 in README.md"
        )


def gpu_is_supported(capability, architectures):
    """Can a torch built for `architectures` ("sm_80", "compute_90") run on a (major, minor) GPU?

    Machine code (sm) runs on later minors of its major; PTX (compute) on anything later. What has
    other names, AMD's gfx90a for instance, is left to torch.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        if kind not in ("sm", "compute"):
            return True
        number = int("".join(c for c in number if c.isdigit()))  # "90a" -> 90
        built = (number // 10, number % 10)
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if kind == "compute" and built <= tuple(capability):
            return True
    return False


def wrap(module, device):
    """DistributedDataParallel when there are several processes. Buffers are the same on all."""
    if not dist.is_initialized():
        return module
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # Newer torch renames broadcast_buffers; the old name serves all versions we support.
        return DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def unwrap(module):
    """The network inside a DistributedDataParallel, or the network itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@contextmanager
def exchange(now, *networks):
    """Backward passes in the body exchange gradients between processes only if `now`."""
    with ExitStack() as stack:
        for network in networks:
            if not now and isinstance(network, DistributedDataParallel):
                stack.enter_context(network.no_sync())
        yield


def mean_over_processes(tensor):
    """Mean of a tensor over all processes, on its device, without waiting for it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor / world_size()


def of_all_processes(thing):
    """Every process's `thing`, as a list by their ranks, on every process; it is pickled."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def gathered_on_main(thing):
    """Every process's `thing`, as a list by their ranks, on the main process; None on others."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * world_size() if is_main() else None
    dist.gather_object(thing, things)
    return things


def sum_over_processes(values, device):
    """Sum each number of a dict over all processes, in one collective and one GPU sync.

    values: {name: scalar tensor or number}. Returns {name: float}, the same on every process.
    """
    vector = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=device) for v in values.values()]
    )
    if dist.is_initialized():
        dist.all_reduce(vector)
    return dict(zip(values, vector.tolist(), strict=True))


@contextmanager
def first_of_a_node_first():
    """The body runs on one process of each node, then on the others."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and first:
            dist.barrier()


# ---- Precision -----------------------------------------------------------------------------------


def choose_precision(amp, device):
    """`--amp` -> autocast dtype, None = float32. auto: bf16 or else fp16 on a GPU, off on CPU."""
    if amp == "fp16" and device.type == "cpu":
        fail("--amp fp16 needs a GPU; use --amp off here")
    if amp == "off" or (amp == "auto" and device.type == "cpu"):
        return None
    if amp == "auto":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[amp]


def scaler(device, dtype):
    """A gradient scaler, which passes losses through unless precision is fp16."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


# ---- Networks and optimisers ---------------------------------------------------------------------

# PAPER SILENT: D's Adam, (learning rate, betas) by kind of D: rate and first beta as LS-GANs
# commonly have them, StyleGAN's second; for "stylegan2" StyleGAN2-ADA's betas, but not its rate,
# 2.5e-3. With that, and the paper's weight of eq. 5, D wins at once: after 30,000 CIFAR-10 images
# it is right on .85 of the real ones and .94 of the reconstructions, and the linear probe (37 %) is
# below random weights' (44). With 1e-4 D is right on .3 and .5, a little behind G, and the probe is
# at 48.9. The rate is fixed: with G's at 3e-4 instead of 1e-3, D's 1e-4 keeps that balance, and
# 3e-5 loses it (.14 and .3). (--d-lr, --d-betas)
D_ADAM = {
    "conv": (2e-4, (0.5, 0.99)),
    "msg": (2e-4, (0.5, 0.99)),
    "stylegan2": (1e-4, (0.0, 0.99)),
}
# Flags that only some rows look at: a row's part (see `LOSSES`), its values there, the flags.
USED_WITH = (
    ("pixel", ("ms_ssim_l1",), ("alpha",)),
    ("adversary", tuple(D_ADAM), ("adversarial_weight", "d_lr", "d_betas", "r1_gamma", "r1_every")),
    ("phi", ("disc", *model.PUBLISHED), ("delta_f", "delta_s")),
    ("phi", ("disc",), ("feature_every",)),
    ("phi", ("dvae",), ("dvae_weights",)),
    ("phi", ("vgg",), ("vgg_weights",)),
    ("ada", (True,), ("ada_p", "ada_target", "ada_images")),
    ("path", (True,), ("path_weight", "path_every")),
)
# A checkpoint continues only under the same values of these.
MUST_FIT = (
    *("loss", "model", "arch", "image_size", "patch_size", "norm_pix_loss"),
    *("d_channels", "d_max", "seed", "data", "limit_images"),
)


def build_run(args, device):
    """What trains: G and D with an optimiser and a gradient scaler each, device and precision.

    -> namespace of device, dtype (None = float32), autocast (a function -> its context), mae,
    opt_g, scaler_g, disc, opt_d, scaler_d, ada, loss_network (the frozen phi of dvae_p and vgg_p);
    None where a row has none. parts: those of them that a checkpoint holds, by name.
    script: who wrote a checkpoint; must_fit: arguments that must be equal. Both are checked on
    resuming.
    """
    recipe, dtype = LOSSES[args.loss], choose_precision(args.amp, device)
    run = SimpleNamespace(device=device, dtype=dtype, script="train.py", must_fit=MUST_FIT)
    run.autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    torch.manual_seed(args.seed)  # the same initial weights on every process
    disc = None
    with refusals():  # sizes that do not fit each other
        mae = build_autoencoder(args)
        if recipe["adversary"]:
            sizes = (args.image_size, image_scales(args), args.d_channels, args.d_max)
            disc = model.build_discriminator(recipe["adversary"], *sizes)

    mae = compiled(mae.to(device), args)
    groups = parameter_groups(mae.parameters(), args.weight_decay)
    run.opt_g = torch.optim.AdamW(groups, betas=tuple(args.betas), fused=True)
    run.mae, run.scaler_g = wrap(mae, device), scaler(device, dtype)
    run.parts = {"mae": mae, "opt_g": run.opt_g, "scaler_g": run.scaler_g}

    run.disc = run.opt_d = run.scaler_d = run.ada = None
    if recipe["adversary"]:
        disc = compiled(disc.to(device), args)
        if device.type == "cuda" or recipe["adversary"] == "conv":
            # Tensor cores want it; on a CPU it speeds "conv" up and slows the others down.
            disc = disc.to(memory_format=torch.channels_last)
        # PAPER SILENT: D's optimiser. Adam with GAN betas and no decay (the authors' code:
        # G's rate and betas; only G's rate falls).
        run.opt_d = torch.optim.Adam(disc.parameters(), betas=tuple(args.d_betas), fused=True)
        run.disc, run.scaler_d = wrap(disc, device), scaler(device, dtype)
        run.parts |= {"disc": disc, "opt_d": run.opt_d, "scaler_d": run.scaler_d}
    if recipe["ada"]:
        run.ada = model.AdaAugment(
            target=args.ada_target, ramp_images=args.ada_images, fixed_p=args.ada_p
        )
        run.parts |= {"ada": run.ada}
    run.loss_network = open_loss_network(args, device)
    return run


def build_autoencoder(args):
    """G with random weights; ValueError if sizes do not fit each other."""
    sizes = (args.model, args.image_size, args.patch_size)
    return model.build_mae(*sizes, args.arch, image_scales(args))


def image_scales(args):
    """Scales of G: several for multi-scale losses and MSG-MAE, otherwise 1.

    PAPER SILENT: how many. Down to one pixel per patch: 5 for 16 px, of sides 224 to 14; the
    authors' code has 6, down to 7 px.
    """
    looks = args.arch == "msg_mae" or LOSSES[args.loss]["adversary"] in ("msg", "stylegan2")
    return args.patch_size.bit_length() if looks else 1


def open_loss_network(args, device):
    """The frozen phi of dvae_p or vgg_p, with its published weights; None for other rows."""
    kind = LOSSES[args.loss]["phi"]
    if kind not in model.PUBLISHED:
        return None
    with refusals(), first_of_a_node_first():  # it downloads what is to be downloaded
        return model.build_loss_network(kind, getattr(args, f"{kind}_weights")).to(device)


def initialise(run, args):
    """--init: start from an encoder, and a decoder if there is one; says what was taken."""
    kind = "a file of ViT-MAE weights"
    with refusals():
        content = model.load_file(args.init, kind)
        weights, notes = model.named_as_ours(content, args.init, kind)
        model.check_sizes(weights, args.init, args.model, args.patch_size)
        taken = model.load_autoencoder(unwrap(run.mae), weights, args.init)
    args.seen = [*seen_by(content), *args.seen]
    say(f"--init {args.init}: {'; '.join([*notes, 'took ' + taken])}")


def compiled(network, args):
    """--compile: torch.compile for what `network(x)` runs, in place, under the same names.

    `network.forward(x)` stays as it was: compiled graphs have no second derivative.
    """
    if args.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=next(network.parameters()).device))
        except Exception as error:  # a compiler or Triton is missing, or too old
            reason = (str(error) or type(error).__name__).splitlines()[0]
            fail(f"--compile cannot work here ({reason}); leave it off")
        network.compile()
    return network


def parameter_groups(parameters, weight_decay):
    """AdamW groups: matrices decay; norms, biases and tokens (one-dimensional) do not.

    PAPER SILENT: what decays (MAE's code: the tokens, too).
    """
    parameters = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.squeeze().ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.squeeze().ndim <= 1], "weight_decay": 0.0},
    ]


def set_rate(optimizer, lr):
    """Set an optimiser's learning rate, times its groups' own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)


# ---- Data ----------------------------------------------------------------------------------------


def images_per_step(args):
    """Images per optimiser step, over all processes."""
    return args.batch_size * args.accum * int(os.environ.get("WORLD_SIZE", 1))


def folder_of(data):
    """--data, one spelling for a folder: x, x/ and ./x are the same."""
    return os.path.realpath(data) if data and os.path.isdir(data) else data


def seen_by(content):
    """What the weights of a checkpoint have seen -> [[--data, --seed], ...], also before --init."""
    then = content.get("arguments")
    if not isinstance(then, dict):  # of another project
        return []
    if "seen" in then:
        return then["seen"]
    return [[folder_of(then["data"]), then["seed"]]] if {"data", "seed"} <= then.keys() else []


def open_data(args, image_size, labelled=False):
    """-> (training, validation) source of --data; one line and status 2 if that cannot be."""
    with refusals(), first_of_a_node_first():  # it downloads what is to be downloaded
        options = dict(image_size=image_size, seed=args.seed, labelled=labelled)
        sources = data.open_sources(args.data, **options)
    if note := getattr(sources[0], "note", ""):
        say(note)
    return sources


def check_held_out(source, args):
    """Were the images that are held out of a folder here held out of pre-training, too?"""
    here = folder_of(args.data)
    others = [seed for folder, seed in args.seen if folder == here and seed != args.seed]
    if others and getattr(source, "held_out", False):
        fail(
            f"training with --seed {others[0]} held out other images of {args.data}: give --seed "
            f"{others[0]}, or keep images for validation in {args.data}/val, others in train/"
        )


def build_data(args):
    """-> (training, validation) `PretrainSet`; one line and status 2 if that cannot be."""
    train_source, val_source = open_data(args, args.image_size)
    check_held_out(val_source, args)
    patches = (args.image_size // args.patch_size) ** 2
    common = dict(image_size=args.image_size, num_patches=patches, seed=args.seed)
    train_set = data.PretrainSet(
        train_source,
        crop_min=args.crop_min,
        flip=args.flip,
        jitter=args.jitter,
        limit=args.limit_images,
        epoch_images=args.epoch_images,
        **common,
    )
    check_one_step(train_set, args)
    return train_set, data.PretrainSet(val_source, augment=False, limit=args.val_images, **common)


def check_one_step(train_set, args):
    """Are there images for at least one step?"""
    if len(train_set) < images_per_step(args):
        fail(
            f"{len(train_set)} training images per epoch are fewer than the "
            f"{images_per_step(args)} of one step; lower --batch-size"
        )


# ---- Checkpoints ---------------------------------------------------------------------------------


LOCK_SECONDS = 600  # after which a lock of another host, if not renewed, is a dead run's


def lock_output(out):
    """Make OUT this run's alone, by OUT/lock.json; end if another run that lives has it.

    A run whose process is gone (kill -9) leaves its lock behind: the next one takes it over. On
    another host processes cannot be seen; there it must have been silent for LOCK_SECONDS.
    """
    path, mine = out / "lock.json", {"host": socket.gethostname(), "process": os.getpid()}
    if path.exists():
        theirs = read_lock(path)
        if theirs is not None and theirs != mine:  # None: torn by a full disk
            holder = f"process {theirs['process']} on {theirs['host']}"
            if theirs["host"] == mine["host"]:
                lives = process_lives(theirs["process"])
            else:
                lives = time.time() - path.stat().st_mtime < LOCK_SECONDS
            if lives:
                fail(
                    f"{out} is in use by {holder}: name another --out, or stop that run first; if "
                    f"that process is another program, delete {path}"
                )
            say(f"{out}: taken over from {holder}, which is gone")
        path.unlink(missing_ok=True)
    try:
        with open(path, "x") as file:  # of two runs that start at once, one can make it
            json.dump(mine, file)
    except FileExistsError:
        fail(f"{out} was taken by another run a moment ago: name another --out")

    def release():
        if read_lock(path) == mine:
            path.unlink()

    atexit.register(release)


def read_lock(path):
    """Who holds a lock -> {"host", "process"}, or None if there is none or it is torn."""
    try:
        lock = json.loads(path.read_text())
        return {name: lock[name] for name in ("host", "process")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def process_lives(number):
    """Is there a process of this number on this host?"""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def renew_lock(out):
    """Show other hosts that this run lives."""
    with suppress(OSError):
        os.utime(Path(out) / "lock.json")


def renewing(batches, out):
    """The batches of a measurement, which may take long: the lock on OUT is renewed with each."""
    for batch in batches:
        if is_main():
            renew_lock(out)
        yield batch


def new_progress():
    """Where a run stands: all that a checkpoint holds beside its parts and arguments.

    No generator's state is among it: whatever is drawn depends on seed, epoch and image, or step.
    """
    return {
        "epoch": 1,  # the epoch that is running
        "epoch_step": 0,  # steps done of it
        "step": 0,  # steps done since the start
        "sums": {},  # of each term over this epoch's counted steps
        "counted": 0,  # steps in `sums`; non-finite ones are not
        "nonfinite": 0,  # non-finite steps in a row, up to now
        "scales": {},  # fp16: of each scaler (scale, updates skipped in a row)
        "seconds": 0.0,  # spent training in this epoch
        "path_mean": torch.zeros(()),  # running mean of path lengths, 0 = none yet
        "bad_images": [],  # unreadable ones since the last start, distinct, over all processes
        "layout": {},  # see `open_run`
        "best": -1.0,  # highest top-1, AP or mIoU yet, per cent (finetune.py)
    }


def save_checkpoint(path, run, progress, args):
    """Write everything needed to continue. A kill at any instant leaves the last good file."""
    if not is_main():
        return
    for name, part in run.parts.items():
        weights = part.state_dict().values() if isinstance(part, torch.nn.Module) else []
        if not all(p.isfinite().all() for p in weights):
            fail(f"{name} has non-finite weights; {path} keeps the last good ones: lower --lr")
    checkpoint = {name: part.state_dict() for name, part in run.parts.items()}
    checkpoint |= {"progress": progress, "arguments": vars(args), "script": run.script}
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the second on a full disk
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason, free = str(error).splitlines()[0], 0
        with suppress(OSError):  # the folder itself is gone
            free = shutil.disk_usage(path.parent).free
        fail(
            f"cannot write {path} ({reason}): it takes {bytes_in(checkpoint) / 1e6:.0f} MB, "
            f"{free / 1e6:.0f} MB are free; the last good one is untouched"
        )


def bytes_in(value):
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value
    return sum(map(bytes_in, parts)) if isinstance(value, (dict, list, tuple)) else 0


def save_is_due(progress, stopping, args):
    """Is it time to save after this step? If the run is about to stop, and by --save-steps."""
    due = args.save_steps and progress["step"] % args.save_steps == 0
    return stopping or (due and not progress["nonfinite"])


def open_run(run, train_set, args):
    """Continue or begin a run, as --resume says -> (progress, sampler, loader)."""
    out = Path(args.out)
    # These must not change within an epoch, or the steps that are done would mean others.
    layout = {"images per step": images_per_step(args), "training images": len(train_set.indices)}
    layout["images per epoch"] = len(train_set)
    progress = resume(run, out / "checkpoint.pt", layout, args)
    steps = sum_over_processes({"all": progress["step"]}, run.device)["all"]
    if steps != world_size() * progress["step"]:
        fail(f"the nodes disagree on {out}/checkpoint.pt: put --out on a disk that they share")
    # Is it OUT's own run that goes on? Else what lies there is another's, and best.pt begins anew.
    own = Path(args.resume).resolve() == (out / "checkpoint.pt").resolve()
    own = own or (args.resume == "auto" and progress["step"] > 0)
    trains = not finished(progress, args)
    if trains and not own:
        progress["best"] = -1.0
    if is_main() and trains:
        open_output(out)
        if not own:
            keep_old_run(out)
        trim_logs(out, progress)
        write_arguments(out, run, args)
        size, count = args.image_size, f"{layout['training images']} training images"
        count += f" of {size} x {size} px, {images_per_step(args)} per step"
        if len(train_set) != layout["training images"]:
            count += f", {len(train_set)} per epoch"
        count += f", {len(train_set) // images_per_step(args)} steps per epoch"
        begins = f"from step {progress['step']}" if progress["step"] else "from the start"
        precision = run.dtype or torch.float32
        say(f"{begins}: {count}; {run.device}, {world_size()} process(es), {precision}")
        if run.device.type == "cuda" and "disc" in run.parts:
            say("the first step may take a minute: cuDNN tries its algorithms on each layer of D")
    sampler = data.EpochSampler(
        len(train_set),
        global_batch=images_per_step(args),
        seed=args.seed,
        rank=rank(),
        world=world_size(),
    )
    loader = data.build_loader(train_set, sampler, batch_size=args.batch_size, workers=args.workers)
    return progress, sampler, loader


def resume(run, path, layout, args):
    """Continue from a checkpoint if --resume says so and there is one -> progress."""
    if args.resume == "off" or (args.resume == "auto" and not os.path.exists(path)):
        return new_progress() | {"layout": layout}
    path = path if args.resume == "auto" else Path(args.resume)
    kind = f"a checkpoint of {run.script}"
    with refusals():
        checkpoint = model.load_file(path, kind)
    if not made_by(run.script, checkpoint, "progress"):
        found = f"holds {', '.join(map(str, checkpoint)) or 'nothing':.60}"
        if "script" in checkpoint:
            found = f"is one of {checkpoint['script']}"
        fail(f"{path} is not {kind} (it {found}); name another --out, or --resume off")
    then, now = checkpoint["arguments"], vars(args)
    if differ := changes(then, now, run.must_fit):  # the flags of networks first
        fail(f"{path} was trained with {differ}; give the same, or another --out, or --resume off")
    if missing := sorted(run.parts.keys() - checkpoint.keys()):
        fail(f"{path} lacks {', '.join(missing)}; name another --out, or --resume off")
    progress = checkpoint["progress"]
    for what, number in layout.items():
        before = progress["layout"].get(what, number)  # earlier versions kept fewer
        if progress["epoch_step"] and before != number:
            fail(
                f"{path} was saved within an epoch with {before} {what} (now {number}): keep that "
                "until the epoch's end"
            )
        if before != number:
            say(f"{path} was saved with {before} {what} (now {number})")
    for name, part in run.parts.items():
        if not checkpoint[name]:  # a disabled scaler's state is empty
            continue
        groups = getattr(part, "param_groups", [])
        kept = ("betas", "weight_decay", "lr_scale")
        flags = [{k: group[k] for k in kept if k in group} for group in groups]
        part.load_state_dict(checkpoint[name])
        for group, values in zip(getattr(part, "param_groups", []), flags, strict=True):
            group |= values  # what the flags say now, not then
    if others := changes(then, now, sorted(then.keys() - {"resume", "seen"})):
        say(f"{path} was trained with {others}")
    seen = seen_by(checkpoint)
    args.seen = [*seen, *(one for one in args.seen if one not in seen)]
    # Unreadable images are noted anew: they may have been repaired.
    return new_progress() | progress | {"layout": layout, "bad_images": []}


def changes(then, now, names):
    """Arguments among `names` that two commands have both, with other values -> a list in words."""
    then, now = ({**args, "data": folder_of(args.get("data"))} for args in (then, now))
    differ = [k for k in names if k in then and k in now and then[k] != now[k]]
    return ", ".join(
        f"--{k.replace('_', '-')} {then[k]!s:.60} (now {now[k]!s:.60})" for k in differ
    )


def made_by(script, checkpoint, *parts):
    """Did `script` write this checkpoint, with these parts?"""
    return checkpoint.get("script") == script and {"arguments", *parts} <= checkpoint.keys()


def finished(progress, args):
    """A line that says so if the run has all of its epochs or steps already, else ""."""
    run, other = args.resume, ""
    if args.resume in ("auto", "off"):
        run, other = args.out, ", or name another --out"
    if progress["epoch"] > args.epochs:
        return f"{run} has all its {args.epochs} epochs; raise --epochs{other}"
    if args.steps and progress["step"] >= args.steps:
        return f"{run} has its {args.steps} steps; raise --steps, or leave it off"
    return ""


def stopped_by(stop, progress, args):
    """The signal that ended a run before all of its epochs were done, or 0."""
    return stop["signal"] if progress["epoch"] <= args.epochs else 0


def ending(progress, args):
    """The last line of a run."""
    if progress["epoch"] > args.epochs:
        return f"done: results are in {args.out}"
    change = []
    if args.steps and progress["step"] >= args.steps:
        change.append("raise --steps or leave it off")
    if args.resume != "auto":
        change.append("add --resume auto")
    how = f"to continue, {' and '.join(change)}" if change else "the same command continues"
    return f"stopped at step {progress['step']}; {how}"


# ---- Steps and epochs: what is shared, counted and logged ----------------------------------------

MAX_NONFINITE = 10  # non-finite losses in a row before the run stops
MAX_SKIPPED = 30  # updates in a row that fp16 skipped, likewise
NOTE_SECONDS = 60  # between two lines on steps


def agree(run, terms, batches, signalled, progress, dataset):
    """Share what the processes saw in a step, so that all of them act alike.

    terms: {name: scalar} of this process. Returns ({name: mean over processes}, has any process
    been told to stop). In fp16 the means also hold the scalers' scales.
    """
    # What fp16's scalers multiply by; read here, where the CPU waits for the GPU anyway.
    one = torch.ones((), device=run.device)
    scalers = {k: v for k, v in run.parts.items() if k.startswith("scaler") and v.is_enabled()}
    terms = terms | {name.replace("scaler", "scale"): s.scale(one) for name, s in scalers.items()}
    bad = {index: reason for *_, found in batches for index, reason in found}
    bad = {index: reason for index, reason in bad.items() if index not in progress["bad_images"]}
    report = sum_over_processes({"stop": signalled, "bad": len(bad), **terms}, run.device)
    stopping, any_bad = report.pop("stop") > 0, report.pop("bad") > 0
    if any_bad:
        note_bad_images(bad, progress["bad_images"], dataset)
    return {name: total / world_size() for name, total in report.items()}, stopping


def note_bad_images(found, known, dataset, fate="replaced by another"):
    """Add every process's newly found unreadable images to `known`; name each; end if too many.

    found: {index: reason} of this process. known: list of indices. fate: what became of them.
    Call on all processes.
    """
    everyone = of_all_processes(found)
    for index, reason in {k: v for part in everyone for k, v in part.items()}.items():
        known.append(index)
        say(f"unreadable, {fate}: {dataset.name(index)} ({reason})", sys.stderr)
    if len(known) > dataset.bad_limit():
        fail(
            f"{len(known)} of {len(dataset.indices)} images are unreadable, a run allows "
            f"{dataset.bad_limit()}; repair or remove them, then continue"
        )


def progress_bar(sampler, args):
    """tqdm bar of one epoch, counting images; on the main process, and on a terminal alone."""
    return tqdm(
        desc=f"epoch {sampler.epoch}/{args.epochs}",
        initial=sampler.start * images_per_step(args),
        total=sampler.steps * images_per_step(args),
        unit="images",
        ncols=80,
        bar_format="{desc} {percentage:3.0f} %|{bar}| {rate_fmt}{postfix}",
        disable=None if is_main() else True,
    )


def book_step(progress, means, finite, lr, clock, bar, args):
    """Count a step, in `progress` and on the bar -> the time now, when the next one begins.

    means: {name: float}. finite: are they all, or was no update made? About once a minute the step
    is logged, too.
    """
    now = time.perf_counter()
    progress["step"] += 1
    progress["epoch_step"] += 1
    progress["seconds"] += now - clock
    progress["counted"] += finite
    progress["nonfinite"] = 0 if finite else progress["nonfinite"] + 1
    if finite:
        for name, value in means.items():
            progress["sums"][name] = progress["sums"].get(name, 0.0) + value
    left = time_left(progress, bar.total // images_per_step(args), args)
    bar.update(images_per_step(args))
    name = "pixel" if "pixel" in means else next(iter(means))
    bar.set_postfix_str(f"{name} {means[name]:.3g}, {left} left")
    if is_main() and now // NOTE_SECONDS != clock // NOTE_SECONDS:
        renew_lock(args.out)
        write_step(progress, means, lr, left, args)
    give_up_if_it_diverges(progress, means, finite, args)
    give_up_if_nothing_is_updated(progress, means, args)
    return now


def time_left(progress, steps, args):
    """Until training ends, by this epoch's speed, such as "3.4 h". steps: of an epoch."""
    total = min(steps * args.epochs, args.steps or math.inf)
    seconds = (total - progress["step"]) * progress["seconds"] / progress["epoch_step"]
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def write_step(progress, means, lr, left, args):
    """A step's values as a line of OUT/steps.jsonl, and of output that is no terminal."""
    speed = progress["epoch_step"] * images_per_step(args) / progress["seconds"]
    row = {"step": progress["step"], "epoch": progress["epoch"], **means, "lr": lr}
    row = rounded(row | {"images_per_second": speed, "left": left})
    with writing(Path(args.out) / "steps.jsonl"), open(Path(args.out) / "steps.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    if not sys.stdout.isatty():
        say(as_line(row))


def give_up_if_it_diverges(progress, means, finite, args):
    """Report a step whose loss is not finite; end the run after MAX_NONFINITE of them in a row."""
    if not finite:
        say(f"step {progress['step']}: the loss is not finite, update skipped: {means}")
    if progress["nonfinite"] == MAX_NONFINITE:
        fail(
            f"{MAX_NONFINITE} non-finite losses in a row; {args.out}/checkpoint.pt is untouched: "
            "lower the learning rates, or try --amp off"
        )


def give_up_if_nothing_is_updated(progress, means, args):
    """End the run if fp16 has skipped a player's updates MAX_SKIPPED times in a row.

    A scaler skips an update whose gradients overflow, and halves its scale; so a scale that keeps
    falling tells of updates that were not made.
    """
    for name in [k for k in means if k.split("_")[0] == "scale"]:
        last, skipped = progress["scales"].get(name, (means[name], 0))
        skipped = skipped + 1 if means[name] < last else 0
        progress["scales"][name] = (means[name], skipped)
        if skipped == MAX_SKIPPED:
            fail(
                f"fp16: {MAX_SKIPPED} updates in a row were skipped, since gradients overflow "
                f"({name} is down to {means[name]:.0e}); {args.out}/checkpoint.pt is untouched: "
                "try --amp off, or bf16 where the GPU has it"
            )


def open_output(out):
    """Make the folder of results, this run's alone."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock_output(out)


def trim_logs(out, progress):
    """Keep the logs' lines up to where `progress` stands."""
    with writing(out):
        for name, what, end in (
            ("log.jsonl", "epoch", progress["epoch"]),
            ("steps.jsonl", "step", progress["step"] + 1),
        ):
            log = out / name
            kept = [json.dumps(row) + "\n" for row in data.read_log(log) if row[what] < end]
            log.with_suffix(".tmp").write_text("".join(kept))
            os.replace(log.with_suffix(".tmp"), log)


def keep_old_run(out):
    """Rename the checkpoints and logs of another run in OUT.

    Nothing is overwritten: the next ones become old2, then old3.
    """
    names = ("best.pt", "log.jsonl", "steps.jsonl", "checkpoint.pt")
    found = [name for name in names if (out / name).exists() and (out / name).stat().st_size]
    for count in itertools.count(1):
        old = f".old{count}." if count > 1 else ".old."
        kept = [name.replace(".", old) for name in found]
        if not any((out / name).exists() for name in kept):
            break
    with writing(out):
        for name, new in zip(found, kept, strict=True):
            os.replace(out / name, out / new)
    if found:
        say(f"{out}: what this run does not continue is kept, as {', '.join(kept)}")


def write_arguments(out, run, args):
    """Add a line to OUT/arguments.jsonl: what was started, with what, of this code and torch."""
    git = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here
        commit = ""
    row = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "script": run.script, "commit": commit}
    row |= {"torch": torch.__version__, "device": str(run.device), "processes": world_size()}
    if run.device.type == "cuda":
        row["device"] = torch.cuda.get_device_name(run.device)
    with writing(out / "arguments.jsonl"), open(out / "arguments.jsonl", "a") as file:
        file.write(json.dumps(row | {"arguments": vars(args)}) + "\n")


def epoch_row(progress, lr, args):
    """What the log says of an epoch's training: mean of each term, speed, unreadable images."""
    row = {"epoch": progress["epoch"], "step": progress["step"], "lr": lr}
    row |= {k: total / max(1, progress["counted"]) for k, total in progress["sums"].items()}
    row["images_per_second"] = progress["epoch_step"] * images_per_step(args) / progress["seconds"]
    row["seconds"] = progress["seconds"]
    return row | {"bad_images": len(progress["bad_images"])}


def write_row(row, out=None):
    """Print a row of results, after adding it to OUT/log.jsonl if `out` is given.

    Printed are metrics of hidden patches alone; those of whole images are in the file.
    """
    row = rounded(row)
    if out is not None and is_main():
        with writing(Path(out) / "log.jsonl"), open(Path(out) / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
    say(as_line({k: v for k, v in row.items() if not k.endswith(losses.KINDS)}))


def rounded(row):
    """A row's numbers with six digits."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def as_line(row):
    """A row in words: name and value, four digits."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def next_epoch(progress):
    """Move `progress` on: what belongs to one epoch starts anew."""
    whole_run = ("step", "bad_images", "layout", "path_mean", "nonfinite", "scales", "best")
    kept = {name: progress[name] for name in whole_run}
    progress |= new_progress() | kept | {"epoch": progress["epoch"] + 1}


# ---- Validation and pictures ---------------------------------------------------------------------


def finish_epoch(run, progress, lr, validation_part, args):
    """Validate, log, draw, and move `progress` on to the next epoch."""
    epoch, last, row = progress["epoch"], args.epochs, epoch_row(progress, lr, args)
    row["eq3_on"] = eq3_is_on(epoch, args)
    images, mask_noise, bad_validation = validation_part
    row["bad_images"] += bad_validation
    if run.ada is not None:
        row["ada_p"] = run.ada.p
    if epoch % args.eval_every == 0 or epoch == last:
        row |= validate(run, images, mask_noise, args)
    if args.norm_pix_loss:
        row["psnr_uses_true_patch_statistics"] = True
    write_row(row, args.out)
    if epoch == last and row.get("psnr", 0) < row.get("psnr_mean_fill", 0):
        say(
            "Hidden patches were painted worse (psnr) than in the mean colour of the visible ones "
            f"(psnr_mean_fill): try more than {progress['step']} steps, or another --lr than "
            f"{args.lr:.2g}"
        )
    if picture_is_due(epoch, args):
        draw_samples(f"epoch_{epoch:04d}", run, validation_part, args)
    next_epoch(progress)


def picture_is_due(epoch, args):
    """Draw after this epoch? By --picture-every, or 1, 2, 5, 10, 20, 50, ...; and the last."""
    if epoch == args.epochs:
        return True
    if args.picture_every:
        return epoch % args.picture_every == 0
    return str(epoch).rstrip("0") in ("1", "2", "5")


def draw_samples(name, run, validation_part, args):
    """OUT/pictures/NAME.png, of the first validation images, and curves.png, of the log."""
    images, mask_noise, _ = validation_part
    picture = Path(args.out) / "pictures" / f"{name}.png"
    if is_main():
        with writing(picture):
            picture.parent.mkdir(exist_ok=True)
            whole = LOSSES[args.loss]["pixel"] != "mse"
            draw_reconstructions(picture, run, images[:8], mask_noise[:8], args, whole)
            data.draw_curves(picture.parent / "curves.png", Path(args.out) / "log.jsonl")


def read_validation_part(dataset, rank, world):
    """This process's part of a validation set.

    -> (images (n, *dataset.shape) uint8, mask_noise (n, N), unreadable images of all processes).
    """
    unreadable = []
    samples = [dataset[0, i] for i in range(rank, len(dataset), world)]
    note_bad_images(dict(bad for sample in samples for bad in sample[3]), unreadable, dataset)
    if not samples:  # more processes than images
        empty = torch.zeros(0, *dataset.shape, dtype=torch.uint8)
        return empty, torch.zeros(0, dataset.num_patches), len(unreadable)
    return *data.collate(samples)[:2], len(unreadable)


@torch.no_grad()
def reconstruct(run, images, mask_noise, args):
    """-> (reconstruction (B, 3, H, W), pixel mask (B, 1, H, W) with 1 = hidden).

    Under --norm-pix-loss the network predicts patches without their mean and contrast; both are
    put back from the true image, so what is shown and measured is not a prediction of them.
    """
    with run.autocast():
        outputs, mask = unwrap(run.mae)(images, args.mask_ratio, mask_noise)
    reconstruction = outputs[0]
    if args.norm_pix_loss:
        true = losses.patchify(model.imagenet_normalize(images), args.patch_size)
        mean, std = losses.patch_statistics(true)
        patches = losses.patchify(model.imagenet_normalize(reconstruction), args.patch_size)
        patches = patches * std + mean
        reconstruction = model.imagenet_denormalize(model.unpatchify(patches, args.patch_size))
    return reconstruction, data.pixel_mask(mask, args.image_size)


@torch.no_grad()
def validate(run, images, mask_noise, args):
    """`image_quality` of all processes' fixed images -> {name: mean over images}."""
    totals = {"images": len(images)} | dict.fromkeys(losses.METRICS, 0)
    for start in range(0, len(images), args.batch_size):
        batch = slice(start, start + args.batch_size)
        real, noise = data.to_float(images[batch].to(run.device)), mask_noise[batch].to(run.device)
        fake, hidden = reconstruct(run, real, noise, args)
        values, _ = losses.image_quality(fake, real, hidden)
        for name, value in values.items():
            totals[name] += value
    totals = sum_over_processes(totals, run.device)
    count = totals.pop("images")
    return {name: value / count for name, value in totals.items()}


def draw_reconstructions(path, run, images, mask_noise, args, whole):
    """Write the epoch's picture: fixed validation images, fixed masks, one row per image.

    whole: show the whole reconstruction beside its hidden part, pasted. Not for a masked MSE: it
    trains nothing where patches are visible, and would look broken there.
    """
    real = data.to_float(images.to(run.device))
    fake, hidden = reconstruct(run, real, mask_noise.to(run.device), args)
    pasted = torch.where(hidden > 0, fake, real)
    note = " (true contrast)" if args.norm_pix_loss else ""  # see `reconstruct`
    columns = {"original": real, "masked": data.grey_out(real, hidden)}
    if whole:
        columns["reconstruction"] = fake
    data.save_picture(path, columns | {"pasted" + note: pasted})


# ---- Command line --------------------------------------------------------------------------------

# `--demo`: sizes that show learning within minutes on two CPU cores.
DEMO = dict(
    loss="mse",
    model="nano",
    data="shapes-large",
    image_size=48,
    patch_size=4,
    limit_images=5000,
    batch_size=32,
    lr=2e-3,
    epochs=5,
    warmup_epochs=0.5,
    jitter=0.0,
    picture_every=5,
    workers=1,
    out="runs/demo",
    resume="off",
)


def at_least(low, kind=int, below=math.inf):
    """argparse type: a number that is `low` or more, and less than `below`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below:  # also refuses nan
            bound = "above 0" if 0 < low < 1 else f"of {low} or more"
            bound += f", below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its messages
    return parse


def text(value):
    """argparse type: a text that says something; `--init "$FILE"` may not."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
    return value


COUNT, WHOLE = at_least(1), at_least(0)  # 1, 2, ...; 0, 1, 2, ...
NUMBER, POSITIVE = at_least(0, float), at_least(1e-12, float)


def add_flags(parser, title, *rows):
    """A group of flags. rows: (name, type or choices, default, what it is); a pair of numbers is
    (NUMBER, NUMBER), an on-off flag with a --no- form is bool."""
    group = parser.add_argument_group(title)
    for name, kind, default, what in rows:
        how = {"type": text if kind is str else kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind == (NUMBER, NUMBER):
            how = {"type": NUMBER, "nargs": 2}
        elif not callable(kind):
            how = {"choices": list(kind)}
        group.add_argument(name, default=default, help=what, **how)


# What finetune.py has, too.
DATA_FLAGS = (
    ("--data", str, "data/imagenet", "folder of images, shapes, shapes-large, or cifar10"),
    ("--limit-images", COUNT, None, "train on so many, a seeded choice"),
    ("--workers", WHOLE, data.default_workers(), "loader workers per process"),
)
BATCH_FLAGS = (
    ("--batch-size", COUNT, 32, "images per process and forward pass"),
    ("--accum", COUNT, 1, "forward passes per step"),
    ("--lr", POSITIVE, None, "learning rate as it is, instead of --blr"),
)
RUN_FLAGS = (
    ("--amp", ("auto", "off", "fp16", "bf16"), "auto", "autocast; auto: as the GPU can"),
    ("--seed", at_least(0, below=2**63), 0, "of weights, data, masks and subsets"),
    ("--resume", str, "auto", "auto: OUT/checkpoint.pt if there is one; off: start anew; or PATH"),
    ("--eval-every", COUNT, 1, "epochs between measurements; and the last"),
    ("--save-every", COUNT, 1, "epochs between checkpoints"),
    ("--save-steps", COUNT, None, "steps between checkpoints, in addition"),
    ("--steps", COUNT, None, "stop after so many; the learning-rate schedule stays as it is"),
)


# What other pre-training has, too.
NETWORK_FLAGS = (
    ("--model", model.MAE_SIZES, "base", "paper: base, large"),
    ("--image-size", at_least(16), 224, "side in pixels"),
    ("--patch-size", at_least(2), 16, "pixels; a power of two for rows of several scales"),
    ("--mask-ratio", POSITIVE, 0.75, "hidden part of the patches"),
    ("--norm-pix-loss", bool, False, "normalise each target patch of a masked MSE"),
    ("--init", str, None, "file to start from: ours, a published MAE, timm's, Hugging Face's"),
)
SAMPLE_FLAGS = (
    *DATA_FLAGS,
    ("--epoch-images", COUNT, None, "samples of an epoch; None = each image once"),
    ("--val-images", COUNT, 256, "held-out images to measure"),
    ("--crop-min", POSITIVE, 0.2, "smallest crop, part of the area"),
    ("--flip", bool, True, "mirror half of the images"),
    ("--jitter", NUMBER, 0.4, "colour jitter; 0 = none"),
)
# PAPER SILENT: it contradicts itself on epochs of ViT-L (1600 or 1200), batch (16 or 32) and Adam's
# second beta (.95 or .999), and does not say whether the learning rate scales with the batch. Ours:
# 300 epochs for any model, 32 per process, MAE's .95, and MAE's linear scaling. Runs of less than
# 300 epochs, which it does not have, warm up for the same part of them, 40/300.
OPTIMISER_FLAGS = (
    ("--epochs", COUNT, 300, "paper: 300 (base)"),
    ("--warmup-epochs", NUMBER, None, "None = 40, or 40/300 of fewer than 300 epochs; paper: 40"),
    *BATCH_FLAGS,
    ("--blr", POSITIVE, 1.5e-4, "learning rate for 256 images per step; scales with them"),
    ("--betas", (NUMBER, NUMBER), [0.9, 0.95], "of AdamW"),
    ("--weight-decay", NUMBER, 0.05, "of matrices"),
)


def build_parser():
    """Every flag of train.py; `--help` is the manual. The paper's values are the defaults, except
    where DIFFERS or PAPER SILENT says otherwise.
    """
    parser = argparse.ArgumentParser(
        description="Pre-train a (Perceptual) masked autoencoder.",
        usage="train.py [--demo] [--loss ROW] [--data PATH|shapes|shapes-large|cifar10] [flags]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--demo", action="store_true", help="small preset, 3 to 5 minutes on two CPU cores"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile G and D")
    add_flags(
        parser,
        "what to train",
        ("--loss", LOSSES, "mse", "row of the tables in README"),
        ("--arch", ("auto", "mae", "msg_mae"), "auto", "auto: what the paper pairs with the loss"),
        *NETWORK_FLAGS,
    )
    add_flags(parser, "data", *SAMPLE_FLAGS)
    add_flags(
        parser,
        "weights of the loss terms (eq. 2, 3 and 6)",
        ("--pixel-weight", NUMBER, 1.0, "of the pixel term"),
        ("--pixel-scales", ("all", "finest"), "all", "scales that the pixel term covers"),
        ("--alpha", NUMBER, 0.85, "SSIM against L1, eq. 2"),
        ("--delta-f", NUMBER, 0.05, "feature term, eq. 3"),
        ("--delta-s", NUMBER, 40.0, "style term, eq. 3"),
        (
            "--adversarial-weight",
            NUMBER,
            None,
            "of eq. 5; None = .1 for msg_gan and msg_gan_p, else 1",
        ),
        (
            "--feature-every",
            COUNT,
            2,
            "eq. 3 on D's features is on in epochs divisible by this, "
            "counted from 1; paper: even ones; 1 = always",
        ),
        ("--dvae-weights", str, None, "OpenAI's encoder.pkl as published; for dvae_p"),
        ("--vgg-weights", str, None, "torchvision's vgg16; None = download; for vgg_p"),
    )
    add_flags(parser, "optimisation of G", *OPTIMISER_FLAGS)
    add_flags(
        parser,
        "discriminator D",
        ("--d-channels", COUNT, None, "at the finest scale; None = by --model"),
        ("--d-max", COUNT, None, "most channels; None = by --model"),
        ("--d-lr", NUMBER, None, "learning rate; 0: D stays as drawn; None = by --loss"),
        ("--d-betas", (NUMBER, NUMBER), None, "of Adam; None = by --loss"),
    )
    add_flags(
        parser,
        "regularisation (StyleGANv2-ADA row; R1 works with any D)",
        ("--ada-target", at_least(-1, float), 0.6, "of E sign(D(real) - 1/2); 0.6: 80 %% right"),
        ("--ada-images", COUNT, 500_000, "real images in which p can go from 0 to 1"),
        ("--ada-p", NUMBER, None, "fixed augmentation probability p"),
        ("--path-weight", NUMBER, 0.002, "of path lengths"),
        ("--path-every", COUNT, 4, "steps between path lengths"),
        ("--r1-gamma", NUMBER, 0.0, "R1 weight; 0 = off: the paper names none"),
        ("--r1-every", COUNT, 16, "steps between R1 penalties"),
    )
    add_flags(
        parser,
        "the run",
        ("--out", str, None, "folder for everything written; None = runs/LOSS"),
        *RUN_FLAGS,
        ("--picture-every", COUNT, None, "epochs between pictures; None = 1, 2, 5, 10, 20, ..."),
    )
    return parser


def parse_args(argv=None):
    """Command line -> namespace with every default filled in. Ends with status 2 on a conflict."""
    parser = build_parser()
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)  # flags that are given still win
    args = parser.parse_args(argv)
    recipe = LOSSES[args.loss]
    for part, values, flags in USED_WITH:
        if recipe[part] not in values:
            name_unused(args, flags, parser)
    channels, most = model.DISCRIMINATOR_WIDTHS[args.model]
    args.d_channels, args.d_max = args.d_channels or channels, args.d_max or most
    args.arch = recipe["arch"] if args.arch == "auto" else args.arch
    if args.adversarial_weight is None:
        args.adversarial_weight = recipe["weight"]
    rate, betas = D_ADAM[recipe["adversary"] or "conv"]
    args.d_lr = rate if args.d_lr is None else args.d_lr
    args.d_betas = args.d_betas or list(betas)
    settle(args)
    if args.norm_pix_loss and recipe["pixel"] != "mse":
        fail(f"--norm-pix-loss is for masked MSE, --loss mse: {args.loss} has none")
    if args.loss == "ms_ssim" and args.image_size < 24:
        fail(f"--image-size {args.image_size} has no 4 scales for MS-SSIM; use 24 or more")
    check_parts(args, "alpha", "ada_target", "ada_p")
    if max(args.d_betas) >= 1:
        fail("--d-betas must be below 1")
    return args


def name_unused(args, flags, parser, chooser="loss"):
    """Name each of these flags that was given: the row, or the task, ignores it."""
    for flag in flags:
        if getattr(args, flag) != parser.get_default(flag):
            say(f"--{flag.replace('_', '-')} has no effect on --{chooser} {getattr(args, chooser)}")


def settle(args):
    """Fill in what follows from other flags of NETWORK_, SAMPLE_ and OPTIMISER_FLAGS, and check."""
    if args.warmup_epochs is None:
        args.warmup_epochs = min(40, args.epochs * 40 / 300)
    args.lr = args.lr or args.blr * images_per_step(args) / 256
    args.out = args.out or f"runs/{args.loss}"
    args.seen = [[folder_of(args.data), args.seed]]  # see `seen_by`
    patches = (args.image_size // args.patch_size) ** 2
    fits = args.image_size % args.patch_size == 0  # if not, `ViT` says so
    if fits and not 1 <= int(patches * (1 - args.mask_ratio)) < patches:
        fail(f"--mask-ratio {args.mask_ratio} of {patches} patches hides all of them or none")
    check_parts(args, "crop_min")
    if max(args.betas) >= 1:
        fail("--betas must be below 1")


def check_parts(args, *names):
    """Are these, where given, parts of a whole?"""
    for name in names:
        value, below = getattr(args, name), name in ("label_smoothing", "drop_path")
        if value is not None and (value > 1 or (below and value == 1)):
            most = "below 1" if below else "1 or less"
            fail(f"--{name.replace('_', '-')} {value} must be {most}")


# ---- Main ----------------------------------------------------------------------------------------


def explain_demo(out):
    """Say in words what the demo's last log row means, and what to look at."""
    row = data.read_log(out / "log.jsonl")[-1]
    gain, picture = row["psnr"] - row["psnr_mean_fill"], f"epoch_{row['epoch']:04d}.png"
    say(
        f"The autoencoder saw a quarter of each picture. Where it saw nothing, its painting has a "
        f"PSNR of {row['psnr']:.1f} dB, {abs(gain):.1f} dB {'above' if gain > 0 else 'below'} the "
        f"mean colour of what it saw (3 dB "
        f"halve the squared error).\n"
        f"Look at {out}/pictures/{picture}. Next: python finetune.py --demo"
    )


def main(argv=None):
    args = parse_args(argv)
    device = start_processes()
    stopped = pretrain(args, device)
    if args.demo and not (args.steps or stopped):
        explain_demo(Path(args.out))
    stop_processes()
    return 128 + stopped if stopped else 0


def run_script(main):
    """Run a script's main and exit with its status; a full GPU ends in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may be in any encoding
    try:
        sys.exit(main())
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full: lower --batch-size (and raise --accum as much)"
        fail(message, everywhere=True)


if __name__ == "__main__":
    run_script(main)
