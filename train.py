"""Pre-train a (Perceptual) masked autoencoder.

    python train.py --demo                                      # 4 minutes on two CPU cores
    python train.py --loss mse --data path/to/imagenet          # one GPU
    torchrun --nproc_per_node=8 train.py --loss msg_gan_p       # one node, data/imagenet
    python train.py --eval --resume runs/mse/checkpoint.pt      # Table 1 and figures; no training

Implements sec. 4 of the paper ("Pre-training"): the objective of eq. 6 with its schedule. Reads
down: processes and precision, networks and optimisers, the training step, checkpoints, validation,
evaluation of checkpoints (sec. 5.1), benchmark, data, the training loop (`fit`), command line,
`main`. The losses are in losses.py, the networks in model.py, the images in data.py.

Writes to OUT: checkpoint.pt, log.jsonl (one JSON object an epoch) and pictures/; eval.json with
--eval. Run the same command again after any interruption and it continues where the checkpoint was
saved.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import Inception_V3_Weights
from tqdm import tqdm

from data import (
    EpochSampler,
    PretrainSet,
    build_loader,
    collate,
    grey_out,
    heat,
    open_sources,
    pixel_mask,
    save_curves,
    save_picture,
    to_float,
)
from losses import (
    KINDS,
    LOSSES,
    METRICS,
    feature_loss,
    frechet_distance,
    image_quality,
    inception_score,
    inception_sums,
    lsgan_d_loss,
    lsgan_g_loss,
    masked_mse,
    mean_and_covariance,
    ms_ssim_l1,
    patch_statistics,
    patchify,
    path_length_penalty,
    path_lengths,
    pyramid,
    r1_penalty,
    style_loss,
)
from model import (
    DISCRIMINATOR_ADAM,
    DISCRIMINATOR_WIDTHS,
    MAE_SIZES,
    AdaAugment,
    DVAEEncoder,
    InceptionFeatures,
    VGGFeatures,
    build_discriminator,
    build_mae,
    encoder_weights,
    from_others,
    imagenet_denormalize,
    imagenet_normalize,
    misfits,
    random_masking,
    read_dvae,
    to_hf,
    unpatchify,
)

# `--demo`: sizes that show learning within minutes on two CPU cores.
DEMO = dict(
    loss="msg_gan_p",
    model="tiny",
    data="shapes",
    image_size=64,
    patch_size=8,
    limit_images=2400,
    batch_size=16,
    lr=1e-3,
    epochs=4,
    warmup_epochs=0.5,
    picture_every=2,
    workers=1,
    out="runs/demo",
    resume=["off"],
)
# A checkpoint continues only under the same values of these.
ARGUMENTS_THAT_MUST_FIT = (
    "loss",
    "model",
    "arch",
    "image_size",
    "patch_size",
    "norm_pix_loss",
    "d_channels",
    "d_max",
    "seed",
)
CURVES = {  # charts of curves.png: {title: {entry of the log: label}}, one unit each
    "pixel term": {"pixel": ""},
    "adversarial term (eq. 5)": {"adversarial": ""},
    "feature term (eq. 3)": {"feature": ""},
    "style term (eq. 3)": {"style": ""},
    "discriminator (eq. 4)": {"discriminator": ""},
    "D is right": {"d_accuracy_real": "real", "d_accuracy_fake": "fake"},
    "path lengths": {"path_length": ""},
    "R1": {"r1": ""},
    "ADA's p": {"ada_p": ""},
    "PSNR where hidden, dB": {"psnr": "G", "psnr_mean_fill": "mean fill"},
    "SSIM where hidden": {"ssim": ""},
}
# Where the weights of loss networks are published.
PUBLISHED = {
    "dvae": "https://cdn.openai.com/dall-e/encoder.pkl",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
MAX_NONFINITE = 10  # non-finite losses in a row before the run stops


# ---- Processes and precision ---------------------------------------------------------------------


def fail(message, everywhere=False):
    """End with one clear line on standard error, exit status 2.

    Under torchrun one process a node prints it; with everywhere=True any that comes here.
    """
    if everywhere or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def is_main():
    """Is this the one process that writes?"""
    return int(os.environ.get("RANK", 0)) == 0


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(message, file=None):
    """Print a line above the progress bar, from one process of all; file: None = stdout."""
    if is_main():
        tqdm.write(message, file)


def start_processes():
    """Join the process group that torchrun's environment describes -> (device, rank, world size).

    Without those variables: one process, on the GPU if there is one.
    """
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        count, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if wanted > count:
            fail(f"{wanted} processes for {count} GPUs: lower --nproc_per_node to {count}")
        device = torch.device("cuda", local)
        architectures = torch.cuda.get_arch_list()
        if not gpu_is_supported(torch.cuda.get_device_capability(device), architectures):
            fail(
                f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)}"
                f" (it has {', '.join(architectures)}); see 'V100' in README.md, Install"
            )
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # sizes never change: let cuDNN choose by trying
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world


def gpu_is_supported(capability, architectures):
    """Can a torch built for `architectures` ("sm_80", "compute_90") run on a (major, minor) GPU?

    Machine code (sm) runs on later minors of its major; PTX (compute) on anything later.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        number = int("".join(c for c in number if c.isdigit()))  # "90a" -> 90
        built = (number // 10, number % 10)
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if kind == "compute" and built <= tuple(capability):
            return True
    return False


def choose_precision(amp, device):
    """`--amp` -> autocast dtype, None = float32. auto: bf16 or else fp16 on a GPU, off on CPU."""
    if amp == "fp16" and device.type == "cpu":
        fail("--amp fp16 needs a GPU; use --amp off here")
    if amp == "off" or (amp == "auto" and device.type == "cpu"):
        return None
    if amp == "auto":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[amp]


def autocast(run):
    """Autocast context of a run (see `build_run`)."""
    return torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype is not None)


def across_processes(values, device):
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


def catch_stop_signals():
    """Turn the first SIGTERM or SIGINT into a note, so that the loop can save and then exit.

    Returns a dict whose "signal" becomes the signal's number; a second signal ends at once.
    """
    stop = {"signal": 0}

    def note(number, frame):
        stop["signal"] = number
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return stop


# ---- Networks and optimisers ---------------------------------------------------------------------


def build_run(args, device):
    """What trains: G and D with an optimiser and a gradient scaler each, device and precision.

    -> namespace of device, dtype (autocast's, None = float32), mae, opt_g, scaler_g, disc, opt_d,
    scaler_d, ada, phi; those that a row does not have are None. phi: a loss network with published
    weights; where D is phi, disc.
    """
    recipe = LOSSES[args.loss]
    dtype = choose_precision(args.amp, device)

    def scaler():  # passes losses through unless precision is fp16
        return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    torch.manual_seed(args.seed)  # the same initial weights on every process
    try:
        scales = image_scales(args)
        mae = build_mae(args.model, args.image_size, args.patch_size, args.arch, scales).to(device)
        disc = None
        if recipe["adversary"]:
            disc = build_discriminator(
                recipe["adversary"], args.image_size, scales, args.d_channels, args.d_max
            ).to(device)
            if device.type == "cuda" or recipe["adversary"] == "conv":
                # Tensor cores want it; on a CPU it speeds "conv" up and slows the others down.
                disc = disc.to(memory_format=torch.channels_last)
    except ValueError as error:  # sizes that do not fit each other
        fail(str(error))
    groups = parameter_groups(mae, args.weight_decay)
    opt_g = torch.optim.AdamW(groups, betas=tuple(args.betas), fused=True)
    run = SimpleNamespace(
        device=device, dtype=dtype, mae=wrap(mae, device), opt_g=opt_g, scaler_g=scaler(),
        disc=None, opt_d=None, scaler_d=None, ada=None, phi=open_loss_network(args, device),
    )  # fmt: skip
    if disc is not None:
        run.disc, run.scaler_d = wrap(disc, device), scaler()
        # PAPER SILENT: D's optimiser. Adam with GAN betas and no decay (the authors' code: G's).
        run.opt_d = torch.optim.Adam(disc.parameters(), betas=tuple(args.d_betas), fused=True)
    if recipe["ada"]:
        run.ada = AdaAugment(
            target=args.ada_target, ramp_images=args.ada_images, fixed_p=args.ada_p
        ).to(device)
    return run


def open_loss_network(args, device):
    """The frozen phi of dvae_p or vgg_p, with its published weights; None for other rows."""
    kind = LOSSES[args.loss]["features"]
    if kind not in PUBLISHED:
        return None
    phi = DVAEEncoder() if kind == "dvae" else VGGFeatures()
    path = getattr(args, f"{kind}_weights")
    if args.benchmark and path is None:
        return phi.to(device)  # time does not depend on the weights
    what = {"dvae": "OpenAI's dVAE encoder", "vgg": "torchvision's VGG-16"}[kind]
    remedy = f"--{kind}-weights takes the file {PUBLISHED[kind]}"
    try:
        if path is None and kind == "dvae":
            raise ValueError("no file given")
        if path is None:
            with first_of_a_node_first():
                weights = torch.hub.load_state_dict_from_url(
                    PUBLISHED[kind], map_location="cpu", check_hash=True, weights_only=True
                )
        elif kind == "dvae":
            weights = read_dvae(path)
        else:
            weights = read_checkpoint(path, (), what)
        if kind == "vgg":  # the classifier and the last convolutions are not needed
            wanted = phi.state_dict()
            weights = {k: v for k, v in weights.items() if k in wanted} or weights
        if faults := misfits(phi, weights, most=3):
            raise ValueError(faults)
    except (ValueError, OSError, RuntimeError) as error:
        fail(f"{path or args.loss}: not the weights of {what} ({error}); {remedy}")
    phi.load_state_dict(weights)
    return phi.to(device)


def image_scales(args):
    """How many scales G puts out: down to one pixel a patch where anything looks at them, or 1."""
    looks = args.arch == "msg_mae" or LOSSES[args.loss]["adversary"] in ("msg", "stylegan2")
    return args.patch_size.bit_length() if looks else 1


def parameter_groups(module, weight_decay):
    """AdamW groups: matrices decay; norms, biases and tokens (one-dimensional) do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.squeeze().ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.squeeze().ndim <= 1], "weight_decay": 0.0},
    ]


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


def learning_rate(position, warmup, total, peak):
    """Linear warm-up, then cosine to 0. position, warmup, total: in steps. PAPER: sec. 4."""
    if position < warmup:
        return peak * min(1, (position + 1) / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (position - warmup) / max(1, total - warmup)))


def set_learning_rates(run, progress, steps_per_epoch, args):
    """Put both optimisers where the schedule has come to -> G's learning rate."""
    position = (progress["epoch"] - 1) * steps_per_epoch + progress["epoch_step"]
    schedule = (position, args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch)
    for optimizer, peak in ((run.opt_g, args.lr), (run.opt_d, args.d_lr)):
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(*schedule, peak)
    return run.opt_g.param_groups[0]["lr"]


# ---- The training step ---------------------------------------------------------------------------


def pixel_loss(recipe, reconstructions, reals, mask, args):
    """The pixel term of a LOSSES row: scalar, before its weight. Lists of scales, finest first.

    PAPER SILENT: whether it covers one scale or all. Ours averages over the scales;
    --pixel-scales finest takes the first alone.
    """
    if args.pixel_scales == "finest":
        reconstructions, reals = reconstructions[:1], reals[:1]
    terms = []
    for level, (fake, real) in enumerate(zip(reconstructions, reals, strict=True)):
        if recipe["pixel"] == "mse":
            patch_size = args.patch_size >> level
            norm_pix = args.norm_pix_loss and level == 0  # the others end at one pixel a patch
            terms.append(masked_mse(fake, real, mask, patch_size, norm_pix))
        elif recipe["pixel"] == "ms_ssim_l1":
            fitting = min(4, (real.shape[2] // 3).bit_length())  # small images have fewer scales
            if fitting:  # down to the 3 px of a window
                terms.append(ms_ssim_l1(fake, real, alpha=args.alpha, scales=fitting))
        else:
            # PAPER: eq. 1, L1 of the full image (the authors' code: also). PAPER SILENT: its unit.
            # Ours is the ImageNet-normalised pixel, which the MAE head predicts.
            difference = imagenet_normalize(fake) - imagenet_normalize(real)
            terms.append(difference.abs().mean())
    return sum(terms) / len(terms)


def feature_terms(features_fake, features_real, args):
    """What the loss network tells G, eq. 3, each term with its weight: {name: scalar}."""
    return {
        "feature": args.delta_f * feature_loss(features_fake, features_real),
        "style": args.delta_s * style_loss(features_fake, features_real),
    }


def backward(run, images, noise, seeds, features_active, share, args):
    """Add the gradients of one batch to G's and D's parameters; updates nothing.

    images: (B, 3, H, W) in [0, 1]. noise: (B, N), fixes the masks. seeds: (B,), fix what else is
    drawn for a sample. features_active: is this an epoch of eq. 3? share: this batch's part of the
    step, 1 / accum. Returns {name: detached scalar}: each loss term as it enters the sum, and D's
    accuracies.

    PAPER SILENT: the order of G's and D's updates. Both gradients are taken here at the same
    weights, so that one forward pass of D serves its own loss, the adversarial term and phi of
    eq. 3; both feature lists of a comparison then come from the same D.
    """
    recipe = LOSSES[args.loss]
    with autocast(run):
        reconstructions, mask = run.mae(images, args.mask_ratio, noise)
    reals = pyramid(images, len(reconstructions))
    pixel = args.pixel_weight * pixel_loss(recipe, reconstructions, reals, mask, args)
    if run.disc is None:
        terms = {"pixel": pixel}
        if run.phi is not None:
            # PAPER: eq. 7. PAPER SILENT: of several scales, phi sees the finest alone.
            with autocast(run):
                features_fake = run.phi(reconstructions[0])
                with torch.no_grad():
                    features_real = run.phi(images)
            terms |= feature_terms(features_fake, features_real, args)
        objective = run.scaler_g.scale(sum(terms.values()) * share)
        untouched = [torch.zeros_like(r) for r in reconstructions]  # DDP wants every output used
        torch.autograd.backward([objective, *reconstructions], [None, *untouched])
        return {name: value.detach() for name, value in terms.items()}

    # D sees the reconstructions as leaves: its loss cannot reach G, and what G should change is
    # read off at the images.
    fakes = [r.detach().requires_grad_() for r in reconstructions]
    seen_real, seen_fake = augment(run, seeds, args, reals, fakes)
    with autocast(run):
        logits_real, features_real = run.disc(seen_real)
        logits_fake, features_fake = run.disc(seen_fake)

    # G: from each term through D to the images (D's parameters get nothing), then through the MAE.
    # PAPER: the last two terms of eq. 6.
    terms = {"adversarial": args.adversarial_weight * lsgan_g_loss(logits_fake)}
    if features_active:
        terms |= feature_terms(features_fake, features_real, args)
    objective = run.scaler_g.scale(sum(terms.values()) * share)
    at_images = torch.autograd.grad(
        objective, fakes, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    scaled_pixel = run.scaler_g.scale(pixel * share)
    torch.autograd.backward([scaled_pixel, *reconstructions], [None, *at_images])

    # D: from its own loss to its parameters.
    loss_d = lsgan_d_loss(logits_real, logits_fake)
    run.scaler_d.scale(loss_d * share).backward()
    if run.ada is not None:
        run.ada.update(logits_real.detach(), dist.all_reduce if dist.is_initialized() else None)

    report = {"pixel": pixel, **terms, "discriminator": loss_d}
    report["d_accuracy_real"] = (logits_real > 0.5).float().mean()
    report["d_accuracy_fake"] = (logits_fake < 0.5).float().mean()
    return {name: value.detach() for name, value in report.items()}


def augment(run, seeds, args, *pyramids):
    """ADA on image pyramids, one draw an image for all of them; they come back as a list."""
    if run.ada is None:
        return list(pyramids)
    transform = run.ada.sample(seeds, args.image_size)
    return [run.ada(images, *transform) for images in pyramids]


def regularise(run, images, noise, seeds, share, progress, args):
    """Add the lazy regularisers' gradients, in the steps whose turn it is -> {name: scalar}.

    Each acts every so many steps with its weight multiplied by as many, in float32; the scalars
    include all of it, so that their sum over an epoch is what they weighed. They run on the
    unwrapped networks and before `backward`, whose DDP exchange then averages the sum of both.
    """
    recipe, terms = LOSSES[args.loss], {}
    if recipe["path"] and args.path_weight and progress["step"] % args.path_every == 0:
        terms["path_length"] = path_step(run, images, noise, seeds, share, progress, args)
    if run.disc is not None and args.r1_gamma and progress["step"] % args.r1_every == 0:
        # x of R1 is the real image before augmentation, one leaf for each scale that D looks at.
        scales = 1 if recipe["adversary"] == "conv" else image_scales(args)
        reals = [x.detach().requires_grad_() for x in pyramid(images, scales)]
        (seen,) = augment(run, seeds, args, reals)
        logits, _ = unwrap(run.disc)(seen)
        penalty = args.r1_gamma / 2 * args.r1_every * r1_penalty(logits, reals)
        run.scaler_d.scale(penalty * share).backward(inputs=list(run.disc.parameters()))
        terms["r1"] = penalty.detach()
    return terms


def path_step(run, images, noise, seeds, share, progress, args):
    """Path-length regularisation of G; keeps its running mean in `progress` -> detached penalty.

    PAPER SILENT: on half of the batch, as StyleGAN2 does, since a backward pass of a backward pass
    is dear; and through the augmentation, as all that D sees.
    """
    mae, disc = unwrap(run.mae), unwrap(run.disc)
    images, noise, seeds = (x[: (len(x) + 1) // 2] for x in (images, noise, seeds))
    ids_keep, ids_restore, _ = random_masking(noise, args.mask_ratio)
    inputs = mae.decoder_inputs(images, ids_keep, ids_restore)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        (seen,) = augment(run, seeds, args, mae.decode(inputs))
        _, features = disc(seen)
    draws = zip(*(feature_noise(seed, features) for seed in seeds.tolist()), strict=True)
    lengths = path_lengths(features, inputs[0], [torch.stack(d) for d in draws])
    mean = across_processes({"mean": lengths.detach().mean()}, run.device)["mean"] / world_size()
    before = progress["path_mean"]
    if math.isfinite(mean):  # or no later step would be
        progress["path_mean"] = before + 0.01 * (mean - before) if before else mean
    penalty = path_length_penalty(lengths, progress["path_mean"])
    penalty = args.path_weight / 2 * args.path_every * penalty
    scaled = run.scaler_g.scale(penalty * share)
    scaled.backward(inputs=[p for p in mae.parameters() if p.requires_grad])
    return penalty.detach()


def feature_noise(seed, features):
    """One sample's N(0, 1) noise for D's feature maps, a function of its seed: [(C, h, w)]."""
    device = features[0].device
    generator = torch.Generator(device).manual_seed(seed + 1)  # not the augmentation's numbers
    return [torch.randn(f.shape[1:], generator=generator, device=device) for f in features]


def accumulate(run, batches, features_active, progress, args):
    """Gradients of the batches of one step, averaged -> {name: mean of the term over them}."""
    totals, share = {}, 1 / len(batches)

    def count(terms):
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value * share

    on_device = []
    for images, noise, seeds, *_ in batches:
        images = to_float(images.to(run.device, non_blocking=True))
        on_device.append((images, noise.to(run.device, non_blocking=True), seeds))
    for batch in on_device:
        count(regularise(run, *batch, share, progress, args))
    for number, batch in enumerate(on_device, start=1):
        with ExitStack() as stack:
            if dist.is_initialized() and number < len(batches):
                for network in filter(None, (run.mae, run.disc)):
                    stack.enter_context(network.no_sync())  # processes exchange with the last one
            count(backward(run, *batch, features_active, share, args))
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


# ---- Checkpoints ---------------------------------------------------------------------------------


def new_progress():
    """Where a run stands: all that a checkpoint holds beside networks, optimisers and arguments."""
    return {
        "epoch": 1,  # the epoch that is running
        "epoch_step": 0,  # steps done of it
        "step": 0,  # steps done since the start
        "sums": {},  # of each term over this epoch's counted steps
        "counted": 0,  # steps in `sums`; non-finite ones are not
        "seconds": 0.0,  # spent training in this epoch
        "path_mean": 0.0,  # running mean of path lengths, 0 = none yet
        "bad_images": [],  # unreadable ones, distinct, over all processes
        "layout": {},  # see `resume`
    }


def stateful(run):
    """The parts of a run with a state_dict, by their names in a checkpoint."""
    return {
        name: unwrap(part) if isinstance(part, torch.nn.Module) else part
        for name, part in vars(run).items()
        if hasattr(part, "state_dict") and name != "phi"  # frozen, and published
    }


def save_checkpoint(path, run, progress, args):
    """Write everything needed to continue. A kill at any instant leaves the last good file."""
    if not is_main():
        return
    for name, part in stateful(run).items():
        weights = part.parameters() if isinstance(part, torch.nn.Module) else []
        if not all(p.isfinite().all() for p in weights):
            fail(f"{name} has non-finite weights; {path} keeps the last good ones: lower --lr")
    checkpoint = {name: part.state_dict() for name, part in stateful(run).items()}
    checkpoint |= {"progress": progress, "arguments": vars(args), "rng": torch.get_rng_state()}
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; the last good checkpoint is untouched")


def read_checkpoint(path, holds=("mae", "arguments", "progress"), kind="a checkpoint of train.py"):
    """Load a checkpoint file on the CPU, as data only: nothing in it is executed.

    holds: what must be in it. kind: what to say that the file is not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles: refused just below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"checkpoint {path} does not exist")
    except Exception as error:  # anything else can be in the file
        fail(f"{path} is not {kind} ({type(error).__name__})")
    if not isinstance(checkpoint, dict):
        fail(f"{path} is not {kind} (it holds a {type(checkpoint).__name__})")
    lacking = [name for name in holds if name not in checkpoint]
    if lacking:
        fail(f"{path} is not {kind} (it lacks {', '.join(lacking)})")
    return checkpoint


def load_whole(network, weights, path):
    """Load weights into a network, all of them or none: what does not fit is listed, status 2."""
    if faults := misfits(network, weights):
        fail(f"{path} does not fit, nothing was loaded; {faults}")
    network.load_state_dict(weights)


def read_any_weights(path, kind):
    """A file of weights, ours or of another project -> ({name as ours: tensor}, [names left out]).

    kind: what to say that the file is not.
    """
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            fail(f"{path} needs the package safetensors: pip install safetensors")
        try:
            weights = load_file(path)
        except Exception as error:  # anything can be in the file
            fail(f"{path} is not {kind} ({error})")
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE saves its own: harmless
            weights = read_checkpoint(path, (), kind)
        for name in ("mae", "model", "state_dict"):
            weights = weights[name] if isinstance(weights.get(name), dict) else weights
    weights = {str(k): v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    if not weights:
        fail(f"{path} is not {kind} (it holds no tensors)")
    return from_others(weights)


def initialise(mae, args):
    """--init: an autoencoder's encoder, and its decoder where the file has one; says what it took.

    All of the encoder must be there, and all of the decoder or nothing; the skips and scales of
    MSG-MAE, which other projects do not have, may be missing. Positions are resized.
    """
    weights, left_out = read_any_weights(args.init, "a file of ViT-MAE weights")
    expected = mae.state_dict()
    decoder = {k: v for k, v in weights.items() if k.startswith(("decoder_", "mask_token"))}
    if "decoder_pos_embed" in decoder:  # fixed
        decoder["decoder_pos_embed"] = expected["decoder_pos_embed"]
    try:
        encoder = encoder_weights(weights, mae.side)
    except (ValueError, RuntimeError) as error:
        fail(f"{args.init} has positions that cannot be resized: {error}")
    fresh = [k for k in expected if k not in decoder and k.startswith(
        ("decoder_fuse", "decoder_rgb") if decoder else ("decoder_", "mask_token")
    )]  # fmt: skip
    load_whole(mae, encoder | decoder | {k: expected[k] for k in fresh}, args.init)
    say(f"--init {args.init}: took {len(encoder)} tensors of the encoder and {len(decoder)} of the "
        f"decoder; left out: {', '.join(left_out) or 'none'}; new: "
        f"{', '.join(sorted({k.split('.')[0] for k in fresh})) or 'none'}")  # fmt: skip


def export(args):
    """--export FILE: write --resume's weights by the names of --format; says what it left out."""
    if args.resume in (["auto"], ["off"]) or len(args.resume) > 1:
        fail("--export writes one checkpoint's weights; name it: --resume runs/LOSS/checkpoint.pt")
    path = Path(args.export)
    weights = read_checkpoint(args.resume[0])["mae"]
    encoder = {k: v for k, v in weights.items() if not k.startswith(("decoder_", "mask_token"))}
    plain = not any(k.startswith(("decoder_fuse", "decoder_rgb")) for k in weights)
    if args.format == "hf":
        try:
            written = to_hf(weights)
        except ValueError as error:
            fail(f"{args.resume[0]} cannot be written as hf: {error}; --format timm and mae write "
                 "the encoder")  # fmt: skip
    else:
        written = weights if plain and args.format == "mae" else encoder
    written = {k: v.contiguous() for k, v in written.items()}
    content = {"model": written} if args.format == "mae" else written
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            path.write_bytes(save(written))
        else:
            with open(path, "wb") as file:
                torch.save(content, file)
    except ImportError:
        fail(f"--export {path} needs the package safetensors: pip install safetensors")
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    rest = 0 if args.format == "hf" else len(weights) - len(written)
    say(f"wrote {path}: {len(written)} tensors; left out: {rest} of the decoder")


def resume(args, run, path, layout, must_fit=ARGUMENTS_THAT_MUST_FIT, script="train.py"):
    """Continue from a checkpoint if `--resume` says so and there is one -> progress.

    layout: {what: number} that must not change within an epoch, or its steps would mean others.
    must_fit: arguments that must be as they were. script: which one's checkpoints these are.
    """
    if args.resume == ["off"] or (args.resume == ["auto"] and not path.exists()):
        return new_progress() | {"layout": layout}
    if len(args.resume) > 1:
        fail("training continues one checkpoint; give --resume one path")
    path = path if args.resume == ["auto"] else Path(args.resume[0])
    network = next(iter(stateful(run)))  # "mae", or what another script calls its own
    holds = (network, "arguments", "progress")
    checkpoint = read_checkpoint(path, holds, f"a checkpoint of {script}")
    then, now = checkpoint["arguments"], vars(args)
    differ = [k for k in must_fit if then.get(k) != now[k]]
    if differ:
        listed = ", ".join(
            f"--{k.replace('_', '-')} {then.get(k)!s:.60} (now {now[k]!s:.60})" for k in differ
        )
        fail(f"{path} was trained with {listed}; give the same, or another --out, or --resume off")
    progress = checkpoint["progress"]
    for what, number in layout.items():
        if progress["epoch_step"] and progress["layout"][what] != number:
            fail(f"{path} was saved within an epoch with {progress['layout'][what]} {what} (now "
                 f"{number}): keep that until the epoch's end")  # fmt: skip
    for name, part in stateful(run).items():
        if not checkpoint[name]:  # a disabled scaler's state is empty
            continue
        flags = [
            {k: g[k] for k in ("betas", "weight_decay", "lr_scale") if k in g}
            for g in getattr(part, "param_groups", [])
        ]
        part.load_state_dict(checkpoint[name])
        for group, values in zip(getattr(part, "param_groups", []), flags, strict=True):
            group |= values  # what the flags say now, not then
        if name == "ada" and part.fixed_p is not None:
            part.p.fill_(part.fixed_p)
    torch.set_rng_state(checkpoint["rng"])
    return progress | {"layout": layout}


def start_output(out, epoch):
    """Make the folder; keep the log's lines of the epochs before `epoch`, the rest is redone."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to --out {out}: {error.strerror}")
    log = out / "log.jsonl"
    kept = [json.dumps(row) + "\n" for row in read_log(log) if row["epoch"] < epoch]
    log.with_suffix(".tmp").write_text("".join(kept))
    os.replace(log.with_suffix(".tmp"), log)


def read_log(log):
    """Rows of a log.jsonl, [] if there is none; a line that a full disk cut short is left out."""
    rows = []
    for line in log.read_text().splitlines() if log.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def progress_bar(sampler, args):
    """tqdm bar of one epoch, counting images; on the main process, and on a terminal alone."""
    return tqdm(
        desc=f"epoch {sampler.epoch}/{args.epochs}",
        initial=sampler.start * images_per_step(args),
        total=sampler.steps * images_per_step(args),
        unit="images",
        dynamic_ncols=True,
        disable=None if is_main() else True,
    )


def features_active(args, epoch):
    """Are the terms of eq. 3 on? PAPER: sec. 4, "only on even numbered epochs".

    PAPER SILENT: the first epoch's number (here 1), and whether "the perceptual loss term" includes
    the adversarial one (here not); also whether it is meant for eq. 7, whose loss network needs no
    time to learn (here not: dvae_p and vgg_p have it in every epoch).
    """
    phi = LOSSES[args.loss]["features"]
    return phi in PUBLISHED or (phi == "disc" and epoch % args.feature_every == 0)


# ---- Validation and pictures ---------------------------------------------------------------------


def fixed_batch(dataset, rank, world):
    """This process's part of a validation set.

    -> (images (n, 3, S, S) uint8, noise (n, N), number of unreadable images over all processes).
    """
    size, unreadable = dataset.image_size, []
    samples = [dataset[0, i] for i in range(rank, len(dataset), world)]
    note_bad_images(dict(bad for sample in samples for bad in sample[3]), unreadable, dataset)
    if not samples:  # more processes than images
        empty = torch.zeros(0, 3, size, size, dtype=torch.uint8)
        return empty, torch.zeros(0, dataset.num_patches), len(unreadable)
    return *collate(samples)[:2], len(unreadable)


@torch.no_grad()
def reconstruct(run, images, noise, args):
    """-> (reconstruction (B, 3, H, W), pixel mask (B, 1, H, W) with 1 = hidden).

    Under --norm-pix-loss the network predicts patches without their mean and contrast; both are
    put back from the true image, so what is shown and measured is not a prediction of them.
    """
    with autocast(run):
        reconstructions, mask = unwrap(run.mae)(images, args.mask_ratio, noise)
    reconstruction = reconstructions[0]
    if args.norm_pix_loss:
        mean, std = patch_statistics(patchify(imagenet_normalize(images), args.patch_size))
        patches = patchify(imagenet_normalize(reconstruction), args.patch_size) * std + mean
        reconstruction = imagenet_denormalize(unpatchify(patches, args.patch_size))
    return reconstruction, pixel_mask(mask, args.image_size)


@torch.no_grad()
def validate(run, images, noise, args):
    """`image_quality` of all processes' fixed images -> {name: mean over images}."""
    totals = dict.fromkeys(("images", *METRICS), 0) | {"images": len(images)}
    for start in range(0, len(images), args.batch_size):
        batch = slice(start, start + args.batch_size)
        real = to_float(images[batch].to(run.device))
        fake, hidden = reconstruct(run, real, noise[batch].to(run.device), args)
        for name, value in image_quality(fake, real, hidden)[0].items():
            totals[name] += value
    totals = across_processes(totals, run.device)
    count = totals.pop("images")
    return {name: value / count for name, value in totals.items()}


def draw_reconstructions(path, run, images, noise, args):
    """Write the epoch's picture: fixed validation images, fixed masks, one row an image."""
    real = to_float(images.to(run.device))
    fake, hidden = reconstruct(run, real, noise.to(run.device), args)
    pasted = torch.where(hidden > 0, fake, real)
    note = " (true contrast)" if args.norm_pix_loss else ""  # see `reconstruct`
    columns = {"original": real, "masked": grey_out(real, hidden)}
    save_picture(path, columns | {"reconstruction" + note: fake, "pasted" + note: pasted})


def draw_curves(path, log):
    """Draw the file log.jsonl as curves, if there is one with anything in it."""
    if rows := read_log(log):
        save_curves(path, rows, CURVES)


# ---- Evaluation of checkpoints (Table 1, Figures 2 and 3) ----------------------------------------


def open_checkpoints(args, device):
    """--resume's checkpoints -> {name of the row: run of mae, device, dtype, its own args, path}.

    Sets the sizes in args to theirs, which must agree, and the seed to the first one's.
    """
    if args.resume in (["auto"], ["off"]):
        fail("--eval measures checkpoints; name one or several: --resume runs/LOSS/checkpoint.pt")
    runs, sizes, defaults = {}, ("image_size", "patch_size", "mask_ratio"), build_parser()
    for path in args.resume:
        checkpoint = read_checkpoint(path)
        own = argparse.Namespace(**checkpoint["arguments"])
        for what in sizes:
            here, given = getattr(own, what), getattr(args, what)
            flag = "--" + what.replace("_", "-")
            if runs and given != here:
                fail(f"{path} has {flag} {here}, {args.resume[0]} {given}: evaluate them apart")
            if given not in (here, defaults.get_default(what)):
                fail(f"{path} has {flag} {here}, not {given}; leave {flag} off")
        if not runs:
            for what in (*sizes, "seed"):  # the seed chooses masks, and images if there is no val/
                setattr(args, what, getattr(own, what))
        mae = build_mae(own.model, own.image_size, own.patch_size, own.arch, image_scales(own))
        load_whole(mae, checkpoint["mae"], path)
        name = own.loss if own.arch == LOSSES[own.loss]["arch"] else f"{own.loss} ({own.arch})"
        name += " (true contrast)" * own.norm_pix_loss  # see `reconstruct`
        if name in runs:
            name = f"{name} {len(runs) + 1}"
        dtype, mae = choose_precision(args.amp, device), mae.to(device).eval()
        runs[name] = SimpleNamespace(mae=mae, device=device, dtype=dtype, args=own, path=path)
    return runs


def load_inception(args, device):
    """-> (`InceptionFeatures` or None, what it is or why there is none)."""
    source, get = args.inception_weights, (
        "give --inception-weights pt_inception-2015-12-05-6726825d.pth, a release of "
        "github.com/mseitzer/pytorch-fid (fid_weights)"
    )  # fmt: skip
    if source == "none":
        return None, "none, so neither IS nor FID"
    if source == "torchvision":
        weights = reason = None
        try:
            with first_of_a_node_first():
                weights = Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(
                    progress=False, check_hash=True, weights_only=True
                )
        except (OSError, RuntimeError) as error:  # no network, or half a download
            reason = error
        if across_processes({"missing": weights is None}, device)["missing"]:
            return None, f"none, so neither IS nor FID (cannot be downloaded: {reason}); {get}"
        what = f"torchvision's, not those of published FIDs; for these {get}"
    else:
        weights = read_checkpoint(source, (), "a file of Inception weights")
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
        what = f"{source}, those of published FIDs"
        if not digest.startswith("6726825d"):
            what = f"{source}, not the file of published FIDs; for these {get}"
    try:
        inception = InceptionFeatures(weights)
    except ValueError as error:
        fail(f"{source} is not a file of Inception weights: {error}; {get}")
    return inception.to(device), what


@torch.no_grad()
def evaluate(args, device, rank, world):
    """Table 1 and Figures 2 and 3 of --resume's checkpoints, on the whole validation set."""
    runs, out = open_checkpoints(args, device), Path(args.out)
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to --out {out}: {error.strerror}")
    val_set = build_data(args)[1]
    seeds = {run.args.seed for run in runs.values()}
    if len(seeds) > 1 and getattr(val_set.source, "held_out", False):
        fail(f"the checkpoints held out different images (seeds {seeds}): evaluate them apart, or "
             f"put validation images into {args.data}/val")  # fmt: skip
    inception, what = load_inception(args, device)
    say(f"Inception weights: {what}")
    totals, sums, unread = measure(runs, val_set, inception, args, rank, world)

    count = totals.pop("images")
    results = {"real": {}} if inception else {}
    results |= {name: {} for name in runs}
    for (name, metric), total in totals.items():
        results[name][metric] = total / count
    for (name, kind), part in sums.items():
        end = f"_{kind}" if kind else ""
        results[name]["is" + end], results[name]["is_std" + end] = inception_score(part)
        if kind and count > 1:
            both = (*mean_and_covariance(part), *mean_and_covariance(sums["real", ""]))
            results[name]["fid" + end] = frechet_distance(*both)
    if is_main():
        about = {"data": args.data, "images": int(count), "unreadable": unread}
        about |= {k: getattr(args, k) for k in ("image_size", "patch_size", "mask_ratio", "seed")}
        about |= {"inception": what, "checkpoints": {name: str(r.path) for name, r in runs.items()}}
        (out / "eval.json").write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    print_table(results, runs, int(count))
    if is_main():
        draw_figures(out / "pictures", runs, val_set, args)
    say(f"done: {out}/eval.json, {out}/pictures/")


def measure(runs, val_set, inception, args, rank, world):
    """One pass over the images -> (totals, sums for IS and FID, unreadable images left out).

    totals: {"images": number, (run's name, metric): sum}. sums: {(run's name, kind):
    `inception_sums`}, ("real", "") for the originals. Both over all processes.
    """
    device, splits = torch.device(next(iter(runs.values())).device), min(10, len(val_set))
    totals = {"images": 0} | {(name, metric): 0 for name in runs for metric in METRICS}
    sums, unread, found = {}, [], {}

    def count_features(name, kind, images, split):
        if inception is None:
            return
        features, logits = inception(images)
        for key, value in inception_sums(features, logits, split, splits).items():
            sums[name, kind][key] += value

    if inception is not None:  # sums of no images, so that every process has them all
        nothing = torch.zeros(0, 3, 75, 75, device=device)
        for name, kind in [("real", ""), *((name, kind) for name in runs for kind in KINDS)]:
            features, logits = inception(nothing)
            sums[name, kind] = inception_sums(features, logits, torch.zeros(0).long(), splits)
    indices = torch.arange(rank, len(val_set), world)
    loader, done = shard(val_set, args), 0
    for images, noise, _, bad in tqdm(loader, disable=None if is_main() else True, unit="batches"):
        index = indices[done : done + len(images)]
        done += len(images)
        found |= dict(bad)
        kept = ~torch.isin(index, torch.tensor([i for i, _ in bad], dtype=torch.long))
        split = (index[kept] * splits // len(val_set)).to(device)
        real = to_float(images[kept].to(device))
        if not len(real):
            continue
        totals["images"] += len(real)
        count_features("real", "", real, split)
        for name, run in runs.items():
            fake, hidden = reconstruct(run, real, noise[kept].to(device), run.args)
            values, fakes = image_quality(fake, real, hidden)
            for metric, value in values.items():
                totals[name, metric] += value
            for kind, fake in fakes.items():
                count_features(name, kind, fake, split)
    note_bad_images(found, unread, val_set, fate="left out")
    if dist.is_initialized():
        for part in sums.values():
            for tensor in part.values():
                dist.all_reduce(tensor)
    return across_processes(totals, device), sums, len(unread)


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
        for kind in KINDS:
            l1, decibels, similarity = (
                results[name][f"{m}_{kind}"] for m in ("l1", "psnr", "ssim")
            )
            pixels = f"{l1:.4f}  {decibels:5.2f}  {similarity:.3f}"
            line(name if kind == KINDS[0] else "", kind, pixels, results[name])


def draw_figures(folder, runs, val_set, args, rows=8):
    """Figures 2 and 3 of the first images, and every checkpoint's curves, as PNG files.

    reconstruction.png: a column for each checkpoint, its hidden part pasted into the visible
    patches (PAPER SILENT: whether Figure 2's are; MSE trains nothing else). attention.png: the
    last layer's attention of CLS, each head and their mean; of several checkpoints the means side
    by side, and the heads in attention_NAME.png each.
    """
    device = torch.device(next(iter(runs.values())).device)
    images, noise = collate([val_set[0, i] for i in range(min(rows, len(val_set)))])[:2]
    real, noise = to_float(images.to(device)), noise.to(device)
    figure_2, figure_3 = {"original": real}, {"original": real}
    for name, run in runs.items():
        fake, hidden = reconstruct(run, real, noise, run.args)
        figure_2["masked"] = grey_out(real, hidden)
        figure_2[name] = torch.where(hidden > 0, fake, real)
        maps = run.mae.cls_attention(real).cpu()  # (B, heads, side, side)
        heads = {f"head {n + 1}": heat(maps[:, n]) for n in range(maps.shape[1])}
        mean = heat(maps.mean(dim=1))
        figure_3[name] = mean
        end = "" if len(runs) == 1 else "_" + re.sub(r"\W+", "_", name).strip("_")
        save_picture(
            folder / f"attention{end}.png", {"original": real, "mean of heads": mean} | heads
        )
        draw_curves(folder / f"curves{end}.png", Path(run.path).parent / "log.jsonl")
    save_picture(folder / "reconstruction.png", figure_2)
    if len(runs) > 1:
        save_picture(folder / "attention.png", figure_3)


# ---- Benchmark -----------------------------------------------------------------------------------


def benchmark(args, device, world):
    """Time the training step on random images, feature terms active; print one JSON line.

    Steps with a lazy regulariser take longer than the others: the time of a step is the mean, over
    one round of them, of the median of the steps that hold the same place in their rounds. ADA
    runs at p = 0.5 unless --ada-p says otherwise, since it costs nothing at the p = 0 of a start.
    """
    recipe = LOSSES[args.loss]
    args.ada_p = 0.5 if args.ada_p is None else args.ada_p
    run = build_run(args, device)
    generator = torch.Generator().manual_seed(args.seed)
    size, B = args.image_size, args.batch_size
    images = torch.randint(0, 256, (B, 3, size, size), generator=generator, dtype=torch.uint8)
    noise = torch.rand(B, unwrap(run.mae).side ** 2, generator=generator)
    progress, active = new_progress(), recipe["features"] is not None
    set_learning_rates(run, progress, 1, args)
    round_of_steps = math.lcm(
        args.path_every if recipe["path"] and args.path_weight else 1,
        args.r1_every if recipe["adversary"] and args.r1_gamma else 1,
    )
    steps = math.ceil(args.benchmark / round_of_steps) * round_of_steps
    seconds = [[] for _ in range(round_of_steps)]
    for number in range(-2, steps):  # two steps to warm up, with all that a step can hold
        seeds = torch.arange(B) + B * number + 2 * B
        progress["step"] = max(0, number) % round_of_steps
        began = time.perf_counter()
        accumulate(run, [(images, noise, seeds)] * args.accum, active, progress, args)
        update(run, apply=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 0:
            seconds[progress["step"]].append(time.perf_counter() - began)
    step_time = statistics.mean(statistics.median(place) for place in seconds)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts = [sum(p.numel() for p in net.parameters()) for net in (run.mae, run.disc) if net]
    row = {
        "loss": args.loss,
        "model": args.model,
        "image_size": size,
        "batch_size": B * args.accum * world,
        "device": device.type,
        "amp": str(run.dtype or torch.float32).removeprefix("torch."),
        "seconds_per_step": round(step_time, 4),
        "images_per_second": round(B * args.accum * world / step_time, 2),
        "peak_memory_mib": round(peak / 2**20),
        "parameters_g": counts[0],
        "parameters_d": counts[1] if run.disc else 0,
    }
    say(json.dumps(row))


def benchmark_all(argv):
    """`--benchmark --loss all`: the paper's Table 4, a process for each row of LOSSES -> status."""
    say("loss             relative time  seconds a step  images/s  peak MiB  parameters G, D")
    base = None
    for loss in LOSSES:
        command = [sys.executable, __file__, *argv, "--loss", loss]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        row = json.loads(done.stdout.splitlines()[-1])
        base = base or row["seconds_per_step"]
        sizes = " ".join(f"{row[f'parameters_{n}'] / 1e6:7.1f} M" for n in "gd")
        say(f"{loss:15}  {row['seconds_per_step'] / base:13.2f}  {row['seconds_per_step']:14.3f}  "
            f"{row['images_per_second']:8.2f}  {row['peak_memory_mib']:8}  {sizes}")  # fmt: skip
    return 0


# ---- Data ----------------------------------------------------------------------------------------


def open_data(args):
    """-> (training, validation) source of --data; one line and status 2 if that cannot be."""
    if args.data == "data/imagenet" and not Path(args.data).exists():
        fail("data/imagenet does not exist: put ImageNet there, or give --data PATH, "
             "--data shapes (drawn on the fly), or --demo")  # fmt: skip
    try:
        with first_of_a_node_first():  # it downloads what is to be downloaded
            sources = open_sources(args.data, image_size=args.image_size, seed=args.seed)
    except (ValueError, OSError) as error:  # what is wrong with it, and the remedy
        fail(str(error))
    if getattr(sources[1], "held_out", False):
        say(f"{args.data} has no val/: {len(sources[1])} of its {sum(map(len, sources))} images, a "
            f"choice of seed {args.seed}, are held out")  # fmt: skip
    return sources


def shard(dataset, args):
    """Loader of this process's part of a data set: images rank, rank + world, ... in order.

    No padding, so that over all processes each image is counted once.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    keys = [(0, i) for i in range(rank, len(dataset), world_size())]
    return build_loader(dataset, keys, batch_size=args.batch_size, workers=args.workers)


def build_data(args):
    """-> (training, validation) `PretrainSet`; one line and status 2 if that cannot be."""
    train_source, val_source = open_data(args)
    common = dict(
        image_size=args.image_size,
        num_patches=(args.image_size // args.patch_size) ** 2,
        seed=args.seed,
    )
    train_set = PretrainSet(
        train_source,
        crop_min=args.crop_min,
        flip=args.flip,
        jitter=args.jitter,
        limit=args.limit_images,
        **common,
    )
    if len(train_set) < images_per_step(args) and not args.eval:
        fail(f"{len(train_set)} training images are fewer than the {images_per_step(args)} of one "
             "step; lower --batch-size")  # fmt: skip
    limit = args.val_images or (None if args.eval else 256)
    return train_set, PretrainSet(val_source, augment=False, limit=limit, **common)


# ---- The training loop ---------------------------------------------------------------------------


def agree(run, terms, batches, signalled, progress, dataset):
    """Share what the processes saw in a step, so that all of them act alike.

    terms: {name: scalar} of this process. Returns ({name: mean over processes}, has any process
    been told to stop).
    """
    bad = {index: reason for *_, found in batches for index, reason in found}
    bad = {index: reason for index, reason in bad.items() if index not in progress["bad_images"]}
    report = across_processes({"stop": signalled, "bad": len(bad), **terms}, run.device)
    stopping, any_bad = report.pop("stop") > 0, report.pop("bad") > 0
    if any_bad:
        note_bad_images(bad, progress["bad_images"], dataset)
    return {name: total / world_size() for name, total in report.items()}, stopping


def note_bad_images(found, known, dataset, fate="replaced"):
    """Add every process's newly found unreadable images to `known`; name each; end if too many.

    found: {index: reason} of this process. known: list of indices. fate: what became of them.
    Call on all processes.
    """
    everyone = [found]
    if dist.is_initialized():
        everyone = [None] * world_size()
        dist.all_gather_object(everyone, found)
    for index, reason in {k: v for part in everyone for k, v in part.items()}.items():
        known.append(index)
        say(f"unreadable, {fate}: {dataset.name(index)} ({reason})", sys.stderr)
    allowed = min(dataset.bad_limit(), len(dataset) - 1)
    if len(known) > allowed:
        fail(f"{len(known)} of {len(dataset)} images are unreadable, a run allows {allowed}; "
             "repair or remove them, then continue")  # fmt: skip


def count_step(progress, report, seconds):
    """Book one step: report is {name: float}, or {} if its loss was not finite."""
    progress["step"] += 1
    progress["epoch_step"] += 1
    progress["seconds"] += seconds
    progress["counted"] += bool(report)
    for name, value in report.items():
        progress["sums"][name] = progress["sums"].get(name, 0.0) + value


def finish_epoch(run, progress, lr, val, args):
    """Validate, draw, log, and move `progress` on to the next epoch. val: from `fixed_batch`."""
    epoch, counted = progress["epoch"], max(1, progress["counted"])
    row = {"epoch": epoch, "step": progress["step"], "lr": lr}
    row["features_active"] = features_active(args, epoch)
    row |= {name: total / counted for name, total in progress["sums"].items()}
    if run.ada is not None:
        row["ada_p"] = float(run.ada.p)
    images, noise, bad_validation = val
    if epoch % args.eval_every == 0 or epoch == args.epochs:
        row |= validate(run, images, noise, args)
    if args.norm_pix_loss:
        row["psnr_uses_true_patch_statistics"] = True
    row["images_per_second"] = progress["epoch_step"] * images_per_step(args) / progress["seconds"]
    row |= {"seconds": progress["seconds"]}
    row["bad_images"] = len(progress["bad_images"]) + bad_validation
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    if is_main():
        with open(Path(args.out) / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        if epoch % args.picture_every == 0 or epoch == args.epochs:
            picture = Path(args.out) / "pictures" / f"epoch_{epoch:04d}.png"
            picture.parent.mkdir(exist_ok=True)
            draw_reconstructions(picture, run, images[:8], noise[:8], args)
            draw_curves(picture.parent / "curves.png", Path(args.out) / "log.jsonl")
    say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    kept = {name: progress[name] for name in ("step", "bad_images", "layout", "path_mean")}
    progress |= new_progress() | kept | {"epoch": epoch + 1}


def fit(
    run, train_set, rank, args, *, schedule, gradients, update, end_epoch,
    must_fit=ARGUMENTS_THAT_MUST_FIT, script="train.py",
):  # fmt: skip
    """Train to the end of --epochs or --steps -> (signal that stopped it or 0, progress).

    Continues and saves checkpoints by args; finetune.py trains with it too. What differs:
    schedule(run, progress, steps_per_epoch, args) sets learning rates -> the one to log,
    gradients(batches, progress) -> {name: term}, update(run, apply) steps the optimisers,
    end_epoch(progress, learning_rate) measures, logs and moves progress on. must_fit and script:
    see `resume`.
    """
    out, world = Path(args.out), world_size()
    layout = {"images a step": images_per_step(args), "training images": len(train_set)}
    progress = resume(args, run, out / "checkpoint.pt", layout, must_fit, script)
    if across_processes({"step": progress["step"]}, run.device)["step"] != world * progress["step"]:
        fail(f"the nodes disagree on {out}/checkpoint.pt: put --out on a disk that they share")
    if progress["epoch"] > args.epochs:
        say(f"{out}/checkpoint.pt has all its {args.epochs} epochs; raise --epochs")
        return 0, progress
    if args.steps and progress["step"] >= args.steps:
        say(f"{out}/checkpoint.pt has its {args.steps} steps; raise --steps, or leave it off")
        return 0, progress
    if is_main():
        start_output(out, progress["epoch"])
    sampler = EpochSampler(
        len(train_set), global_batch=images_per_step(args), seed=args.seed, rank=rank, world=world
    )
    loader = build_loader(train_set, sampler, batch_size=args.batch_size, workers=args.workers)
    stop, nonfinite = catch_stop_signals(), 0

    for epoch in range(progress["epoch"], args.epochs + 1):
        sampler.epoch, sampler.start = epoch, progress["epoch_step"]
        bar, passes, clock = progress_bar(sampler, args), iter(loader), time.perf_counter()
        while batches := list(itertools.islice(passes, args.accum)):  # one step
            lr = schedule(run, progress, sampler.steps, args)
            terms = gradients(batches, progress)
            means, stopping = agree(run, terms, batches, stop["signal"], progress, train_set)

            finite = all(math.isfinite(value) for value in means.values())
            update(run, apply=finite)
            nonfinite = 0 if finite else nonfinite + 1
            if not finite:
                say(f"step {progress['step'] + 1}: loss is not finite {means}; update skipped")
            if nonfinite == MAX_NONFINITE:
                fail(f"{nonfinite} non-finite losses in a row; {out}/checkpoint.pt is untouched: "
                     "lower the learning rates, or try --amp off")  # fmt: skip

            clock, began = time.perf_counter(), clock
            count_step(progress, means if finite else {}, clock - began)
            bar.update(images_per_step(args))
            bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()})
            stopping = stopping or progress["step"] == args.steps
            epoch_done = progress["epoch_step"] == sampler.steps
            due = args.save_steps and progress["step"] % args.save_steps == 0
            if (stopping or due) and not epoch_done and not nonfinite:
                save_checkpoint(out / "checkpoint.pt", run, progress, args)
            if stopping:
                break
        bar.close()
        if epoch_done:
            end_epoch(progress, lr)
            if stopping or epoch % args.save_every == 0 or epoch == args.epochs:
                save_checkpoint(out / "checkpoint.pt", run, progress, args)
        if stopping:
            say(f"stopped at step {progress['step']}; --resume {out}/checkpoint.pt continues")
            break
    else:
        say(f"done: results are in {out}")
    return stop["signal"], progress


# ---- Command line --------------------------------------------------------------------------------


def at_least(low, kind=int):
    """argparse type: a number that is `low` or more."""

    def parse(text):
        value = kind(text)
        if not low <= value < math.inf:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not a number of {low} or more")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its messages
    return parse


def build_parser():
    """Every flag of train.py; `--help` is the manual. Paper values are the defaults."""
    parser = argparse.ArgumentParser(
        description="Pre-train a (Perceptual) masked autoencoder.",
        usage="train.py [--demo] [--loss ROW] [--data PATH|shapes|cifar10] [flags; see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag, positive = argparse.BooleanOptionalAction, at_least(1e-12, float)

    g = parser.add_argument_group("what to train")
    g.add_argument("--demo", action="store_true", help="small preset on `shapes`, 4 minutes on CPU")
    g.add_argument(
        "--loss",
        choices=[*LOSSES, "all"],
        default="mse",
        help="row of the paper's tables; all: with --benchmark, each in turn",
    )
    g.add_argument(
        "--eval",
        action="store_true",
        help="measure --resume's checkpoints: Table 1, Figures 2 and 3; no training",
    )
    g.add_argument(
        "--inception-weights",
        default="torchvision",
        metavar="FILE|torchvision|none",
        help="for IS and FID, with --eval; the file of published FIDs is "
        "pt_inception-2015-12-05-6726825d.pth",
    )
    g.add_argument("--model", choices=MAE_SIZES, default="base", help="paper: base, large")
    g.add_argument(
        "--arch",
        choices=["auto", "mae", "msg_mae"],
        default="auto",
        help="auto: what the paper pairs with the loss",
    )
    g.add_argument("--image-size", type=at_least(16), default=224, help="side in pixels")
    g.add_argument("--patch-size", type=at_least(2), default=16, help="pixels, a power of two")
    g.add_argument("--mask-ratio", type=positive, default=0.75, help="hidden part of the patches")
    g.add_argument(
        "--norm-pix-loss", action=flag, default=False, help="normalise each target patch; mse only"
    )

    g.add_argument(
        "--init",
        metavar="FILE",
        help="start from the encoder, and the decoder if there is one, of a checkpoint, of a "
        "published MAE, or of timm's or Hugging Face's",
    )
    g.add_argument("--export", metavar="FILE", help="write --resume's weights; no training")
    g.add_argument(
        "--format", choices=["mae", "timm", "hf"], default="mae", help="whose names --export takes"
    )

    g = parser.add_argument_group("data")
    g.add_argument("--data", default="data/imagenet", help="folder of images, shapes, or cifar10")
    g.add_argument("--limit-images", type=at_least(1), help="train on so many, a seeded choice")
    g.add_argument(
        "--val-images",
        type=at_least(1),
        help="held-out images to measure; None = 256 in training, all with --eval",
    )
    g.add_argument("--crop-min", type=positive, default=0.2, help="smallest crop, part of the area")
    g.add_argument("--flip", action=flag, default=True, help="mirror half of the images")
    g.add_argument("--jitter", type=at_least(0, float), default=0.4, help="colour jitter; 0 = none")
    g.add_argument(
        "--workers", type=at_least(0), default=min(8, os.cpu_count()), help="loaders a process"
    )

    g = parser.add_argument_group("weights of the loss terms (eq. 2, 3 and 6)")
    g.add_argument("--pixel-weight", type=at_least(0, float), default=1.0, help="of the pixel term")
    g.add_argument(
        "--pixel-scales",
        choices=["all", "finest"],
        default="all",
        help="scales of the pixel term, where there are several",
    )
    g.add_argument("--alpha", type=at_least(0, float), default=0.85, help="SSIM against L1, eq. 2")
    g.add_argument(
        "--dvae-weights", metavar="FILE", help="OpenAI's encoder.pkl as published; for dvae_p"
    )
    g.add_argument(
        "--vgg-weights", metavar="FILE", help="torchvision's vgg16; None = download; for vgg_p"
    )
    g.add_argument("--delta-f", type=at_least(0, float), default=0.05, help="feature term, eq. 3")
    g.add_argument("--delta-s", type=at_least(0, float), default=40.0, help="style term, eq. 3")
    g.add_argument(
        "--adversarial-weight",
        type=at_least(0, float),
        help="of eq. 5 in eq. 6; None = by --loss: 1, as the paper, or 0.1 where D sees all scales",
    )
    g.add_argument(
        "--feature-every",
        type=at_least(1),
        default=2,
        help="terms on D's features are active in epochs divisible by this (epochs count from 1); "
        "paper: even epochs, 1 = always",
    )

    g = parser.add_argument_group("optimisation of G")
    # PAPER SILENT: it contradicts itself on epochs of ViT-L (1600 or 1200), batch (16 or 32) and
    # Adam's second beta (.95 or .999), and does not say whether the learning rate scales with the
    # batch. Ours: 300 epochs for any model, 32 a process, MAE's .95, and MAE's linear scaling.
    g.add_argument("--epochs", type=at_least(1), default=300, help="paper: 300 (base)")
    g.add_argument(
        "--warmup-epochs", type=at_least(0, float), help="None = 40/300 of the epochs, as the paper"
    )
    g.add_argument("--batch-size", type=at_least(1), default=32, help="images a process and pass")
    g.add_argument("--accum", type=at_least(1), default=1, help="passes a step")
    g.add_argument(
        "--blr", type=positive, default=1.5e-4, help="learning rate for 256 images a step; scales"
    )
    g.add_argument("--lr", type=positive, help="learning rate as it is, instead of --blr")
    g.add_argument("--betas", type=at_least(0, float), nargs=2, default=[0.9, 0.95], help="AdamW")
    g.add_argument("--weight-decay", type=at_least(0, float), default=0.05, help="of matrices")

    g = parser.add_argument_group("discriminator D")
    g.add_argument("--d-channels", type=at_least(1), help="at the finest scale; None = by --model")
    g.add_argument("--d-max", type=at_least(1), help="most channels; None = by --model")
    g.add_argument("--d-lr", type=positive, help="learning rate of D; None = by --loss")
    g.add_argument("--d-betas", type=at_least(0, float), nargs=2, help="Adam; None = by --loss")

    g = parser.add_argument_group("regularisation (StyleGANv2-ADA row; R1 works with any D)")
    g.add_argument("--ada-target", type=float, default=0.6, help="of r_t = E sign(D(real) - 1/2)")
    g.add_argument(
        "--ada-images", type=at_least(1), default=500_000, help="in which p can go from 0 to 1"
    )
    g.add_argument("--ada-p", type=at_least(0, float), help="fixed augmentation probability p")
    g.add_argument("--path-weight", type=at_least(0, float), default=2.0, help="of path lengths")
    g.add_argument("--path-every", type=at_least(1), default=4, help="steps between path lengths")
    g.add_argument(
        "--r1-gamma",
        type=at_least(0, float),
        default=0.0,
        help="R1 weight; 0 = off: paper names none",
    )
    g.add_argument("--r1-every", type=at_least(1), default=16, help="steps between R1 penalties")

    g = parser.add_argument_group("the run")
    g.add_argument(
        "--amp", choices=["auto", "off", "fp16", "bf16"], default="auto", help="autocast"
    )
    g.add_argument("--seed", type=at_least(0), default=0, help="of weights, data and masks")
    g.add_argument(
        "--out",
        help="folder for everything written; None = runs/LOSS, or with "
        "--eval that of the first checkpoint",
    )
    g.add_argument(
        "--resume",
        nargs="+",
        default=["auto"],
        metavar="auto|off|PATH",
        help="auto: continue OUT/checkpoint.pt if there is one; off: start anew; --eval takes "
        "several",
    )
    g.add_argument(
        "--eval-every",
        type=at_least(1),
        default=1,
        help="epochs between measurements; and the last",
    )
    g.add_argument("--save-every", type=at_least(1), default=1, help="epochs between checkpoints")
    g.add_argument("--save-steps", type=at_least(1), help="steps between checkpoints, in addition")
    g.add_argument("--picture-every", type=at_least(1), default=10, help="epochs between pictures")
    g.add_argument("--steps", type=at_least(1), help="stop after so many steps; the schedule stays")
    g.add_argument(
        "--benchmark",
        type=at_least(1),
        metavar="STEPS",
        help="time so many steps, whole rounds of lazy terms; no training",
    )
    return parser


def parse_args(argv=None):
    """Command line -> namespace with every default filled in. Ends with status 2 on a conflict."""
    parser = build_parser()
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)  # flags that are given still win
    args = parser.parse_args(argv)
    if args.loss == "all":
        if not args.benchmark or "RANK" in os.environ:
            fail("--loss all is for --benchmark, without torchrun; name one row")
        return args
    channels, most = DISCRIMINATOR_WIDTHS[args.model]
    args.d_channels, args.d_max = args.d_channels or channels, args.d_max or most
    if args.arch == "auto":
        args.arch = LOSSES[args.loss]["arch"]
    if args.adversarial_weight is None:
        args.adversarial_weight = LOSSES[args.loss]["weight"]
    rate, betas = DISCRIMINATOR_ADAM[LOSSES[args.loss]["adversary"] or "conv"]
    args.d_lr, args.d_betas = args.d_lr or rate, args.d_betas or list(betas)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs * 40 / 300
    args.lr = args.lr or args.blr * images_per_step(args) / 256
    beside = str(Path(args.resume[0]).parent) if args.eval else f"runs/{args.loss}"
    args.out = args.out or beside
    if args.norm_pix_loss and LOSSES[args.loss]["pixel"] != "mse":
        fail(f"--norm-pix-loss is for --loss mse: {args.loss} compares whole images")
    if args.loss == "ms_ssim" and args.image_size < 24:
        fail(f"--image-size {args.image_size} has no 4 scales for MS-SSIM; use 24 or more")
    patches = (args.image_size // args.patch_size) ** 2
    fits = args.image_size % args.patch_size == 0  # if not, `build_mae` says so
    if fits and not 1 <= int(patches * (1 - args.mask_ratio)) < patches:
        fail(f"--mask-ratio {args.mask_ratio} of {patches} patches hides all of them or none")
    if args.ada_p is not None and args.ada_p > 1:
        fail(f"--ada-p {args.ada_p} is a probability; give 0 to 1")
    if args.crop_min > 1:
        fail(f"--crop-min {args.crop_min} is a part of the area; give 1 or less")
    if max(*args.betas, *args.d_betas) >= 1:
        fail("--betas and --d-betas must be below 1")
    return args


def images_per_step(args):
    """Images of one optimiser step, over all processes."""
    return args.batch_size * args.accum * int(os.environ.get("WORLD_SIZE", 1))


# ---- Main ----------------------------------------------------------------------------------------


def pretrain(args, device, rank, world):
    """Train the row that args name -> the signal that stopped it, or 0."""
    run = build_run(args, device)
    if args.init:
        initialise(unwrap(run.mae), args)
    train_set, val_set = build_data(args)
    val = fixed_batch(val_set, rank, world)

    def gradients(batches, progress):
        return accumulate(run, batches, features_active(args, progress["epoch"]), progress, args)

    def end_epoch(progress, lr):
        finish_epoch(run, progress, lr, val, args)

    hooks = dict(schedule=set_learning_rates, gradients=gradients, update=update)
    stopped, _ = fit(run, train_set, rank, args, **hooks, end_epoch=end_epoch)
    if args.demo and not stopped:
        say(f"next: your own images, python train.py --loss {args.loss} --data PATH")
    return stopped


def main(argv=None):
    args = parse_args(argv)
    if args.loss == "all":
        return benchmark_all(sys.argv[1:] if argv is None else argv)
    if args.export:
        return export(args)
    device, rank, world = start_processes()
    stopped = 0
    if args.benchmark:
        benchmark(args, device, world)
    elif args.eval:
        evaluate(args, device, rank, world)
    else:
        stopped = pretrain(args, device, rank, world)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full: lower --batch-size (and raise --accum as much)"
        fail(message, everywhere=True)
