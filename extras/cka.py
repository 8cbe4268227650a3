"""CKA: how little does an encoder mind what is hidden from it?

    python -m extras.cka --checkpoint runs/mse/checkpoint.pt runs/msg_gan_p/checkpoint.pt none

Linear centred kernel alignment (Kornblith et al. 2019) of an encoder's features of masked and of
whole images, block by block: Figure 1 of Kong and Zhang, "Understanding Masked Image Modeling via
Learning Occlusion Invariant Feature", CVPR 2023. Not of the Perceptual MAE paper.

--checkpoint takes any number of what finetune.py takes; `none`: random weights. Writes cka.json and
pictures/cka.png to OUT.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

import data
import finetune
import model
import train
from train import fail, is_main, say

RATIOS = [n / 10 for n in range(1, 10)]  # hidden parts of the patches


# ---- CKA -----------------------------------------------------------------------------------------


def hsic(K, L):
    """Unbiased estimate of the Hilbert-Schmidt independence criterion: (..., n, n) -> (...).

    K, L: kernel matrices of the same n >= 4 images, whose diagonals do not count. Its mean is 0 for
    independent features, so it may be below. Song et al. 2012, HSIC_1.
    """
    n = K.shape[-1]
    K, L = (kernel * (1 - torch.eye(n).to(kernel)) for kernel in (K, L))
    of_k, of_l = K.sum(dim=-1), L.sum(dim=-1)  # (..., n), each image's with all others
    sums = (K * L).sum(dim=(-2, -1)) - 2 / (n - 2) * (of_k * of_l).sum(dim=-1)
    sums = sums + of_k.sum(dim=-1) * of_l.sum(dim=-1) / ((n - 1) * (n - 2))
    return sums / (n * (n - 3))


def cka_sums(x, y):
    """What `cka` needs of a batch, to be added up over batches and processes: (..., 3) float64.

    x: (..., n, C), y: (..., n, D), features of the same n >= 4 images. Returns n times the HSIC of
    linear kernels, of x with y, x with itself, y with itself: a batch counts by its images.
    """
    x, y = (z.double() - z.double().mean(dim=-2, keepdim=True) for z in (x, y))  # less rounding
    K, L = x @ x.mT, y @ y.mT
    return x.shape[-2] * torch.stack([hsic(K, L), hsic(K, K), hsic(L, L)], dim=-1)


def cka(sums):
    """Linear centred kernel alignment (Kornblith et al. 2019) of `cka_sums`: (..., 3) -> (...).

    1: features equal up to rotation, shift and scale; about 0: unrelated. The ratio is that of the
    sums over all batches (Nguyen et al. 2021): the mean of the batches' ratios would be biased.
    Not finite where too few images leave features an HSIC of 0 or less with themselves.
    """
    both, x, y = sums.unbind(dim=-1)
    return both / (x.clamp(min=0) * y.clamp(min=0)).sqrt()


# ---- Measuring -----------------------------------------------------------------------------------


def open_encoders(args, device):
    """--checkpoint's encoders -> ({name of the row: encoder}, args with what they settle).

    `none`: random weights of the first file's sizes. All must take images and patches of one size,
    so that they see the same patches.
    """
    encoders, first = {}, None
    for path in args.checkpoints:  # `none` comes last
        asked = args if path != "none" else first or args
        weights, own = finetune.open_checkpoint(
            argparse.Namespace(**vars(asked) | {"checkpoint": path})
        )
        first = first or own
        first.seen = [*first.seen, *own.seen]
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
    """Are features of a masked image like those of the whole one? Their CKA, for each of RATIOS
    and each block.

    PAPER SILENT (theirs): tokens, batches, images. Ours: CLS or, with --pool mean, the mean of the
    patches that the encoder sees; 256 images, --batch-size; the whole validation set. --seed fixes
    an image's masks; what a low ratio hides, a higher one hides, too.
    """
    encoders, args = open_encoders(args, device)
    patches = (args.image_size // args.patch_size) ** 2
    if int(patches * (1 - RATIOS[-1])) < 1:
        fail(f"with {RATIOS[-1]} hidden, none of {patches} patches is left; lower --patch-size")
    _, source = train.open_data(args, args.image_size)
    train.check_held_out(source, args)
    common = dict(image_size=args.image_size, num_patches=patches, seed=args.seed)
    val_set = data.PretrainSet(source, augment=False, limit=args.val_images, **common)
    if len(val_set) < 4 * train.world_size():
        fail(f"{len(val_set)} images are too few for CKA: it needs 4 per process, better hundreds")
    dtype, found, unread = train.choose_precision(args.amp, device), {}, []
    sums = {k: torch.zeros(len(RATIOS), len(e.blocks), 3).double() for k, e in encoders.items()}
    mine = torch.arange(train.rank(), len(val_set), train.world_size()).split(args.batch_size)
    with train.writing(args.out):  # before the work, not after it
        Path(args.out).mkdir(parents=True, exist_ok=True)
    bar, count = tqdm(finetune.shard(val_set, args), disable=None if is_main() else True), 0
    for index, (images, mask_noise, _, bad) in zip(mine, bar, strict=True):
        found |= dict(bad)
        kept = finetune.readable(index, bad)
        if kept.sum() < 4:  # too few for an estimate
            continue
        count += kept.sum().item()
        images, mask_noise = data.to_float(images[kept].to(device)), mask_noise[kept].to(device)
        for name, encoder in encoders.items():
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                seen = (model.random_masking(mask_noise, ratio)[0] for ratio in [0, *RATIOS])
                whole, *masked = (block_features(encoder, images, ids, args.pool) for ids in seen)
            sums[name] += torch.stack([cka_sums(x, whole) for x in masked]).cpu()
    finetune.note_unread(found, unread, val_set)
    parts, counts = zip(*train.of_all_processes((sums, count)), strict=True)
    values = {name: cka(sum(part[name] for part in parts)) for name in encoders}
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


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    """Command line -> namespace; status 2 on a conflict."""
    parser = argparse.ArgumentParser(
        description="CKA of masked and of whole images.",
        usage="python -m extras.cka --checkpoint FILE [MORE ...] [none] [--data PATH] [flags]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text = "of train.py or extras.siblings, or another project's ViT-MAE; none: random weights"
    parser.add_argument("--checkpoint", nargs="+", dest="checkpoints", metavar="FILE", help=text)
    train.add_flags(
        parser,
        "what to do",
        *finetune.CHECKPOINT_FLAGS[1:],
        ("--pool", ("cls", "mean"), "cls", "CLS, or the mean patch token"),
        # Its estimate is the noisier, the fewer images are compared with each other.
        ("--batch-size", train.at_least(4), 256, "images per process that are compared"),
        ("--val-images", train.COUNT, None, "measure on so many; None = all"),
        *(flag for flag in train.DATA_FLAGS if flag[0] != "--limit-images"),
        *(flag for flag in train.RUN_FLAGS if flag[0] in ("--amp", "--seed")),
        ("--out", str, None, "folder for everything written; None = cka/ beside --checkpoint"),
    )
    args = parser.parse_args(argv)
    if args.checkpoints is None:
        fail("--checkpoint is missing: give files, or none for random weights")
    args.checkpoints.sort(key="none".__eq__)  # the files first, in their order
    first, args.eval = args.checkpoints[0], False
    beside = "runs/none" if first == "none" else Path(first).parent
    args.out = args.out or str(Path(beside) / "cka")
    return args


def main(argv=None):
    args = parse_args(argv)
    measure_cka(args, train.start_processes())
    train.stop_processes()


if __name__ == "__main__":
    train.run_script(main)
