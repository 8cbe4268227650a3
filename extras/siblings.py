"""Siblings: MAE with one thing changed, from two other papers.

    python -m extras.siblings --loss r_mae --data path/to/images
    python -m extras.siblings --loss feature_mae --teacher runs/mse/checkpoint.pt
    torchrun --nproc_per_node=8 -m extras.siblings --loss boot_mae

BootMAE and the regression of features: Dong et al. 2022, "Bootstrapped Masked Autoencoders for
Vision BERT Pretraining". R-MAE and C-MAE: Kong and Zhang 2023, "Understanding Masked Image Modeling
via Learning Occlusion Invariant Feature". PAPER, PAPER SILENT and DIFFERS mean the sibling's paper
here. In order: networks, losses, samples, terms of a batch, what is measured, construction.

Each is one network with one optimiser, so that the loop is finetune.py's; rates, schedule and
flags are train.py's. DIFFERS: colour jitter of .4 is among them; BootMAE only crops and flips
(--jitter 0). Writes to OUT what train.py writes; finetune.py measures the encoder.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

import data
import finetune
import losses
import model
import train
from model import (
    MAE,
    Block,
    ViT,
    imagenet_denormalize,
    imagenet_normalize,
    linear,
    random_masking,
    sincos_positions,
    unpatchify,
    with_mask_tokens,
)
from train import fail, is_main, say

# What each row changes beside its network and its terms:
#   paints     has it a pixel term, and pictures?
#   blocks     are patches hidden in rectangles first (see `block_mask`)?
#   views      colourings of each image
#   momentum   of the teacher, a moving average of the network (see `teacher_momentum`)
ROW = dict(paints=False, blocks=False, views=1, momentum=None)
CONTRAST = ROW | dict(views=2, momentum=(0.996, 0.996))
SIBLINGS = {
    "feature_mae": ROW | dict(blocks=True),
    "boot_mae": ROW | dict(paints=True, blocks=True, momentum=(0.999, 0.9999)),
    "r_mae": ROW | dict(paints=True),
    "c_mae": CONTRAST,
    "byol_mae": CONTRAST,
}
PAINTS = [name for name, row in SIBLINGS.items() if row["paints"]]
USED_BY = {  # flags: rows that look at them
    "pixel_weight": PAINTS,
    "teacher": ["feature_mae"],
    "second": ["r_mae"],
    "grain": ["c_mae", "byol_mae"],
    "symmetric": ["c_mae", "byol_mae"],
    "temperature": ["c_mae"],
}
SECOND_VIEWS, GRAINS = ("complement", "independent", "whole"), ("token", "mean", "cls")
CURVES = {  # as data.CURVES
    "pixel term": {"pixel": ""},
    "teacher's features": {"features": ""},
    "disagreement of views": {"disagreement": ""},
    "contrast": {"contrast": ""},
    "loss of held-out images": {"val_loss": ""},
    "PSNR where hidden, dB": {"psnr": "G", "psnr_mean_fill": "mean fill"},
    "SSIM where hidden": {"ssim": ""},
}


# ---- Networks ------------------------------------------------------------------------------------
#
# A forward pass takes images (C-MAE: two views of each), mask_ratio and mask_noise, as MAE's but
# without defaults, and returns what the terms compare.


@torch.no_grad()
def move_teacher(network, momentum):
    """network.teacher <- momentum teacher + (1 - momentum) network; momentum 0 copies.

    The teacher has some of the network's parameters, under the same names.
    """
    own = dict(network.named_parameters())
    for name, parameter in network.teacher.named_parameters():
        parameter.lerp_(own[name].to(parameter), 1 - momentum)


@torch.no_grad()
def feature_target(teacher, images):
    """What a teacher, a `ViT`, makes of the whole images: (B, N, C), before its final norm."""
    _, [x] = teacher.encode(images, levels=[len(teacher.blocks)])
    return x[:, 1:]


class FeatureMAE(MAE):
    """MAE whose target is a trained MAE's features, not pixels: what an encoder has understood is
    a better target than what a camera saw. PAPER SILENT: which layer; BootMAE's target is taken.
    """

    def __init__(self, *, teacher, decoder_width, **sizes):
        super().__init__(decoder_width=decoder_width, **sizes)
        self.decoder_pred = linear(decoder_width, teacher.cls_token.shape[2])
        self.teacher = teacher.requires_grad_(False)

    def forward(self, images, mask_ratio, mask_noise):
        """-> (predicted features (B, N, D), the teacher's, mask (B, N))."""
        ids_keep, ids_restore, mask = random_masking(mask_noise, mask_ratio)
        x = self.decoder_maps(self.decoder_inputs(images, ids_keep, ids_restore))[-1][:, 1:]
        features = self.decoder_pred(self.decoder_norm(x))
        return features, feature_target(self.teacher, images), mask


class CrossAttention(nn.Module):
    """Attention of x (B, N, C) to a context (B, M, D): softmax(q k^T / sqrt(C / heads)) v.

    PAPER: BootMAE's supplement, eq. 1 and 2. DIFFERS, as its code does: heads, an output
    projection, keys from the encoder's width; and hidden patches ask, too, not the visible alone.
    """

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.heads = heads
        self.q, self.kv = linear(width, width), linear(context_width, 2 * width)
        self.proj = linear(width, width)

    def forward(self, x, context):
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossBlock(Block):
    """`Block` that looks at a context between attention and MLP. (B, N, C), (B, M, D) -> first.

    PAPER SILENT: the order; that of BootMAE's code, and its norms.
    """

    def __init__(self, width, heads, context_width):
        super().__init__(width, heads)
        self.norm_x = nn.LayerNorm(width, eps=1e-6)
        self.norm_context = nn.LayerNorm(context_width, eps=1e-6)
        self.cross = CrossAttention(width, heads, context_width)

    def forward(self, x, context):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm_x(x), self.norm_context(context))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.Module):
    """BootMAE's decoder: encoder tokens (B, 1 + K, C) and a context of as many -> (B, N, out).

    PAPER SILENT: heads; the caller's. DIFFERS: visible tokens get positions, too, as in MAE.
    """

    def __init__(self, encoder, width, heads, out, depth=2):
        super().__init__()
        C = encoder.cls_token.shape[2]
        self.embed = linear(C, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, encoder.side))
        self.blocks = nn.ModuleList(CrossBlock(width, heads, C) for _ in range(depth))
        self.norm, self.pred = nn.LayerNorm(width, eps=1e-6), linear(width, out)

    def forward(self, x, ids_restore, context):
        x = with_mask_tokens(self.embed(x), self.mask_token, ids_restore) + self.pos_embed
        for block in self.blocks:
            x = block(x, context)
        with torch.autocast(x.device.type, enabled=False):  # as in `MAE.decode`
            return self.pred(self.norm(x[:, 1:].float()))


class BootMAE(ViT):
    """MAE that also predicts the features of its own past: a moving average of the encoder sees
    the whole image. The decoders look up what else they need, the one for pixels in an early level
    of the encoder, the one for features in the last, so that the encoder need not carry it along.
    """

    def __init__(self, *, heads, decoder_width, decoder_heads, decoder_depth, **sizes):
        super().__init__(heads=heads, **sizes)  # decoders have a depth of their own
        C, p = sizes["width"], self.patch_size
        self.regressor = CrossDecoder(self, decoder_width, decoder_heads, 3 * p * p)
        self.predictor = CrossDecoder(self, C, heads, C)
        self.teacher = ViT(heads=heads, **sizes).requires_grad_(False)
        move_teacher(self, 0)

    def forward(self, images, mask_ratio, mask_noise):
        """-> (image (B, 3, H, W), features (B, N, C), the teacher's (B, N, C), mask (B, N))."""
        ids_keep, ids_restore, mask = random_masking(mask_noise, mask_ratio)
        tokens, [low, high] = self.encode(images, ids_keep, [1, len(self.blocks)])
        image = self.paint(tokens, ids_restore, low)
        features = self.predictor(tokens, ids_restore, high)
        return image, features, feature_target(self.teacher, images), mask

    def paint(self, tokens, ids_restore, low):
        """Encoder tokens and its first block's (B, 1 + K, C) -> image (B, 3, H, W)."""
        patches = self.regressor(tokens, ids_restore, low)
        return imagenet_denormalize(unpatchify(patches, self.patch_size))

    def reconstruct(self, images, mask_ratio, mask_noise):
        """-> ([image (B, 3, H, W)], mask (B, N)), as `MAE.forward`."""
        ids_keep, ids_restore, mask = random_masking(mask_noise, mask_ratio)
        tokens, [low] = self.encode(images, ids_keep, [1])
        return [self.paint(tokens, ids_restore, low)], mask


class RMAE(MAE):
    """MAE that has to paint the same from two views of an image, one of which sees what the other
    does not: occlusion must not matter. second: what the other view sees; "complement": all that
    is hidden from the first; "independent" (R-MAE with a dagger): a choice of its own, as much as
    that; "whole" (double dagger): everything. PAPER: R-MAE, eq. 6 and 8; with a dagger, the loss
    is that of "the common parts of the masked patches of T1 and unmasked patches of T2". PAPER
    SILENT: which patches count for the double dagger; here too, those hidden from the first view.
    """

    def __init__(self, *, second="complement", **sizes):
        super().__init__(**sizes)
        self.second = second

    def forward(self, images, mask_ratio, mask_noise):
        """-> (first and second reconstruction (B, 3, H, W), which patches count (B, N)).

        These are hidden from the first view, and visible to the second.
        """
        ids_keep, ids_restore, mask = random_masking(mask_noise, mask_ratio)
        N, K = mask.shape[1], ids_keep.shape[1]
        # Places in the order "visible first", as `random_masking` makes it, of the second view.
        if self.second == "complement":  # the order starts where the first view's sight ends
            places, seen = (ids_restore - K) % N, N - K
        elif self.second == "independent":  # by the last 12 of the noise's 24 bits; a few are tied
            places = (4096 * mask_noise % 1).argsort(dim=1, stable=True).argsort(dim=1)
            seen = N - K
        else:
            places, seen = ids_restore, N
        keep = places.argsort(dim=1)[:, :seen]
        [first] = self.decode(self.decoder_inputs(images, ids_keep, ids_restore))
        [second] = self.decode(self.decoder_inputs(images, keep, places))
        return first, second, mask * (places < seen)


def two_layers(width):
    """C-MAE's projector and predictor: (..., C) -> same; hidden width 2048 for ViT-B's 768."""
    hidden = width * 8 // 3
    return nn.Sequential(linear(width, hidden), nn.GELU(), linear(hidden, width))


class ContrastBranch(ViT):
    """f and p of C-MAE: an encoder that takes mask tokens, and a projector.

    grain: "token", every patch's token by itself; "mean", their mean; or "cls".
    PAPER SILENT: widths for other sizes than ViT-B, here in proportion, and norms, here none.
    """

    def __init__(self, *, grain, **sizes):
        super().__init__(**sizes)
        self.grain, C = grain, sizes["width"]
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, C))
        self.projector = two_layers(C)

    def embed(self, images, mask):
        """Images (B, 3, H, W) with mask (B, N), 1 = hidden -> (B, n, C), n = N or 1 by grain."""
        x = self.patch_embed(imagenet_normalize(images))
        x = torch.where(mask[:, :, None] > 0, self.mask_token.to(x), x)
        x, _ = self.run_blocks(x + self.pos_embed[:, 1:])
        if self.grain == "cls":
            return self.projector(x[:, :1])
        x = x[:, 1:]
        return self.projector(x.mean(dim=1, keepdim=True) if self.grain == "mean" else x)


class CMAE(ContrastBranch):
    """No decoder: features of one view of an image must predict those of the other, which sees
    exactly the rest of it, and that better than any other image's. It asks whether MAE is at heart
    a contrast of occluded views. The second view goes through a moving average of the network.

    PAPER: C-MAE, eq. 9 to 11, in one direction. PAPER SILENT: both, as in MoCo v3, which it
    follows, but for that paper's factor; symmetric takes their mean.
    """

    def __init__(self, *, grain="token", symmetric=False, **sizes):
        sizes = {k: v for k, v in sizes.items() if not k.startswith("decoder")}  # there is none
        super().__init__(grain=grain, **sizes)
        self.symmetric, self.predictor = symmetric, two_layers(sizes["width"])
        self.teacher = ContrastBranch(grain=grain, **sizes).requires_grad_(False)
        move_teacher(self, 0)

    def forward(self, views, mask_ratio, mask_noise):
        """views: (B, 2, 3, H, W), two colourings of each image -> [(queries, targets (B, n, C))].

        One pair, or both directions. Target i of an image stands at the place of its query i.
        """
        _, _, mask = random_masking(mask_noise, mask_ratio)
        one, two = views.unbind(1)
        pairs = []
        for mine, hidden, other, there in [(one, mask, two, 1 - mask), (two, 1 - mask, one, mask)]:
            with torch.no_grad():
                targets = self.teacher.embed(other, there)
            pairs.append((self.predictor(self.embed(mine, hidden)), targets))
            if not self.symmetric:
                break
        return pairs


def paint(network, images, mask_ratio, mask_noise):
    """What a row of PAINTS makes of images (B, 3, H, W): ([image (B, 3, H, W)], mask (B, N))."""
    if isinstance(network, BootMAE):
        return network.reconstruct(images, mask_ratio, mask_noise)
    return MAE.forward(network, images, mask_ratio, mask_noise)


def build_network(args, teacher=None):
    """The network of args.loss with random weights; ValueError if sizes do not fit each other.

    teacher: of feature_mae, a `ViT`; None stands for one with random weights.
    """
    sizes = dict(image_size=args.image_size, patch_size=args.patch_size)
    sizes |= model.MAE_SIZES[args.model]
    if args.loss == "feature_mae":
        teacher = teacher or model.build_encoder(args.model, args.image_size, args.patch_size)
        return FeatureMAE(teacher=teacher, **sizes)
    if args.loss == "boot_mae":
        return BootMAE(**sizes)
    if args.loss == "r_mae":
        return RMAE(second=args.second, **sizes)
    return CMAE(grain=args.grain, symmetric=args.symmetric, **sizes)


def open_teacher(args):
    """The encoder in --teacher, for this run's image size; what it has seen joins `args.seen`."""
    content = model.load_file(args.teacher, "a file of ViT-MAE weights")
    weights, _ = model.named_as_ours(content, args.teacher, "a file of ViT-MAE weights")
    sizes = model.published_sizes(weights, args.teacher, remedy="take another teacher")
    if sizes["patch_size"] != args.patch_size:
        raise ValueError(
            f"{args.teacher} has patches of {sizes['patch_size']} px, this run has "
            f"{args.patch_size}, so its features are of other patches; give --patch-size "
            f"{sizes['patch_size']}"
        )
    teacher = model.build_encoder(sizes["model"], args.image_size, args.patch_size)
    encoder = model.encoder_weights(weights, teacher.side, args.teacher)
    model.load_whole(teacher, encoder, args.teacher)
    args.seen = [*train.seen_by(content), *args.seen]
    return teacher


# ---- Losses --------------------------------------------------------------------------------------


def masked_mean(per_patch, mask, weight=1.0):
    """Mean of per_patch (B, N) over the hidden patches; the visible ones give no gradient.

    mask: (B, N), 1 = hidden. weight: (B, N) or a number, a factor on each patch. The sum is divided
    by the number of hidden patches, not by the sum of their weights.
    """
    return (per_patch * mask * weight).sum() / mask.sum()


def mask_density(mask):
    """BootMAE's weights (B, N), 1 to 2: 1 + the part of a patch's 3 x 3 neighbourhood, itself
    included, that is hidden. mask: (B, N), 1 = hidden. Beyond the image nothing is.

    What lies deep inside a hidden block is hard to guess, and counts more than its rim. PAPER
    SILENT: "larger loss weight to the center region of each block"; the density is its code's.
    """
    side = math.isqrt(mask.shape[1])
    return 1 + F.avg_pool2d(mask.view(-1, 1, side, side), 3, stride=1, padding=1).flatten(1)


def masked_feature_mse(features, target, mask, weight=1.0):
    """Mean squared error of the hidden patches' features: (B, N, C) twice -> scalar.

    Both sides have each token's mean and deviation removed first (BootMAE's target and, in its
    code, prediction), so that predicting nothing costs 1. mask, weight: see `masked_mean`.
    """
    features = F.layer_norm(features.float(), features.shape[2:], eps=1e-6)
    target = F.layer_norm(target.detach().float(), target.shape[2:], eps=1e-6)
    return masked_mean((features - target).square().mean(dim=2), mask, weight)


def info_nce(queries, targets, first=0, temperature=0.2):
    """-log softmax(s / temperature) of the right image, mean over images and places. PAPER: C-MAE's
    eq. 9, with s, the cosine, of eq. 10.

    queries: (B, n, C); targets: (M, n, C), where targets[first + b] belongs to queries[b].
    PAPER SILENT: the negatives. A query is compared with the targets at its own place in all M
    images; among places of one image, position embeddings alone would tell the targets apart. With
    all similarities equal, the loss is log M.
    """
    with torch.autocast(queries.device.type, enabled=False):
        q, t = (F.normalize(x.float(), dim=2) for x in (queries, targets.detach()))
        similarity = torch.einsum("bnd,mnd->nbm", q, t) / temperature  # (n, B, M)
    right = torch.arange(len(q), device=q.device) + first
    return F.cross_entropy(similarity.flatten(0, 1), right.repeat(q.shape[1]))


def byol_loss(queries, targets):
    """2 - 2 cos, mean over all pairs (Grill et al. 2020): (B, n, C) twice -> scalar in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(queries.float(), targets.detach().float(), dim=2).mean()


# ---- Samples -------------------------------------------------------------------------------------


class SiblingSet(data.PretrainSet):
    """`PretrainSet` whose masks may begin with blocks, and whose images may have two views.

    `set[(epoch, index)]` is (image, mask_noise, seed, bad); image: uint8 (3, S, S), or with two
    views (2, 3, S, S), two colourings of one crop.
    """

    def __init__(self, source, *, image_size, blocks=0.0, views=1, jitter=0.4, **options):
        super().__init__(source, image_size=image_size, jitter=jitter, **options)
        self.blocks, self.views = blocks, views  # part of the patches that rectangles hide first
        self.shape = data.sample_shape(image_size, views)
        if views > 1 and jitter:  # PAPER: C-MAE, "follows SimSiam", at .4 (Chen and He 2021).
            # PAPER SILENT: whether SimSiam's random grey is among its colours; here it is.
            # DIFFERS: colours change before masking, not after.
            strong = v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter / 4))
            self.distort = v2.Compose([v2.RandomApply([strong], 0.8), v2.RandomGrayscale(0.2)])

    def companion(self, index):
        """The noise of an image's mask, (N,); blocks are hidden first."""
        noise = super().companion(index)
        if self.blocks:
            noise += block_mask(math.isqrt(self.num_patches), self.blocks)
        return noise

    def transform(self, image):
        """PIL image -> uint8 (3, S, S), or (views, 3, S, S)."""
        if self.views == 1:
            return super().transform(image)
        image = self.cropped(image)
        colour = self.distort if self.augment else lambda image: image
        views = [v2.functional.pil_to_tensor(colour(image)) for _ in range(self.views)]
        return torch.stack(views)


def block_mask(side, hidden):
    """BootMAE's mask: rectangles until the part `hidden` of all patches is hidden -> (side^2,)
    float, 1 = hidden.

    Areas are drawn from 16/196 to 60/196 of the image, less where less is left to hide, and aspect
    ratios from .3 to 1/.3. Added to the noise of `random_masking`, the rectangles are hidden first,
    and chance hides the rest. BootMAE's code: 120 of 196 in blocks, 147 in all. Draws from torch's
    global generator. DIFFERS: that code then shows up to three patches of the blocks again.
    """
    total, low, high = (round(part * side**2) for part in (hidden, 16 / 196, 60 / 196))
    mask = torch.zeros(side, side)
    while (left := total - int(mask.sum())) > 0:
        most = min(left, high)
        u, v, *place = torch.rand(4).tolist()
        area = low + (most - low) * u  # where most < low, from most to low: what still fits
        aspect = 0.3 ** (1 - 2 * v)  # from .3 to 1/.3, its logarithm uniform
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if not (0 < h < side and 0 < w < side):
            continue
        top, start = (int(p * (side - x + 1)) for p, x in zip(place, (h, w), strict=True))
        block = mask[top : top + h, start : start + w]
        if 0 < h * w - int(block.sum()) <= most:
            block[:] = 1
    return mask.flatten()


# ---- Terms of a batch ----------------------------------------------------------------------------
#
# Each takes the run, images (B, 3, H, W) in [0, 1] (C-MAE, BYOL: (B, 2, 3, H, W)), mask_noise
# (B, N), progress, whose epoch counts from 1, and the command line; -> {name: scalar}. The sum is
# minimised.


def feature_mae_terms(run, images, mask_noise, progress, args):
    """Features of a trained MAE, --teacher, are predicted where patches are hidden.

    PAPER SILENT: the loss; here BootMAE's, but every hidden patch counts the same.
    """
    with run.autocast():
        features, target, mask = run.network(images, args.mask_ratio, mask_noise)
    return {"features": masked_feature_mse(features, target, mask)}


def boot_mae_terms(run, images, mask_noise, progress, args):
    """Pixels, and the features of the encoder's own moving average; dense holes count more.

    PAPER SILENT: the second term's weight, which in its code grows to 1 over the first quarter of
    the epochs, as here; whether target patches are normalised, which they are there, for each
    channel. Here as in `mse`: --norm-pix-loss.
    """
    with run.autocast():
        image, features, target, mask = run.network(images, args.mask_ratio, mask_noise)
    density = mask_density(mask)
    errors = losses.patch_errors(image, images, args.patch_size, args.norm_pix_loss)
    pixel = masked_mean(errors, mask, density)
    features = masked_feature_mse(features, target, mask, density)
    ramp = min(1, 4 * progress["epoch"] / args.epochs)
    return {"pixel": args.pixel_weight * pixel, "features": ramp * features}


def r_mae_terms(run, images, mask_noise, progress, args):
    """Both views paint the same, and the second, which sees the place, paints the image.

    PAPER: R-MAE, eq. 8, lambda = --pixel-weight. PAPER SILENT: does a gradient stop? No. DIFFERS:
    its patches are normalised; here as in `mse`: --norm-pix-loss. With a dagger the number of
    patches that count varies, and each batch is divided by its own: --accum and more processes
    then give a gradient that differs a little from one large batch's.
    """
    with run.autocast():
        first, second, counted = run.network(images, args.mask_ratio, mask_noise)
    patch, norm = args.patch_size, args.norm_pix_loss
    return {
        "disagreement": losses.masked_mse(first, second, counted, patch),
        "pixel": args.pixel_weight * losses.masked_mse(second, images, counted, patch, norm),
    }


def c_mae_terms(run, views, mask_noise, progress, args):
    """Each view's features find the other's among those of all images of a forward pass, of all
    processes: --accum adds none. PAPER: C-MAE, eq. 11.
    """
    with run.autocast():
        pairs = run.network(views, args.mask_ratio, mask_noise)
    found = [info_nce(q, *targets_of_all(t), args.temperature) for q, t in pairs]
    return {"contrast": sum(found) / len(found)}


def byol_mae_terms(run, views, mask_noise, progress, args):
    """`c_mae` with BYOL's loss: features agree, and nothing pushes images apart."""
    with run.autocast():
        pairs = run.network(views, args.mask_ratio, mask_noise)
    return {"disagreement": sum(byol_loss(q, t) for q, t in pairs) / len(pairs)}


def targets_of_all(targets):
    """Targets (B, n, C) -> (those of all W processes (W B, n, C), place of this one's first).

    In validation this process's alone, since parts of the validation set differ in length.
    """
    if not dist.is_initialized() or not torch.is_grad_enabled():
        return targets, 0
    parts = [torch.empty_like(targets) for _ in range(train.world_size())]
    dist.all_gather(parts, targets.contiguous())
    return torch.cat(parts), train.rank() * len(targets)


TERMS = {
    "feature_mae": feature_mae_terms,
    "boot_mae": boot_mae_terms,
    "r_mae": r_mae_terms,
    "c_mae": c_mae_terms,
    "byol_mae": byol_mae_terms,
}


def teacher_momentum(epoch, args):
    """How much of itself a teacher keeps in each step of an epoch.

    BootMAE's grows linearly over the first 100 epochs, C-MAE's is constant. DIFFERS: for ViT-B,
    BootMAE's goes on to .99999 at epoch 400.
    """
    first, last = SIBLINGS[args.loss]["momentum"]
    return first + (last - first) * min(1, (epoch - 1) / 100)


# ---- Measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(run, loader, known, args):
    """PSNR and the like of held-out images where a row paints, else val_loss -> row; draws.

    val_loss: the sum of the terms, mean over images. Contrast is among the images of one process's
    batch: compare it only at equal --batch-size and number of processes. loader, known: see
    `finetune.evaluate_classifier`; an unreadable image's neighbour stands in for it.
    """
    paints, found = args.loss in PAINTS, {}
    network = SimpleNamespace(mae=partial(paint, train.unwrap(run.network)))
    network.autocast = run.autocast
    sums = {"images": 0} | dict.fromkeys(losses.METRICS if paints else ["val_loss"], 0)
    for images, mask_noise, _, bad in train.renewing(loader, args.out):
        found |= dict(bad)
        real, mask_noise = data.to_float(images.to(run.device)), mask_noise.to(run.device)
        if paints:
            fake, hidden = train.reconstruct(network, real, mask_noise, args)
            values, _ = losses.image_quality(fake, real, hidden)
        else:
            terms = TERMS[args.loss](run, real, mask_noise, {"epoch": args.epochs}, args)
            values = {"val_loss": sum(terms.values()) * len(real)}
        for name, value in values.items():
            sums[name] += value
        sums["images"] += len(real)
    new = {index: reason for index, reason in found.items() if index not in known}
    train.note_bad_images(new, known, loader.dataset)
    sums = train.sum_over_processes(sums, run.device)
    count = sums.pop("images")
    row = {name: value / count for name, value in sums.items()}
    if args.norm_pix_loss:
        row["psnr_uses_true_patch_statistics"] = True
    if paints and train.picture_is_due(run.epoch, args) and is_main():
        picture = Path(args.out) / "pictures" / f"epoch_{run.epoch:04d}.png"
        samples = [loader.dataset[0, i] for i in range(min(8, len(loader.dataset)))]
        images, mask_noise, *_ = data.collate(samples)
        network.device = run.device
        with train.writing(picture):
            picture.parent.mkdir(parents=True, exist_ok=True)
            train.draw_reconstructions(picture, network, images, mask_noise, args, whole=False)
    return row


# ---- Construction --------------------------------------------------------------------------------

# A checkpoint continues only under the same values of these.
MUST_FIT = (
    *("loss", "model", "image_size", "patch_size", "norm_pix_loss", "seed", "data"),
    *("limit_images", "teacher", "second", "grain", "symmetric"),
)


def build_run(args, device):
    """What trains -> namespace, see `finetune.build_run`. The teacher moves after every update."""
    torch.manual_seed(args.seed)  # the same initial weights on every process
    with train.refusals():  # sizes that do not fit each other, or a file that does not
        teacher = open_teacher(args) if args.teacher and args.loss == "feature_mae" else None
        network = build_network(args, teacher)
        if args.init:
            initialise(network, args)
    network = train.compiled(network.to(device), args)
    run = finetune.build_run(
        network,
        train.parameter_groups(network.parameters(), args.weight_decay),
        args,
        device,
        part="mae",
        terms=TERMS[args.loss],
        evaluate=evaluate,
        score=None,
        script="extras/siblings.py",
        must_fit=MUST_FIT,
        curves=CURVES,
    )
    if SIBLINGS[args.loss]["momentum"]:
        run.opt.register_step_post_hook(
            lambda *_: move_teacher(network, teacher_momentum(run.epoch, args))
        )
    return run


def initialise(network, args):
    """--init: start from an encoder, R-MAE also from a decoder; says what was taken."""
    kind, own = "a file of ViT-MAE weights", network.state_dict()
    content = model.load_file(args.init, kind)
    weights, notes = model.named_as_ours(content, args.init, kind)
    model.check_sizes(weights, args.init, args.model, args.patch_size)
    if args.loss == "r_mae":
        taken = model.load_autoencoder(network, weights, args.init)
    else:
        encoder = model.encoder_weights(weights, network.side, args.init)
        rest = {k: v for k, v in own.items() if not k.startswith(model.ENCODER)}
        model.load_whole(network, rest | encoder, args.init)
        taken = f"{len(encoder)} tensors of the encoder"
    if SIBLINGS[args.loss]["momentum"]:
        move_teacher(network, 0)  # it starts from the same weights
    args.seen = [*train.seen_by(content), *args.seen]
    say(f"--init {args.init}: {'; '.join([*notes, 'took ' + taken])}")


def build_data(args):
    """-> (training, validation) `SiblingSet`; one line and status 2 if that cannot be."""
    train_source, val_source = train.open_data(args, args.image_size)
    train.check_held_out(val_source, args)
    patches = (args.image_size // args.patch_size) ** 2
    common = dict(image_size=args.image_size, num_patches=patches, seed=args.seed)
    common["views"] = SIBLINGS[args.loss]["views"]
    if SIBLINGS[args.loss]["blocks"]:  # BootMAE's code: 120 of 147 hidden patches
        common["blocks"] = args.mask_ratio * 120 / 147
    train_set = SiblingSet(
        train_source,
        crop_min=args.crop_min,
        flip=args.flip,
        jitter=args.jitter,
        limit=args.limit_images,
        epoch_images=args.epoch_images,
        **common,
    )
    train.check_one_step(train_set, args)
    return train_set, SiblingSet(val_source, augment=False, limit=args.val_images, **common)


# ---- Command line --------------------------------------------------------------------------------


def build_parser():
    """Every flag; those that train.py has, too, mean the same."""
    parser = argparse.ArgumentParser(
        description="Pre-train a sibling of MAE.",
        usage="python -m extras.siblings --loss ROW [--data PATH|shapes|cifar10] [flags]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--loss", choices=SIBLINGS, required=True, help="which sibling")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    train.add_flags(parser, "what to train", *train.NETWORK_FLAGS)
    train.add_flags(
        parser,
        "what a row changes",
        ("--pixel-weight", train.NUMBER, 1.0, "of the pixel term; boot_mae, r_mae"),
        ("--teacher", str, None, "file of a trained MAE, ours or published; for feature_mae"),
        ("--second", SECOND_VIEWS, "complement", "what r_mae's other view sees"),
        ("--grain", GRAINS, "token", "what c_mae and byol_mae compare"),
        ("--symmetric", bool, False, "compare in both directions; c_mae, byol_mae"),
        ("--temperature", train.POSITIVE, 0.2, "of the softmax; c_mae"),
    )
    train.add_flags(parser, "data", *train.SAMPLE_FLAGS)
    train.add_flags(parser, "optimisation", *train.OPTIMISER_FLAGS)
    train.add_flags(
        parser,
        "the run",
        ("--out", str, None, "folder for everything written; None = runs/LOSS"),
        *train.RUN_FLAGS,
        ("--picture-every", train.COUNT, 10, "epochs between pictures"),
    )
    return parser


def parse_args(argv=None):
    """Command line -> namespace with every default filled in. Ends with status 2 on a conflict."""
    parser = build_parser()
    args = parser.parse_args(argv)
    train.name_unused(args, [f for f, rows in USED_BY.items() if args.loss not in rows], parser)
    train.settle(args)
    if args.norm_pix_loss and args.loss not in PAINTS:
        fail(
            f"--norm-pix-loss is for rows that paint, {' and '.join(PAINTS)}: {args.loss} does not"
        )
    if args.loss == "c_mae" and train.images_per_step(args) // args.accum < 2:
        fail("--batch-size 1 leaves c_mae nothing to compare an image with; give 2 or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.loss == "feature_mae" and not args.teacher:
        fail("--loss feature_mae needs --teacher FILE, a trained MAE: runs/mse/checkpoint.pt, say")
    device = train.start_processes()
    run = build_run(args, device)
    stopped, _ = finetune.train_network(run, *build_data(args), args)
    train.stop_processes()
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    train.run_script(main)
