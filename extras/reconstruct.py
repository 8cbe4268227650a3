"""What autoencoders paint: Table 1 and Figures 2 and 3 of the paper.

    python -m extras.reconstruct --checkpoint runs/mse/checkpoint.pt --data path/to/images
    python -m extras.reconstruct --checkpoint runs/mse/checkpoint.pt runs/msg_gan_p/checkpoint.pt
    python -m extras.reconstruct --checkpoint mae_visualize_vit_large_ganloss.pth --data photo.jpg
    torchrun --nproc_per_node=8 -m extras.reconstruct --checkpoint runs/mse/checkpoint.pt

Takes checkpoints of train.py, of extras/siblings.py's rows that paint, and files of other projects
that hold a decoder, as the published MAE or Hugging Face name it. All of them see the same images
under the same random masks: --data's validation images, or the photographs that it names. Two
kinds of reconstruction are measured: "full", as predicted, and "pasted", its hidden part alone
between the true visible patches (`losses.KINDS`).

Writes to OUT: eval.json, with L1, PSNR, SSIM, IS and FID (Table 1), and pictures/:
reconstruction.png (Figure 2), attention.png (Figure 3), and of several checkpoints
attention_NAME.png each. IS and FID need a network's weights: published FIDs those of
--inception-weights pt_inception-2015-12-05-6726825d.pth; torchvision's, the default, are
downloaded. In order: where CLS looks, IS and FID, Inception, the measuring, the pictures.

README's picture of five losses:

    ROWS="mse ms_ssim ls_gan_p msg_gan_p stylegan2_ada_p"
    for ROW in $ROWS; do
        python train.py --loss $ROW --out runs/figure2/$ROW --model nano --data shapes-large \\
            --image-size 64 --patch-size 4 --limit-images 10000 --epochs 10 --batch-size 32 \\
            --lr 2e-3 --warmup-epochs 1 --jitter 0 --crop-min 0.5
    done
    python -m extras.reconstruct --data shapes-large --val-images 1000 --inception-weights none \\
        --checkpoint $(for ROW in $ROWS; do echo runs/figure2/$ROW/checkpoint.pt; done)
"""

import argparse
import hashlib
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torchvision.models import Inception_V3_Weights, inception_v3
from tqdm import tqdm

import data
import finetune
import losses
import model
import train
from train import fail, is_main, say

SIZES = ("image_size", "patch_size", "mask_ratio")  # in which all checkpoints must agree
GET = (
    "give --inception-weights pt_inception-2015-12-05-6726825d.pth, a release of "
    "github.com/mseitzer/pytorch-fid (fid_weights)"
)


# ---- Figure 3: where CLS looks -------------------------------------------------------------------


@torch.no_grad()
def cls_attention(vit, images):
    """Where CLS looks in the last block (paper, Figure 3): (B, heads, side, side).

    vit: `model.ViT`. images: (B, 3, H, W) in [0, 1], nothing hidden. A map's values, with the
    weight that CLS keeps for itself, add up to 1.
    """
    last = vit.blocks[-1]
    _, [x] = vit.encode(images, levels=[len(vit.blocks) - 1])  # what the last block takes
    q, k, _ = last.attn.split(last.norm1(x))  # (B, heads, 1 + N, C / heads)
    weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(dim=3)  # of all tokens
    return weights[:, :, 0, 1:].unflatten(2, (vit.side, vit.side))


# ---- IS and FID ----------------------------------------------------------------------------------


def inception_sums(features, logits, split, splits):
    """What IS and FID need of a batch, as sums to be added up over batches and processes.

    features: (B, C), pooled Inception features. logits: (B, K). split: (B,), to which of the
    `splits` parts of IS each image belongs. Returns {name: float64 tensor}, whose sizes do not
    depend on the number of images.
    """
    features, log_p = features.double(), logits.double().log_softmax(dim=1)
    p = log_p.exp()
    member = F.one_hot(split, splits).T.to(p)  # (splits, B)
    return {
        "images": member.sum(dim=1),  # (splits,)
        "features": features.sum(dim=0),  # (C,)
        "products": features.T @ features,  # (C, C)
        "p": member @ p,  # (splits, K)
        "p_log_p": member @ (p * log_p).sum(dim=1),  # (splits,)
    }


def inception_score(sums):
    """Inception Score (Salimans et al. 2016) -> (mean, standard deviation) over its splits.

    exp of the mean KL divergence of p(class | image) from its mean over the split's images: 1 at
    the worst, the number of classes at the best. sums: from `inception_sums`.
    """
    kept = sums["images"] > 0
    images, mean_p = sums["images"][kept], sums["p"][kept] / sums["images"][kept, None]
    divergence = sums["p_log_p"][kept] / images - torch.xlogy(mean_p, mean_p).sum(dim=1)
    scores = divergence.exp()
    return scores.mean().item(), scores.std(correction=0).item()


def mean_and_covariance(sums):
    """`inception_sums` -> mean (C,) and unbiased covariance (C, C) of the features, float64."""
    n = sums["images"].sum()
    mean = sums["features"] / n
    return mean, (sums["products"] - n * torch.outer(mean, mean)) / (n - 1)


def frechet_distance(mean_x, cov_x, mean_y, cov_y):
    """Fréchet distance of two Gaussians, the D of FID (Heusel et al. 2017) -> float.

    |mean_x - mean_y|^2 + Tr(cov_x + cov_y - 2 (cov_x cov_y)^(1/2)), float64. The root's trace is
    taken from the eigenvalues of R^T cov_y R with cov_x = R R^T: real and symmetric, where a root
    of the product itself is neither. Directions without variance, which any set of fewer images
    than features has, are dropped: the root would magnify their rounding errors.
    """

    def positive(eigenvalues):
        return eigenvalues > eigenvalues.max() * len(cov_x) * torch.finfo(cov_x.dtype).eps

    values, vectors = torch.linalg.eigh(cov_x)
    kept = positive(values)
    root = vectors[:, kept] * values[kept].sqrt()  # R, (C, r)
    products = torch.linalg.eigvalsh(root.T @ cov_y @ root)
    trace = products[positive(products)].sqrt().sum()
    distance = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * trace
    return distance.item()


# ---- Inception -----------------------------------------------------------------------------------


class InceptionFeatures(nn.Module):
    """torchvision's Inception v3 as FID and IS use it.

    weights: {name: tensor}, either those with which published FIDs are computed, converted from
    TensorFlow ("pt_inception-2015-12-05-6726825d.pth", 1008 classes), or torchvision's own (1000
    classes); ValueError, naming what does not fit, for anything else. The published network pools
    differently from torchvision's in nine blocks: averages leave the padding out, and the last
    block takes a maximum.
    """

    def __init__(self, weights):
        super().__init__()
        shape = tuple(getattr(weights.get("fc.bias"), "shape", ()))
        if shape not in ((1000,), (1008,)):
            raise ValueError(f"fc.bias has shape {shape}, not (1008,) (published) or (1000,)")
        classes = shape[0]
        weights = {k: v for k, v in weights.items() if not str(k).startswith("AuxLogits")}
        network = inception_v3(num_classes=classes, aux_logits=False, init_weights=False)
        # Older files do not count batches; the count is of no use in evaluation.
        counters = {k: v for k, v in network.state_dict().items() if "num_batches_tracked" in k}
        weights = counters | weights
        if faults := model.misfits(network, weights):
            raise ValueError(faults)
        network.load_state_dict(weights)
        if classes == 1008:
            average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
            for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
                self.pool_instead(getattr(network, f"Mixed_{name}"), average)
            self.pool_instead(network.Mixed_7c, nn.MaxPool2d(3, stride=1, padding=1))
        self.classify, network.fc = network.fc, nn.Identity()
        self.network = network.eval().requires_grad_(False)
        self.sizes = (self.classify.in_features, self.classify.out_features)  # of what it returns

    @staticmethod
    def pool_instead(block, pool):
        """Feed a block's `branch_pool` from `pool`, whatever torchvision's own code pools."""

        def remember(block, inputs):
            block.pooled = pool(inputs[0])

        block.register_forward_pre_hook(remember)
        block.branch_pool.register_forward_pre_hook(lambda *_: (block.pooled,))

    def forward(self, images):
        """Images (B, 3, H, W) in [0, 1] -> (features (B, 2048), logits (B, classes))."""
        x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        features = self.network(2 * x - 1)
        return features, self.classify(features)


# ---- Measuring (Table 1) -------------------------------------------------------------------------


@torch.no_grad()
def measure(runs, val_set, inception, args, device):
    """One pass over the images -> (totals, sums for IS and FID, unreadable images left out).

    PAPER: sec. 5.1, "over the IN1K validation set". PAPER SILENT: FID's reference, IS's splits,
    Inception. Ours: the validation set itself, 10 splits, the network of --inception-weights.
    totals: {"images": number, (run's name, metric): sum}. sums: {(run's name, kind):
    `inception_sums`}, ("real", "") for the originals; {} without Inception. Both over all
    processes.
    """
    splits = min(10, len(val_set))  # of IS
    totals = {"images": 0} | {(name, metric): 0 for name in runs for metric in losses.METRICS}
    sums, unread, found = {}, [], {}
    if inception is not None:  # sums of no images, so that every process has them all
        nothing = [torch.zeros(0, n, device=device) for n in inception.sizes]
        nothing.append(torch.zeros(0, dtype=torch.long, device=device))
        for key in [("real", ""), *((name, kind) for name in runs for kind in losses.KINDS)]:
            sums[key] = inception_sums(*nothing, splits)

    def count(name, kind, images, split):
        if inception is not None:
            for key, value in inception_sums(*inception(images), split, splits).items():
                sums[name, kind][key] += value

    indices = torch.arange(train.rank(), len(val_set), train.world_size())
    loader, done = finetune.shard(val_set, args), 0
    hidden_bar = None if is_main() else True  # None: on a terminal alone
    for images, mask_noise, _, bad in tqdm(loader, disable=hidden_bar, unit="batches"):
        index = indices[done : done + len(images)]
        done += len(images)
        found |= dict(bad)
        kept = finetune.readable(index, bad)
        if not kept.any():
            continue
        split = (index[kept] * splits // len(val_set)).to(device)
        real, mask_noise = data.to_float(images[kept].to(device)), mask_noise[kept].to(device)
        totals["images"] += len(real)
        count("real", "", real, split)
        for name, run in runs.items():
            fake, hidden = train.reconstruct(run, real, mask_noise, run.args)
            values, fakes = losses.image_quality(fake, real, hidden)
            for metric, value in values.items():
                totals[name, metric] += value
            for kind, fake in fakes.items():
                count(name, kind, fake, split)
    train.note_bad_images(found, unread, val_set, fate="left out")
    if dist.is_initialized():
        for tensor in (tensor for part in sums.values() for tensor in part.values()):
            dist.all_reduce(tensor)
    return train.sum_over_processes(totals, device), sums, len(unread)


def as_results(runs, totals, sums):
    """What `measure` returned -> {"real" (with Inception) or run's name: {metric: mean}}."""
    count = totals["images"]
    results = ({"real": {}} if sums else {}) | {
        name: {metric: totals[name, metric] / count for metric in losses.METRICS} for name in runs
    }
    for (name, kind), part in sums.items():
        end = f"_{kind}" if kind else ""
        results[name]["is" + end], results[name]["is_std" + end] = inception_score(part)
        if kind and count > 1:
            of_real = mean_and_covariance(sums["real", ""])
            results[name]["fid" + end] = frechet_distance(*mean_and_covariance(part), *of_real)
    return results


def print_table(results, count):
    """Table 1 on the screen: for each checkpoint its kinds of reconstruction, and the hidden part.

    IS and FID stand there where they were measured.
    """
    width, fill = max(map(len, ["original", *results])), 0

    def line(name, kind, pixels, row):
        end, scores = f"_{kind}" if kind else "", ""
        if "is" + end in row:
            scores = f"{row['is' + end]:.2f} +- {row['is_std' + end]:.2f}"
        if "fid" + end in row:
            scores = f"{scores:>15}  {row['fid' + end]:8.2f}"
        say(f"{name:{width}}  {kind:6}  {pixels:20}  {scores:>15}".rstrip())

    say(f"images: {count}; L1 of pixels in [0, 1], PSNR in dB")
    heads = "               IS       FID" if "real" in results else ""
    say(f"{'':{width}}              L1   PSNR   SSIM{heads}")
    for name, row in results.items():
        if name == "real":
            line("original", "", "", row)
            continue
        for kind in losses.KINDS:
            l1, decibels, similarity = (row[f"{m}_{kind}"] for m in ("l1", "psnr", "ssim"))
            pixels = f"{l1:.4f}  {decibels:5.2f}  {similarity:.3f}"
            line(name if kind == losses.KINDS[0] else "", kind, pixels, row)
        line("", "hidden", f"{'':6}  {row['psnr']:5.2f}  {row['ssim']:.3f}", {})
        fill = row["psnr_mean_fill"]
    say(f"hidden patches in the mean visible colour: PSNR {fill:.2f}")


# ---- Pictures (Figures 2 and 3) ------------------------------------------------------------------


HEAT_COLOURS = ((5, 3, 25), (85, 20, 110), (190, 55, 85), (248, 145, 30), (252, 250, 180))


def heat(maps):
    """Maps (B, h, w), each stretched to its range -> colours (B, 3, h, w), dark is low."""
    colours = torch.tensor(HEAT_COLOURS).T / 255  # (3, anchors)
    low, high = (f(maps, dim=(1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    position = (maps - low) / (high - low).clamp(min=1e-12) * (colours.shape[1] - 1)
    left = position.floor().clamp(max=colours.shape[1] - 2).long()
    mixed = torch.lerp(colours[:, left], colours[:, left + 1], position - left)  # (3, B, h, w)
    return mixed.transpose(0, 1)


def draw_figures(folder, runs, val_set, device):
    """Figures 2 and 3 of the first eight images, as PNG files.

    reconstruction.png: a column for each checkpoint, its hidden part pasted into the visible
    patches (PAPER SILENT: whether Figure 2's are; MSE trains nothing else). attention.png: the
    last layer's attention of CLS, each head and their mean; of several checkpoints the means side
    by side, and the heads in attention_NAME.png each.
    """
    images, mask_noise = data.collate([val_set[0, i] for i in range(min(8, len(val_set)))])[:2]
    real, mask_noise = data.to_float(images.to(device)), mask_noise.to(device)
    figure_2, figure_3 = {"original": real}, {"original": real}
    for name, run in runs.items():
        fake, hidden = train.reconstruct(run, real, mask_noise, run.args)
        figure_2["masked"] = data.grey_out(real, hidden)
        figure_2[name] = torch.where(hidden > 0, fake, real)
        maps = cls_attention(run.network, real).cpu()  # (B, heads, side, side)
        heads = {f"head {n + 1}": heat(maps[:, n]) for n in range(maps.shape[1])}
        figure_3[name] = mean = heat(maps.mean(dim=1))
        end = "" if len(runs) == 1 else "_" + re.sub(r"\W+", "_", name).strip("_")
        columns = {"original": real, "mean of heads": mean} | heads
        data.save_picture(folder / f"attention{end}.png", columns)
    data.save_picture(folder / "reconstruction.png", figure_2)
    if len(runs) > 1:
        data.save_picture(folder / "attention.png", figure_3)


# ---- Checkpoints and weights ---------------------------------------------------------------------


def build_own(path, checkpoint):
    """What train.py or extras/siblings.py trained, with random weights -> (network, mae, arguments,
    name); see `open_autoencoder`."""
    is_sibling = train.made_by("extras/siblings.py", checkpoint, "mae")
    if not is_sibling and not train.made_by("train.py", checkpoint, "mae"):
        fail(f"{path} is not a checkpoint of train.py: reconstructions need its decoder")
    own = argparse.Namespace(**checkpoint["arguments"])
    if is_sibling:
        from extras import siblings

        if own.loss not in siblings.PAINTS:
            fail(
                f"{path} is of --loss {own.loss}, which paints nothing: see finetune.py, --task knn"
            )
        network = siblings.build_network(own)
        return network, partial(siblings.paint, network), own, own.loss
    network = train.build_autoencoder(own)
    other = own.arch != losses.LOSSES[own.loss]["arch"]
    return network, network, own, own.loss + (f" ({own.arch})" if other else "")


def open_autoencoder(path, norm_pix_loss, dtype, device):
    """A file -> run, as `train.reconstruct` takes it, with name, path, network and seen.

    run: mae, autocast, args. network: the `model.ViT` that is in the file; mae: a function that
    paints with it, of the arguments of `MAE.forward`. norm_pix_loss: was a file that does not
    record it trained on normalised patches? seen: see `train.seen_by`.
    """
    with train.refusals():
        checkpoint = model.load_file(path, "a file of ViT-MAE weights")
        if "script" in checkpoint:
            network, mae, own, name = build_own(path, checkpoint)
            model.load_whole(network, checkpoint["mae"], path)
            seen = train.seen_by(checkpoint)
        else:
            network = mae = model.load_mae(path)
            own = argparse.Namespace(norm_pix_loss=norm_pix_loss, mask_ratio=0.75, seed=0)
            own.image_size, own.patch_size = network.patch_size * network.side, network.patch_size
            name, seen = Path(path).stem, []
    if own.norm_pix_loss:
        name += " (true contrast)"  # see `train.reconstruct`
    network.to(device).eval()
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    run = SimpleNamespace(mae=mae, autocast=autocast, args=own)
    run.name, run.path, run.network, run.seen = name, path, network, seen
    return run


def open_autoencoders(args, device):
    """--checkpoint's autoencoders -> ({name: run}, args with what they settle).

    `SIZES` must agree; the seed is the first checkpoint's.
    """
    runs, first, dtype = {}, None, train.choose_precision(args.amp, device)
    for path in args.checkpoint:
        run = open_autoencoder(path, args.norm_pix_loss, dtype, device)
        first = first or run
        for what in SIZES:
            here, there = getattr(run.args, what), getattr(first.args, what)
            if here != there:
                flag = "--" + what.replace("_", "-")
                fail(f"{path} has {flag} {here}, {first.path} {there}: evaluate them apart")
        runs[f"{run.name} {len(runs) + 1}" if run.name in runs else run.name] = run
    settled = {what: getattr(first.args, what) for what in (*SIZES, "seed")}
    return runs, argparse.Namespace(**vars(args) | settled)


def shares_training_images(folder, seen):
    """Does a folder hold some of `seen`, the --data of a training, beside what it held out?"""
    if (seen / "train").is_dir():  # then all else was not trained on
        seen = seen / "train"
    return seen.is_dir() and (seen in (folder, *folder.parents) or folder in seen.parents)


def build_data(runs, args):
    """The images to measure, with the masks of args.seed; status 2 if checkpoints held out others.

    Photographs, or all images of a folder that no checkpoint was trained on and that has no parts;
    else the validation images.
    """
    paths, folder = list(map(Path, args.data)), args.data[0]
    here = train.folder_of(folder)
    trained_on = any(seen == here for run in runs.values() for seen, _ in run.seen)
    with train.refusals():
        if all(path.is_file() for path in paths):
            source = data.Folder(args.data, [0] * len(paths), ["photographs"])
        elif len(paths) > 1:
            fail("--data takes one folder, or files that exist: " + ", ".join(args.data))
        elif paths[0].is_dir() and not (trained_on or (paths[0] / "train").is_dir()):
            for seen in {seen for run in runs.values() for seen, _ in run.seen}:
                if shares_training_images(Path(here), Path(seen)):
                    fail(
                        f"{folder} holds images that were trained on: give --data {seen}, of which "
                        "the held-out ones are measured, or single photographs"
                    )
            source = data.scan_folder(folder)
        else:
            own = argparse.Namespace(**vars(args) | {"data": folder})
            _, source = train.open_data(own, args.image_size)
    seeds = {run.args.seed for run in runs.values()}
    seeds |= {seed for run in runs.values() for seen, seed in run.seen if seen == here}
    if len(seeds) > 1 and getattr(source, "held_out", False):
        fail(
            f"the checkpoints held out different images (seeds {seeds}): evaluate them apart, or "
            f"keep images for validation in {folder}/val, others in train/"
        )
    return data.PretrainSet(
        source,
        augment=False,
        limit=args.val_images,
        image_size=args.image_size,
        num_patches=(args.image_size // args.patch_size) ** 2,
        seed=args.seed,
    )


def load_inception(args, device):
    """-> (`InceptionFeatures` or None, what it is or why there is none)."""
    source = args.inception_weights
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
            return None, f"none, so neither IS nor FID (cannot be downloaded: {why}); {GET}"
        what = f"torchvision's, not those of published FIDs; for these {GET}"
    else:
        with train.refusals():
            weights = model.load_file(source, "a file of Inception weights")
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
        what = f"{source}, those of published FIDs"
        if not digest.startswith("6726825d"):
            what = f"{source}, not the file of published FIDs; for these {GET}"
    try:
        inception = InceptionFeatures(weights)
    except ValueError as error:
        fail(f"{source} is not a file of Inception weights: {error}; {GET}")
    return inception.to(device), what


# ---- Command line --------------------------------------------------------------------------------


def build_parser():
    """Every flag; `--help` is the manual."""
    parser = argparse.ArgumentParser(
        description="Measure and draw what autoencoders paint.",
        usage="python -m extras.reconstruct --checkpoint FILE [MORE ...] [--data PATH|shapes|"
        "shapes-large|cifar10] [flags]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        metavar="FILE",
        help="of train.py, of extras/siblings.py's rows that paint, or another project's; image "
        "size, patch size, mask ratio and seed are its",
    )
    (_, _, images, help), _, workers = train.DATA_FLAGS
    parser.add_argument("--data", nargs="+", default=[images], help=help + "; image files")
    batch_size, *_ = train.BATCH_FLAGS
    amp, *_ = train.RUN_FLAGS
    train.add_flags(
        parser,
        "what to measure, and how",
        ("--norm-pix-loss", bool, False, "was a published file trained on normalised patches?"),
        ("--val-images", train.COUNT, None, "measure on so many; None = all"),
        (
            "--inception-weights",
            str,
            None,
            "of IS and FID: FILE, torchvision (downloads its own) or none; published FIDs: "
            "pt_inception-2015-12-05-6726825d.pth; None = torchvision, but none for image files",
        ),
        ("--out", str, None, "folder to write; None = reconstruct/ beside the first checkpoint"),
        workers,
        batch_size,
        amp,
    )
    return parser


def parse_args(argv=None):
    """Command line -> namespace, complete but for what the checkpoints settle."""
    args = build_parser().parse_args(argv)
    photographs = all(Path(path).is_file() for path in args.data)
    args.inception_weights = args.inception_weights or ("none" if photographs else "torchvision")
    args.out = args.out or str(Path(args.checkpoint[0]).parent / "reconstruct")
    return args


# ---- Main ----------------------------------------------------------------------------------------


def measure_and_draw(args, device):
    """Table 1 and Figures 2 and 3 of --checkpoint's autoencoders, on the whole validation set.

    The same random masks for all, also for siblings that trained with others.
    """
    runs, args = open_autoencoders(args, device)
    out = Path(args.out)
    with train.writing(out):
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    val_set = build_data(runs, args)
    inception, what = load_inception(args, device)
    say(f"Inception weights: {what}")
    totals, sums, unread = measure(runs, val_set, inception, args, device)
    if not is_main():  # the sums are all processes', what follows is not shared
        return
    count, results = int(totals["images"]), as_results(runs, totals, sums)
    about = {"data": " ".join(args.data), "images": count, "unreadable": unread}
    about |= {k: getattr(args, k) for k in (*SIZES, "seed")}
    about |= {"inception": what, "checkpoints": {name: run.path for name, run in runs.items()}}
    with train.writing(out):
        text = json.dumps(about | {"results": results}, indent=1)
        (out / "eval.json").write_text(text + "\n")
        draw_figures(out / "pictures", runs, val_set, device)
    print_table(results, count)
    say(f"done: {out}/eval.json, {out}/pictures/")


def main(argv=None):
    args = parse_args(argv)
    device = train.start_processes()
    measure_and_draw(args, device)
    train.stop_processes()


if __name__ == "__main__":
    train.run_script(main)
