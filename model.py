"""Networks of Perceptual MAE: ViT encoder, MAE and MSG-MAE, discriminators, ADA, classifier.

Implements the MAE of He et al. 2022 as the Perceptual MAE paper configures it (sec. 4 and the
supplement's Table 1), its skip connections (sec. 3.3), the discriminators D of sec. 3.1 and 3.2,
each of which is also the loss network phi, adaptive discriminator augmentation (sec. 3.2), and
the classifier that fine-tuning makes of the encoder (sec. 4). At the end: phi of eq. 7 (dVAE, VGG),
and weights in: files of this and of other projects.

Self-contained: needs only torch (VGG also torchvision, .safetensors files safetensors). Every
network takes images as float (B, 3, H, W) in [0, 1] and normalises them on its own first line;
reconstructions come back in the same units. Parameter names are those of the published MAE, so its
checkpoints load strictly into `MAE`, and the encoder loads into timm's ViT.

    mae = build_mae("base")                                # 224 px, 16 px patches
    reconstructions, mask = mae(images, mask_ratio=0.75)   # [(B, 3, 224, 224)], (B, 196)
"""

import argparse
import functools
import itertools
import math
import pickle
import re
import warnings
import zipfile
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

# Pixel statistics of ImageNet (RGB, for images in [0, 1]): the unit in which MAE sees and predicts.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# PAPER: supplement, Table 1 (base, large). PAPER SILENT: `small` is ViT-S and `huge` MAE's ViT-H,
# published with patches of 14 px, with the same decoder; `tiny` and `nano` are for CPUs and tests.
PAPERS_DECODER = dict(decoder_width=512, decoder_depth=8, decoder_heads=16)
MAE_SIZES = {
    "nano": dict(width=128, depth=4, heads=4, decoder_width=64, decoder_depth=3, decoder_heads=4),
    "tiny": dict(width=192, depth=6, heads=3, decoder_width=128, decoder_depth=4, decoder_heads=4),
    "small": dict(width=384, depth=12, heads=6, **PAPERS_DECODER),
    "base": dict(width=768, depth=12, heads=12, **PAPERS_DECODER),
    "large": dict(width=1024, depth=24, heads=16, **PAPERS_DECODER),
    "huge": dict(width=1280, depth=32, heads=16, **PAPERS_DECODER),
}
# PAPER SILENT: D's channels at the finest scale and their cap. 64/512 is StyleGAN2-ADA's width
# at 256 px; smaller models get a D they can keep up with. (--d-channels, --d-max)
DISCRIMINATOR_WIDTHS = {
    "nano": (16, 64),
    "tiny": (16, 128),
    "small": (32, 256),
    "base": (64, 512),
    "large": (64, 512),
    "huge": (64, 512),
}


# ---- Pixels and patches --------------------------------------------------------------------------


def per_channel(values, like):
    """Three numbers -> (3, 1, 1) of the type and device of `like`.

    Filled on the device: `like.new_tensor(values)` would copy from the CPU and make it wait.
    """
    return torch.cat([like.new_full((1, 1, 1), value) for value in values])


def imagenet_normalize(images):
    """Images (B, 3, H, W) in [0, 1] -> zero mean, unit variance per channel over ImageNet."""
    return (images - per_channel(IMAGENET_MEAN, images)) / per_channel(IMAGENET_STD, images)


def imagenet_denormalize(images):
    """Inverse of `imagenet_normalize`: back to [0, 1] units, not clamped."""
    return images * per_channel(IMAGENET_STD, images) + per_channel(IMAGENET_MEAN, images)


def check_size(images, side):
    """ValueError if images are not float (B, 3, side, side), which a network was built for."""
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}: give float ones in [0, 1]")
    if images.shape[2:] != (side, side):
        raise ValueError(f"images of {list(images.shape[2:])} for a network of {side} px squares")


def check_pyramid(images, side):
    """ValueError if images are no list of scales, finest first, of side x side pixels."""
    if isinstance(images, torch.Tensor):
        raise ValueError("give a list of images by scale, finest first: [images] for one scale")
    check_size(images[0], side)


def finest(images):
    """Images (B, 3, H, W), or a list of scales as discriminators take it -> the finest alone."""
    return images if isinstance(images, torch.Tensor) else images[0]


def check_name(what, name, names):
    """ValueError if a name, of a size for instance, is not among those that there are."""
    if name not in names:
        raise ValueError(f"there is no {what} {name!r}; there are {', '.join(names)}")


def unpatchify(patches, patch_size):
    """Patches (B, N, p*p*3), each in (row, column, channel) order -> images (B, 3, H, W)."""
    B, N, _ = patches.shape
    h = w = round(N**0.5)
    x = patches.view(B, h, w, patch_size, patch_size, 3)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, 3, h, p, w, p)
    return x.reshape(B, 3, h * patch_size, w * patch_size)


def sincos_positions(width, side):
    """Fixed 2-D sine-cosine position embedding (MAE's): (1, 1 + side*side, width).

    The first half of the channels encodes the column, the second the row; in each half, sines then
    cosines at `width / 4` wavelengths from 2 pi to 10000 * 2 pi patches. CLS comes first: zeros.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns = waves[None, :, :].expand(side, side, -1)
    rows = waves[:, None, :].expand(side, side, -1)
    grid = torch.cat([columns, rows], dim=2).flatten(0, 1)  # (N, width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), grid])[None].float()


def random_masking(mask_noise, mask_ratio):
    """Hide a random subset of each sample's patches: those with the largest noise.

    mask_noise: (B, N), any distribution without ties. Returns ids_keep (B, K), the visible patches;
    ids_restore (B, N), which undoes the shuffle "visible first, then hidden"; and mask (B, N),
    1 = hidden, 0 = visible. K = int(N * (1 - mask_ratio)), as in the published MAE. ValueError for
    a mask_ratio outside [0, 1]. PAPER: sec. 4, "we mask 75% of input patches".
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask_ratio {mask_ratio} is no part of the patches; give 0 to 1")
    B, N = mask_noise.shape
    K = int(N * (1 - mask_ratio))
    # Sorting noise shuffles each sample by itself, in one call for the batch; every sample keeps
    # equally many patches, so that the visible ones are again one tensor.
    ids_shuffle = mask_noise.argsort(dim=1)  # (B, N)
    ids_restore = ids_shuffle.argsort(dim=1)  # (B, N), each patch's place in the shuffle
    mask = (ids_restore >= K).float()  # a patch is hidden if its place is K or later
    return ids_shuffle[:, :K], ids_restore, mask


def with_mask_tokens(x, mask_token, ids_restore):
    """CLS and visible tokens (B, 1 + K, d) -> CLS and all N in image order, (B, 1 + N, d).

    One learnt token (1, 1, d) stands for every hidden patch; its position alone says which.
    """
    B, _, d = x.shape
    hidden = mask_token.expand(B, 1 + ids_restore.shape[1] - x.shape[1], -1).to(x.dtype)
    tokens = torch.cat([x[:, 1:], hidden], dim=1)  # (B, N, d), visible first
    tokens = tokens.gather(1, ids_restore[:, :, None].expand(-1, -1, d))
    return torch.cat([x[:, :1], tokens], dim=1)


# ---- Vision transformer --------------------------------------------------------------------------


def linear(c_in, c_out):
    """nn.Linear with the published MAE's initialisation: Xavier-uniform weight, zero bias."""
    layer = nn.Linear(c_in, c_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection. (B, N, C) -> same."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)

    def split(self, x):
        """Queries, keys and values of (B, N, C): (B, heads, N, C / heads) each."""
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, heads, N, C / heads)

    def forward(self, x):
        q, k, v = self.split(x)
        # softmax(q k^T / sqrt(C / heads)) v, without ever storing the N x N weights
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))  # heads side by side again


class Mlp(nn.Module):
    """Two linear layers around an exact GELU; hidden width 4 C. (B, N, C) -> same."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = linear(width, 4 * width)
        self.fc2 = linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x, rate):
    """Stochastic depth (Huang et al. 2016) on a residual branch x (B, N, C), in training.

    Each sample's branch is dropped with probability `rate`, and divided by 1 - rate if it is not,
    which keeps the expectation. Draws from the global generator of x's device.
    """
    keep = torch.rand(len(x), 1, 1, device=x.device) >= rate
    return x * (keep.to(x.dtype) / (1 - rate))


class Block(nn.Module):
    """Pre-norm transformer block. (B, N, C) -> same. drop: rate of `drop_path`."""

    def __init__(self, width, heads, drop=0.0):
        super().__init__()
        self.drop = drop
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x):
        rate = self.drop if self.training else 0.0
        branch = self.attn(self.norm1(x))
        x = x + (drop_path(branch, rate) if rate else branch)
        branch = self.mlp(self.norm2(x))
        return x + (drop_path(branch, rate) if rate else branch)


class PatchEmbed(nn.Module):
    """Linear embedding of p x p patches, of the visible ones only where `ids_keep` is given.

    The weights are those of a stride-p convolution (the name and shape that checkpoints use), but
    applied as a matrix product to the gathered patches: a masked encoder then never touches the
    hidden 75 %.
    """

    def __init__(self, patch_size, width):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))  # the bias keeps its default

    def forward(self, images, ids_keep=None):
        B, _, H, W = images.shape
        p = self.patch_size
        x = images.view(B, 3, H // p, p, W // p, p)  # rows and columns, split into patches
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 3 * p * p)  # (B, N, 3pp), the weight's order
        if ids_keep is not None:
            x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))  # (B, K, 3pp)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision transformer encoder: fixed positions, CLS token, final norm; no head.

    drop: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(self, *, image_size, patch_size, width, depth, heads, drop=0.0):
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"image size {image_size} is not divisible by patch size {patch_size}; "
                f"use {image_size // max(1, patch_size) * patch_size or patch_size}"
            )
        self.patch_size = patch_size
        self.side = image_size // patch_size  # patches along one side
        self.patch_embed = PatchEmbed(patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, self.side))
        self.blocks = nn.ModuleList(
            Block(width, heads, drop * number / max(1, depth - 1)) for number in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(self, images, ids_keep=None, levels=()):
        """Images (B, 3, H, W) in [0, 1] -> (tokens (B, 1 + K, C), [the levels asked for]).

        Tokens: CLS first, after the final norm. ids_keep: (B, K), the patches to look at; None =
        all N. levels: numbers of blocks whose outputs, (B, 1 + K, C) without that norm, are wanted
        in this order; blocks count from 1, and level 0 is what enters the first.
        """
        check_size(images, self.side * self.patch_size)
        x = self.patch_embed(imagenet_normalize(images), ids_keep)  # (B, K, C)
        # Positions tell the tokens apart: attention itself does not see their order. CLS's is 0.
        positions = self.pos_embed[:, 1:]  # (1, N, C)
        x = x + (positions if ids_keep is None else positions[0][ids_keep])
        return self.run_blocks(x, levels)

    def layers(self):
        """Parameters from input to output: [[embedding], [block 1], ..., [norm]]."""
        embedding = [self.cls_token, *self.patch_embed.parameters()]
        blocks = [list(block.parameters()) for block in self.blocks]
        return [embedding, *blocks, list(self.norm.parameters())]

    def run_blocks(self, x, levels=()):
        """Embedded patches (B, K, C) with their positions -> what `encode` returns."""
        # Flat, so that the gradient is contiguous, too, as DDP wants it.
        cls = self.cls_token.flatten().expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1)  # (B, 1 + K, C)
        kept = {0: x}
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in levels:  # keeping all would cost memory where no gradient needs them
                kept[number] = x
        return self.norm(x), [kept[number] for number in levels]

    def forward(self, images):
        """Images (B, 3, H, W) in [0, 1] -> tokens (B, 1 + N, C), CLS first."""
        return self.encode(images)[0]


# ---- Masked autoencoder: the generator G ---------------------------------------------------------


class MAE(ViT):
    """Masked autoencoder: encodes the visible patches, reconstructs the whole image.

    PAPER: "G is the MAE model" of eq. 1; architecture of He et al. 2022, sec. 4 and supplement.
    With scales > 1 the last decoder blocks also give smaller images, for multi-scale losses
    (sec. 3.2, MSG-GAN). `MSGMAE` adds the paper's skip connections.
    """

    def __init__(
        self,
        *,
        image_size,
        patch_size,
        width,
        depth,
        heads,
        decoder_width,
        decoder_depth,
        decoder_heads,
        scales=1,  # images that come out; 1 = the published MAE
    ):
        # The encoder, which is all that is kept after pre-training ...
        super().__init__(
            image_size=image_size, patch_size=patch_size, width=width, depth=depth, heads=heads
        )
        most = (patch_size & -patch_size).bit_length()  # 16 px patches: 16, 8, 4, 2, 1; 14: 14, 7
        if not 1 <= scales <= most:
            raise ValueError(
                f"{scales} scales, but {patch_size} px patches give {most}, as they halve "
                f"{most - 1} times: take patches of a power of two"
            )
        # ... and the decoder: narrower and shallower, to save time.
        self.decoder_embed = linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.register_buffer("decoder_pos_embed", sincos_positions(decoder_width, self.side))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = linear(decoder_width, 3 * patch_size**2)
        # At scale l, patches have p = patch_size / 2^l pixels, down to one.
        # PAPER SILENT: how a map is "converted to an RGB image". A norm and a linear layer each.
        self.decoder_rgb = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(decoder_width, eps=1e-6), linear(decoder_width, 3 * p * p))
            for p in (patch_size >> scale for scale in range(1, scales))
        )
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, mask_ratio=0.75, mask_noise=None):
        """Hide patches, reconstruct the image: G(I_m).

        images: (B, 3, H, W) in [0, 1]. mask_noise: (B, N) fixes the mask (see `random_masking`);
        None draws it. Returns ([reconstruction (B, 3, h, w), ...], mask (B, N) with 1 = hidden).
        The list holds one image per scale, finest first: H, H/2, H/4, ... Values are in [0, 1]
        units, float32, unclamped. ValueError for noise of another shape.
        """
        shape = (len(images), self.side**2)
        if mask_noise is None:
            mask_noise = torch.rand(shape, device=images.device)
        if mask_noise.shape != shape:
            raise ValueError(f"mask_noise of {list(mask_noise.shape)} where {list(shape)} is due")
        ids_keep, ids_restore, mask = random_masking(mask_noise, mask_ratio)
        inputs = self.decoder_inputs(images, ids_keep, ids_restore)  # the encoder sees K patches
        return self.decode(inputs), mask

    def decoder_inputs(self, images, ids_keep, ids_restore):
        """Encode the patches ids_keep (B, K) -> [the decoder's input, then skips if there are any],
        (B, 1 + N, d) each.
        """
        tokens, _ = self.encode(images, ids_keep)  # (B, 1 + K, C)
        return [self.to_decoder(tokens, ids_restore)]

    def to_decoder(self, x, ids_restore):
        """Encoder tokens (B, 1 + K, C) -> the decoder's (B, 1 + N, d), mask tokens where hidden.

        PAPER: sec. 3.3, "mask tokens are added to the encoder feature maps of dimension d along
        with positional embeddings". PAPER SILENT: one each per level? All share one projection to
        d, one mask token and one set of positions.
        """
        x = self.decoder_embed(x)  # (B, 1 + K, d)
        return with_mask_tokens(x, self.mask_token, ids_restore) + self.decoder_pos_embed

    def decoder_maps(self, inputs):
        """-> [the decoder's input, the output of each block], (B, 1 + N, d) each."""
        maps = [inputs[0]]
        for number, block in enumerate(self.decoder_blocks, start=1):
            maps.append(block(self.fuse(maps[-1], inputs, number)))
        return maps

    def decode(self, inputs):
        """What `decoder_inputs` returns -> the list of reconstructions that `forward` returns."""
        maps = self.decoder_maps(inputs)
        # PAPER: sec. 3.3, "simultaneously converted to an RGB image at the required scale".
        # PAPER SILENT: which block gives which. The last gives the finest image, each earlier one
        # half its size; scales beyond the number of blocks come from the decoder's input.
        to_rgb = [nn.Sequential(self.decoder_norm, self.decoder_pred), *self.decoder_rgb]
        images = []
        for scale, layers in enumerate(to_rgb):
            x = maps[max(0, len(maps) - 1 - scale)][:, 1:]  # (B, N, d), CLS dropped
            # float32 whatever the autocast: losses compare pixels, and a bf16 step near 1 is .004,
            # a whole grey level of 255.
            with torch.autocast(x.device.type, enabled=False):
                x = layers(x.to(self.decoder_pred.weight.dtype)).float()  # (B, N, 3pp)
            images.append(imagenet_denormalize(unpatchify(x, self.patch_size >> scale)))
        return images

    def fuse(self, x, inputs, number):
        """What decoder block `number`, from 1, takes: here its predecessor's output alone."""
        return x


class MSGMAE(MAE):
    """MSG-MAE: skip connections from encoder levels to decoder blocks. PAPER: sec. 3.3, Figure 1.

    Multi-scale losses act on the last decoder blocks. Without skips, their gradient enters the
    encoder, the part that is kept, at one place: the decoder's input. Decoder block k > 1 takes its
    predecessor's map concatenated with an encoder level, brought back from 2d to d by one linear
    layer. The encoder is MAE's, under the same names.
    """

    def __init__(self, *, depth, decoder_width, decoder_depth, **sizes):
        super().__init__(
            depth=depth, decoder_width=decoder_width, decoder_depth=decoder_depth, **sizes
        )
        # PAPER SILENT: which levels, where encoder and decoder differ in depth. Evenly spaced,
        # deep to shallow, from the last but one to the first (the last is the decoder's input).
        # ViT-B's blocks 2 to 8 take levels 11, 9, 8, 6, 4, 3, 1.
        # The authors' code: levels 11 to 5; their levels 1 to 4 feed no block.
        steps = decoder_depth - 1
        self.skip_levels = [
            round(depth - 1 - i * (depth - 2) / max(1, steps - 1)) for i in range(steps)
        ]
        # PAPER SILENT: "a single learnt linear layer" for all blocks or one each. One each, and
        # none for block 1, whose input is the last level itself.
        self.decoder_fuse = nn.ModuleList(
            linear(2 * decoder_width, decoder_width) for _ in range(steps)
        )
        for layer in self.decoder_fuse:
            # PAPER SILENT: initialisation. The decoder's half starts as the identity, as without
            # skips: a random matrix before each block would scramble the residual stream.
            nn.init.eye_(layer.weight.data[:, :decoder_width])

    def decoder_inputs(self, images, ids_keep, ids_restore):
        """-> [the decoder's input, then the skips of decoder blocks 2, 3, ...]."""
        tokens, skips = self.encode(images, ids_keep, self.skip_levels)
        # PAPER SILENT: are levels normalised? Their size grows with depth, and `decoder_embed` is
        # made for the last level, which the final norm has normalised. So each is normalised here.
        skips = [F.layer_norm(x, x.shape[-1:]) for x in skips]
        return [self.to_decoder(x, ids_restore) for x in [tokens, *skips]]

    def fuse(self, x, inputs, number):
        """What decoder block `number` takes. PAPER: "concatenated", "of length 2d": channels are
        joined, not tokens."""
        if number == 1:  # it takes the decoder's input as it is
            return x
        # inputs[0] is block 1's, inputs[1] block 2's skip; the first fusing layer is block 2's.
        both = torch.cat([x, inputs[number - 1]], dim=2)  # (B, 1 + N, 2d)
        return self.decoder_fuse[number - 2](both)  # (B, 1 + N, d)


def build_mae(size, image_size=224, patch_size=16, arch="mae", scales=1):
    """An autoencoder of a size in MAE_SIZES: arch "mae" or "msg_mae", with `scales` outputs.

    ValueError for another name, or if patch size and image, or scales and patch, do not fit.
    """
    check_name("size", size, MAE_SIZES)
    networks = {"mae": MAE, "msg_mae": MSGMAE}
    check_name("arch", arch, networks)
    sizes = dict(image_size=image_size, patch_size=patch_size, scales=scales)
    return networks[arch](**sizes, **MAE_SIZES[size])


# ---- Discriminator D, which is also the loss network phi (sec. 3.1) ------------------------------


class ConvDiscriminator(nn.Module):
    """Strided-convolution discriminator for LS-GAN: is this image real or reconstructed?

    PAPER SILENT: the paper gives no architecture. Ours halves the image with 4 x 4 convolutions
    (as DCGAN does) until the side is below 8, doubling the channels each time; a linear layer on
    that last map gives the logit. No BatchNorm, which the authors' code has: statistics of real
    and reconstructed batches differ, so it hides brightness and contrast errors from phi. No
    sigmoid, which their code has too: eq. 4 and 5 compare the output itself with 0 and 1. At 224 px
    and widths 64 to 512 it has 7.0 M parameters.
    """

    def __init__(self, image_size, channels=64, max_channels=512):
        super().__init__()
        self.image_size = image_size
        layers, c_in, side = [], 3, image_size
        while side >= 8:
            c_out = min(channels * 2 ** len(layers), max_channels)
            layers.append(nn.Conv2d(c_in, c_out, kernel_size=4, stride=2, padding=1))
            c_in, side = c_out, side // 2
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(c_in * side * side, 1)
        for layer in layers:  # He et al. 2015: keeps the scale of activations without any norm
            nn.init.kaiming_normal_(layer.weight, a=0.2)
            nn.init.zeros_(layer.bias)

    def forward(self, images):
        """images: list of (B, 3, h, w) in [0, 1], finest first; only the finest is looked at.

        Returns (logits (B,), feature maps phi^1..phi^J, each (B, C_j, h_j, w_j)).
        PAPER SILENT: which of D's layers are phi. All but the last, after their activation.
        """
        check_pyramid(images, self.image_size)
        x = images[0] * 2 - 1
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        with torch.autocast(x.device.type, enabled=False):  # see `MSGDiscriminator.forward`
            return self.head(x.to(self.head.weight.dtype).flatten(1)).squeeze(1), features


# ---- Multi-scale discriminator (sec. 3.2, MSG-GAN) -----------------------------------------------


def discriminator_levels(image_size, scales, channels, max_channels):
    """Resolutions of a discriminator and its width at each, finest first.

    Sides halve while they are at least 8, so powers of two end at 4; widths double per halving from
    `channels` up to `max_channels`, whatever the image size. Returns: [(side, width)].
    PAPER SILENT: where StyleGAN2's D, made for powers of two, ends at 224 px: at 7.
    ValueError if there are more scales than sides, or a width is odd (half of it is an image's).
    """
    sides = [image_size]
    while sides[-1] >= 8:
        sides.append(sides[-1] // 2)
    if not 1 <= scales <= len(sides):
        raise ValueError(
            f"{scales} image scales, from one pixel per patch up, but {image_size} px gives only "
            f"sides {sides}: take smaller patches, or sides that halve more often"
        )
    if channels % 2 or max_channels % 2:
        raise ValueError(f"widths must be even, got {channels} up to {max_channels}")
    return [(side, min(channels * 2**i, max_channels)) for i, side in enumerate(sides)]


class Mean2x2(nn.Module):
    """F.avg_pool2d(x, 2): (B, C, h, w) -> (B, C, h // 2, w // 2), odd last rows, columns left out.

    Its gradient is what it must be, nearest-neighbour upsampling, to any order; avg_pool2d's own
    backward pass is slow on GPUs in channels_last. To copy: needs `LinearMap`, of ADA's section.
    """

    def forward(self, x):
        h, w = x.shape[2] // 2, x.shape[3] // 2
        like = torch.empty_like if x.shape[2:] == (2 * h, 2 * w) else torch.zeros_like

        def mean(x):
            return F.avg_pool2d(x, 2)

        def spread(y):  # the transpose: a quarter of each mean to each of its four pixels
            whole = like(x, dtype=y.dtype)  # in x's memory layout
            fours = whole[:, :, : 2 * h, : 2 * w].unflatten(3, (w, 2)).unflatten(2, (h, 2))
            y = y[:, :, :, None, :, None].expand_as(fours)  # (B, C, h, 2, w, 2)
            torch.mul(y, 0.25, out=fours)
            return whole

        return LinearMap.apply(x, mean, spread)


class MSGDiscriminator(nn.Module):
    """Plain convolutional discriminator that sees the image again at every scale.

    Each block halves the map. The image of the new size then joins as channels: half of the
    next block's input is what the network has seen so far, half is the image through a 1x1
    convolution, so every scale of the decoder receives a gradient of its own.

    PAPER SILENT: minibatch deviation, which the authors' code and MSG-GAN have; here in
    `StyleGAN2Discriminator` alone. At 224 px, widths 64 to 512 and five scales: 12.2 M parameters.
    """

    def __init__(self, image_size, scales, channels, max_channels):
        super().__init__()
        self.image_size = image_size
        levels = discriminator_levels(image_size, scales, channels, max_channels)
        widths = [width for _, width in levels]
        # PAPER SILENT: how an image joins. 1x1 convolution of the image, then concatenation
        # (MSG-GAN's "lin_cat"), the cheapest of its three ways, since both parts have half the
        # width. `own`: the channels that the network's own map keeps where an image joins it.
        own = [width // 2 if 0 < i < scales else width for i, width in enumerate(widths)]
        self.from_rgb = nn.ModuleList(nn.Conv2d(3, width, 1) for width in own[:scales])
        self.blocks = nn.ModuleList(map(self.block, widths, own[1:]))
        last_side, last_width = levels[-1]
        self.head = nn.Sequential(
            nn.Conv2d(last_width, last_width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(last_width * last_side**2, 1),
        )
        # PAPER SILENT: initialisation. He's, with ordinary layers: Adam's step then means the
        # same here as in the autoencoder, whereas an equalised rate wants one ten times larger.
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, a=0.2)
                nn.init.zeros_(layer.bias)

    @staticmethod
    def block(c_in, c_out):
        """(B, c_in, h, w) -> (B, c_out, h // 2, w // 2)."""
        return nn.Sequential(
            nn.Conv2d(c_in, c_in, 3, padding=1),
            nn.LeakyReLU(0.2),
            Mean2x2(),  # DIFFERS: MSG-GAN pools last; one third less arithmetic here
            nn.Conv2d(c_in, c_out, 3, padding=1),
            nn.LeakyReLU(0.2),
        )

    def forward(self, images):
        """[(B, 3, h, w)] in [0, 1], finest first -> logits (B,), [(B, C_j, h_j, w_j)].

        PAPER SILENT: which of D's layers are phi. The map at the end of each block, after its
        activation, before the next smaller image is concatenated to it.
        """
        check_pyramid(images, self.image_size)
        images = [2 * x - 1 for x in images]  # to [-1, 1]
        rgb = [layer(x) for layer, x in zip(self.from_rgb, images, strict=True)]
        x, features = rgb[0], []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            features.append(x)
            if i < len(rgb):  # half of what the next block takes is the image of this size
                x = torch.cat([x, rgb[i]], dim=1)
        # float32 whatever the autocast: D's answers differ by less than a half-precision step long
        # before it is sure of them.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.to(self.head[0].weight.dtype)).squeeze(1), features


# ---- StyleGAN2 discriminator, multi-scale (sec. 3.2, StyleGANv2-ADA) -----------------------------


class EqualConv2d(nn.Module):
    """Convolution with equalised learning rate: weights stored as N(0, 1), scaled when used.

    Adam moves every stored weight by about the learning rate, so scaling by 1 / sqrt(fan_in)
    at run time makes all layers learn at the same relative speed.

    c_in, c_out, kernel, stride, padding: as in nn.Conv2d
    activate: add a bias, then sqrt(2) * leaky_relu(0.2), then clamp in fp16; otherwise linear
    gain:     factor on the result; a residual block folds its 1 / sqrt(2) in here
    """

    def __init__(self, c_in, c_out, kernel, *, stride=1, padding=0, activate=True, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(c_out)) if activate else None
        self.stride, self.padding, self.gain = stride, padding, gain

    def forward(self, x):
        scale = self.gain / math.sqrt(self.weight[0].numel())  # fan_in = c_in * kernel**2
        if self.bias is None:
            return F.conv2d(x, self.weight * scale, None, self.stride, self.padding)
        # c * leaky(x) = leaky(c * x) for c > 0, so both gains go into the weights, for free.
        weight, bias = self.weight * (scale * math.sqrt(2)), self.bias * (self.gain * math.sqrt(2))
        x = F.leaky_relu(F.conv2d(x, weight, bias, self.stride, self.padding), 0.2)
        if x.dtype != torch.float16:  # DIFFERS: StyleGAN2-ADA clamps in float32, too
            return x
        limit = 256 * self.gain  # far from 65504, where fp16 ends
        return x.clamp(-limit, limit)


class EqualLinear(nn.Module):
    """The same for (B, C) vectors, always with a bias; never clamped."""

    def __init__(self, c_in, c_out, activate):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.activate = activate

    def forward(self, x):
        x = F.linear(x, self.weight / math.sqrt(self.weight.shape[1]), self.bias)
        return math.sqrt(2) * F.leaky_relu(x, 0.2) if self.activate else x


class Blur(nn.Module):
    """[1, 3, 3, 1] / 8 low-pass filter of rows and columns, zero-padded: no aliasing at stride 2.

    (B, C, side, side) -> (B, C, n, n), n = (side + 2 padding - 4) // stride + 1. As two matrix
    products, y = M x M^T, where M (n, side) holds taps, padding and stride: a depthwise convolution
    does the same, but has no fast GPU kernel in channels_last, nor a second derivative that leaves
    the constant kernel alone.

    Folding it into the kernel that follows (3x3 becomes 6x6) would save a map but cost more.
    """

    def __init__(self, side, stride, padding):
        super().__init__()
        starts = stride * torch.arange((side + 2 * padding - 4) // stride + 1) - padding
        tap = torch.arange(side) - starts[:, None]  # (n, side): which tap meets which pixel
        matrix = torch.zeros(tap.shape)
        for number, weight in enumerate((1, 3, 3, 1)):
            matrix[tap == number] = weight / 8
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x):
        M = self.matrix.to(x.dtype)
        if not x.is_contiguous(memory_format=torch.channels_last):
            return M @ x @ M.T
        # The same with channels innermost, in views alone: no map is copied or laid out anew.
        x = M @ x.permute(0, 2, 3, 1)  # (B, side, n, C), columns blurred
        x = (M @ x.flatten(2)).unflatten(2, x.shape[2:])  # (B, n, n, C), rows blurred
        return x.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """(B, c_in, side, side) -> (B, c_out, side // 2, side // 2), every downsampling blurred."""

    def __init__(self, side, c_in, c_out):
        super().__init__()
        gain = math.sqrt(0.5)  # (main + skip) / sqrt(2) keeps the variance
        self.main = nn.Sequential(
            EqualConv2d(c_in, c_in, 3, padding=1),
            Blur(side, stride=1, padding=2),  # side + 1
            EqualConv2d(c_in, c_out, 3, stride=2, gain=gain),
        )
        self.skip = nn.Sequential(
            Blur(side, stride=2, padding=1),
            EqualConv2d(c_in, c_out, 1, activate=False, gain=gain),
        )

    def forward(self, x):
        return self.main(x) + self.skip(x)


def append_minibatch_std(x, group):
    """Append one channel that says how much the samples of a group differ (Karras et al. 2018).

    x: (B, C, h, w) -> (B, C + 1, h, w). The new channel is constant per sample: the standard
    deviation over its group, averaged over channels and positions. A generator that always
    paints the same picture gives itself away.

    Sample k is in group k mod (B / g), where g is `group` or the largest smaller number that
    divides B. Processes that hold every W-th sample thus hold whole groups, so that W processes
    equal one if g divides the batch of each. Call D on reals and fakes separately, since a group
    of both would give the answer away.
    """
    b, _, h, w = x.shape
    g = next(g for g in range(min(group, b), 0, -1) if b % g == 0)
    groups = x.reshape(g, b // g, *x.shape[1:])  # (G, M, C, h, w)
    std = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (M,)
    return torch.cat([x, std.repeat(g).view(b, 1, 1, 1).expand(b, 1, h, w)], dim=1)


class Epilogue(nn.Module):
    """Last map (B, C, side, side) and its minibatch deviation -> logits (B,).

    In the weights' type, float32, whatever the autocast.
    """

    def __init__(self, width, side, mbstd_group):
        super().__init__()
        self.mbstd_group = mbstd_group
        self.conv = EqualConv2d(width + 1, width, 3, padding=1)
        self.hidden = EqualLinear(width * side**2, width, activate=True)
        self.logit = EqualLinear(width, 1, activate=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.logit.weight.dtype)
            x = self.conv(append_minibatch_std(x, self.mbstd_group))
            return self.logit(self.hidden(x.flatten(1))).squeeze(1)


class StyleGAN2Discriminator(nn.Module):
    """StyleGAN2's residual discriminator with an image entering at every scale.

    At 224 px and widths 64 to 512 (those of StyleGAN2-ADA at 256 px, whose maps of 256 ... 8 become
    224 ... 7) it has 27.7 M parameters with one scale and 28.6 M with five. Train it with Adam,
    betas (0, 0.99). StyleGAN2-ADA's rate is 0.0025, since weights are N(0, 1), not
    N(0, 1 / fan_in); beside an autoencoder, 1e-4 did better.

    PAPER: sec. 3.2, "all modifications made to the discriminator in the StyleGANv2-ADA paper", and
    "the loss function [...] remains unchanged". PAPER SILENT: which. Taken: residual blocks,
    equalised learning rate, blurred strided convolutions, minibatch deviation, ADA. Not: its
    logistic loss; R1, unless --r1-gamma is given; its condition on classes; in training, a moving
    average of G's weights, and Adam rescaled for lazy regularisation.
    """

    # DIFFERS: under autocast all blocks run in half precision, not only the four largest maps;
    # the epilogue is float32 as published, so only the small blocks lose digits.

    def __init__(self, image_size, scales, channels, max_channels, mbstd_group=4):
        super().__init__()
        self.image_size = image_size
        levels = discriminator_levels(image_size, scales, channels, max_channels)
        sides, widths = zip(*levels, strict=True)
        self.blocks = nn.ModuleList(map(ResidualBlock, sides, widths, widths[1:]))
        # PAPER SILENT: how an image joins a residual network. As in MSG-StyleGAN ("cat_lin"):
        # half-width fromRGB, concatenated, 1x1 convolution back to the published width.
        half = [width // 2 if i > 0 else width for i, width in enumerate(widths[:scales])]
        self.from_rgb = nn.ModuleList(EqualConv2d(3, width, 1) for width in half)
        self.join = nn.ModuleList(
            EqualConv2d(width + width // 2, width, 1, activate=False) for width in widths[1:scales]
        )
        self.epilogue = Epilogue(widths[-1], levels[-1][0], mbstd_group)

    def forward(self, images):
        """[(B, 3, h, w)] in [0, 1], finest first -> logits (B,), [(B, C_j, h_j, w_j)].

        PAPER SILENT: phi. Each block's sum of its two branches, before the next image joins.
        """
        check_pyramid(images, self.image_size)
        images = [2 * x - 1 for x in images]  # to [-1, 1]
        rgb = [layer(x) for layer, x in zip(self.from_rgb, images, strict=True)]
        x, features = rgb[0], []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            features.append(x)
            if i < len(rgb):
                x = self.join[i - 1](torch.cat([x, rgb[i]], dim=1))
        return self.epilogue(x), features


def build_discriminator(kind, image_size, scales, channels, max_channels):
    """D of a LOSSES row: kind "conv", "msg" or "stylegan2", for `scales` images, finest first.

    ValueError for another kind, or where scales or widths do not fit the image size.
    """
    if kind == "conv":
        return ConvDiscriminator(image_size, channels, max_channels)
    networks = {"msg": MSGDiscriminator, "stylegan2": StyleGAN2Discriminator}
    check_name("kind of D", kind, ("conv", *networks))
    return networks[kind](image_size, scales, channels, max_channels)


# ---- Adaptive discriminator augmentation (sec. 3.2; Karras et al. 2020) --------------------------
# Self-contained: to copy it, take this section, `functools`, `math`, torch and F.


class LinearMap(torch.autograd.Function):
    """y = A(x), where A is linear in x and At is its transpose: LinearMap.apply(x, A, At).

    A gradient goes back through a matrix by its transpose, and through the transpose by the
    matrix. So A and At are each other's backward, to any order, and what they hold (a grid) gets
    no gradient.
    """

    @staticmethod
    def forward(ctx, x, A, At):
        ctx.A, ctx.At = A, At
        return A(x)

    @staticmethod
    def backward(ctx, grad):
        return LinearMap.apply(grad, ctx.At, ctx.A), None, None


def ada_noise(seeds):
    """Random numbers of each sample, a function of its seed alone: not of p, rank or batch.

    seeds: (B,) int64. Returns gates (B, 13) and uniforms (B, 8) in [0, 1), normals (B, 7), on CPU.
    """
    generator, rows = torch.Generator(), []
    for seed in seeds.tolist():
        # The CPU generator reads 32 bits of its seed; hashed, all 64 bits of ours count.
        generator.manual_seed((seed * 0x9E3779B97F4A7C15 % 2**64) >> 32)
        uniforms = torch.rand(21, generator=generator)
        rows.append(torch.cat([uniforms, torch.randn(7, generator=generator)]))
    return torch.stack(rows).split((13, 8, 7), dim=1)


def geometry_matrix(gates, uniforms, normals, size):
    """Eight geometric transforms as one out -> in matrix; exactly the identity if no gate opens.

    gates: (B, 8) bool, in the order of the list below; uniforms: (B, 6) in [0, 1);
    normals: (B, 4); size: side of the finest scale, pixels.
    Returns (B, 3, 3), acting on (x, y, 1), x right, y down, the image being [-1, 1]^2 at every
    scale: in pixels of a scale of side S it is diag(S/2, S/2, 1) T diag(2/S, 2/S, 1).
    """
    flip, turn, shift, zoom, spin1, stretch, spin2, drift = gates.float().unbind(dim=1)
    u, z = uniforms.unbind(dim=1), normals.unbind(dim=1)
    identity = torch.eye(3).repeat(len(gates), 1, 1)

    def scale(x, y):
        return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=1))

    def rotate(angle):
        matrix = identity.clone()
        matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos(), -angle.sin()
        matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin(), angle.cos()
        return matrix

    def translate(x, y):
        matrix = identity.clone()
        matrix[:, 0, 2], matrix[:, 1, 2] = x, y
        return matrix

    mirror = 1 - 2 * flip * (2 * u[0]).floor()  # one time in two among open gates
    # Whole pixels of the finest scale, so fractions of a pixel on the coarser ones.
    dx, dy = (shift * ((v - 0.5) * 0.25 * size).round() * 2 / size for v in u[2:4])
    grow, widen = 2 ** (0.2 * zoom * z[0]), 2 ** (0.2 * stretch * z[1])
    # In the order in which the image undergoes them. Each entry is the inverse, output to input, so
    # that the product runs from left to right.
    inverses = [
        scale(mirror, torch.ones_like(mirror)),
        rotate(math.pi / 2 * turn * (4 * u[1]).floor()),  # anticlockwise quarter turns
        translate(-dx, -dy),
        scale(1 / grow, 1 / grow),
        rotate(-math.pi * spin1 * (2 * u[4] - 1)),
        scale(1 / widen, widen),
        rotate(-math.pi * spin2 * (2 * u[5] - 1)),
        translate(-0.25 * drift * z[2], -0.25 * drift * z[3]),  # sigma = side / 8, and side = 2
    ]
    return functools.reduce(torch.matmul, inverses)  # (B, 3, 3)


def colour_matrix(gates, uniforms, normals):
    """Five colour transforms as one matrix; exactly the identity if no gate opens.

    gates: (B, 5) bool; uniforms: (B, 2) in [0, 1); normals: (B, 3).
    Returns (B, 4, 4), acting on (r, g, b, 1) with colours in [-1, 1].
    """
    bright, contrast, luma, hue, saturation = gates.float()[:, :, None, None].unbind(dim=1)
    u, z = (noise[:, :, None, None].unbind(dim=1) for noise in (uniforms, normals))
    rgb, grey, cross, offset = torch.zeros(4, 4, 4).unbind(dim=0)
    rgb[:3, :3] = torch.eye(3)
    grey[:3, :3] = 1 / 3  # projector on the grey axis v = (1, 1, 1) / sqrt(3)
    cross[:3, :3] = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # v x rgb
    offset[:3, 3] = 1

    angle = math.pi * hue * (2 * u[1] - 1)
    changes = [  # each I + (something that a closed gate makes 0); the last acts first
        (2 ** (saturation * z[2]) - 1) * (rgb - grey),
        angle.sin() * cross + (1 - angle.cos()) * (grey - rgb),  # Rodrigues: cross^2 = grey - rgb
        -2 * luma * (2 * u[0]).floor() * grey,
        (2 ** (0.5 * contrast * z[1]) - 1) * rgb,
        0.2 * bright * z[0] * offset,
    ]
    return functools.reduce(torch.matmul, [torch.eye(4) + change for change in changes])


def warp(x, rows, T):
    """x (B, 3, S, S) with images `rows` (K,) resampled at T (K, 3, 3), the others untouched."""
    if len(rows) == 0:
        return x
    side = x.shape[-1]
    if x.shape[-2] != side:  # a rotation of [-1, 1]^2 would shear the pixels
        raise ValueError(f"ADA needs square images, got {tuple(x.shape)}")
    axis = (2 * torch.arange(side, device=x.device, dtype=x.dtype) + 1) / side - 1  # pixel centres
    # Element by element, since a matrix product (F.affine_grid) may run in TF32 or bfloat16.
    T = T.to(x)[:, None, None, :2]  # (K, 1, 1, 2, 3)
    grid = T[..., 0] * axis[:, None] + T[..., 1] * axis[:, None, None] + T[..., 2]  # (K, S, S, 2)

    def sample(x):
        # DIFFERS: bilinear with edge reflection, where Karras et al. filter (sym6) at twice the
        # resolution: 40 times faster on CPU, scales agree better, but shrunken fine texture
        # aliases.
        return F.grid_sample(x, grid, "bilinear", "reflection", align_corners=False)

    def scatter(y):  # the transpose: each value goes to the pixels it was made of
        bilinear, reflection, wanted = 0, 2, [True, False]  # gradient of the image, not the grid
        backward = torch.ops.aten.grid_sampler_2d_backward
        return backward(y, y, grid, bilinear, reflection, False, wanted)[0]  # second y: the shape

    moved = LinearMap.apply(x.index_select(0, rows), sample, scatter)
    return x.index_copy(0, rows, moved)


def recolour(x, rows, C):
    """x (B, 3, S, S) in [0, 1] with images `rows` (K,) mapped by C (K, 4, 4); never clamped."""
    if len(rows) == 0:
        return x
    signed = 2 * x.index_select(0, rows) - 1  # [0, 1] -> [-1, 1], the range C is made for
    C = C.to(x)[:, :3, :, None, None]  # (K, 3, 4, 1, 1)
    signed = (C[:, :, :3] * signed[:, None]).sum(dim=2) + C[:, :, 3]  # no TF32 here either
    return x.index_copy(0, rows, (signed + 1) / 2)


class AdaAugment:
    """Random augmentation of all that D sees, each transform with probability p; p adapts.

    p rises while D is sure of the real images (it overfits) and falls while it is not. Gradients
    reach the images. State: p, and the statistics since its last change.

        T, C = ada.sample(seeds, size)                             # one draw per image
        real, _ = disc(ada(reals, T, C))                           # lists of scales
        fake, _ = disc(ada(reconstructions, T, C))
        ada.update((real > 0.5).float().mean().item(), len(real))  # once per step
    """

    def __init__(
        self,
        *,
        target=0.6,  # of r_t = E sign(D(real) - 1/2)
        ramp_images=500_000,  # real images during which p can go from 0 to 1
        interval=4,  # steps between two changes of p
        fixed_p=None,  # a constant p instead
    ):
        # PAPER SILENT: transforms, target, speed. As Karras et al. 2020: mirror, quarter turns,
        # whole-pixel shift, zoom, rotation, stretch, rotation again, shift (`geometry_matrix`);
        # brightness, contrast, luma flip, hue, saturation (`colour_matrix`). No filters, noise or
        # cutout, as there ("bgc"). But see `warp`.
        self.target, self.ramp_images, self.interval = target, ramp_images, interval
        self.fixed_p = fixed_p
        # Plain numbers: what is drawn on the CPU must not wait for a GPU to say what p is.
        self.p = float(fixed_p or 0)
        self.sign_sum, self.images, self.steps = 0.0, 0, 0  # since p last changed

    def state_dict(self):
        return {k: getattr(self, k) for k in ("p", "sign_sum", "images", "steps")}

    def load_state_dict(self, state):
        vars(self).update(state)
        self.p = self.p if self.fixed_p is None else self.fixed_p

    def sample(self, seeds, size):
        """One draw per sample: seeds (B,) int64, finest side in pixels -> T (B, 3, 3), C (B, 4, 4).

        Both stay on the CPU, where asking which samples are left alone costs no synchronisation.
        """
        gates, uniforms, normals = ada_noise(seeds)
        chance = torch.full((13,), self.p)
        chance[[4, 6]] = 1 - math.sqrt(1 - self.p)  # two rotations: at least one with probability p
        gates = gates < chance
        T = geometry_matrix(gates[:, :8], uniforms[:, :6], normals[:, :4], size)
        return T, colour_matrix(gates[:, 8:], uniforms[:, 6:], normals[:, 4:])

    def __call__(self, images, T=None, C=None):
        """Images: list of (B, 3, S, S) in [0, 1] -> same shapes, float32, beyond [0, 1] at times.

        T, C: from `sample`; None draws them, by torch's global generator. Samples whose T (or C) is
        the identity come back bitwise as they were. ValueError if given a tensor for a list.
        """
        if isinstance(images, torch.Tensor):
            raise ValueError("give a list of images by scale, finest first: [images] for one scale")
        if T is None:
            seeds = torch.randint(2**62, (len(images[0]),))
            T, C = self.sample(seeds, images[0].shape[-1])

        def changed(matrices):  # indices (K,)
            return (matrices != torch.eye(matrices.shape[-1])).any(dim=(1, 2)).nonzero()[:, 0]

        def moved(tensor):  # from pinned memory, so that the CPU need not wait for the copy
            tensor = tensor.pin_memory() if images[0].is_cuda else tensor
            return tensor.to(images[0].device, non_blocking=True)

        rows_T, rows_C = changed(T), changed(C)
        T, C, rows_T, rows_C = map(moved, (T[rows_T], C[rows_C], rows_T, rows_C))
        # Half precision becomes float32, also under autocast; float64 remains.
        images = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in images]
        return [recolour(warp(x, rows_T, T), rows_C, C) for x in images]

    def update(self, share_real, images):
        """Record D's answers to a step's augmented real images; every `interval` steps, change p.

        share_real: the share of them that D calls real (logit above 1/2), over all processes, so
        that p is the same everywhere. images: how many they were.

        p moves up by images / ramp_images while r_t, the mean sign of D(real) - 1/2, is above its
        target, and down while it is below: D should be right on about 80 % of the real images.
        """
        if self.fixed_p is not None:
            return
        # PAPER SILENT: least-squares D, labels 0 and 1, hence the boundary 1/2; Karras et al.
        # have a logistic D and 0.
        self.sign_sum += (2 * share_real - 1) * images
        self.images += images
        self.steps += 1
        if self.steps < self.interval:
            return
        r = self.sign_sum / self.images
        rise = (r > self.target) - (r < self.target)  # 1, 0 or -1
        # DIFFERS: p is also kept below 1; Karras et al. do not (above 1 nothing changes).
        self.p = min(max(self.p + rise * self.images / self.ramp_images, 0.0), 1.0)
        self.sign_sum, self.images, self.steps = 0.0, 0, 0


# ---- Classifier: the encoder after pre-training (sec. 4, fine-tuning) ----------------------------


class BatchStandardize(nn.Module):
    """Batch normalisation without weights, for features (B, C) that need no gradient.

    As nn.BatchNorm1d(affine=False), but with the statistics of all processes' batches, so that
    two processes do what one with twice the batch does (nn.SyncBatchNorm does it on GPUs alone).
    ValueError for a single sample in training: it has no variance.
    """

    def __init__(self, width, momentum=0.1, eps=1e-6):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        x, mean, var = x.float(), self.running_mean, self.running_var
        if self.training:
            if len(x) == 1 and not dist.is_initialized():
                raise ValueError("batch normalisation of one sample: it has no variance")
            double = x.double()
            sums = torch.stack([torch.ones_like(double), double, double.square()]).sum(1)  # (3, C)
            if dist.is_initialized():
                dist.all_reduce(sums)
            count = sums[0]
            mean = sums[1] / count
            var = (sums[2] / count - mean.square()).clamp(min=0)
            unbiased = var * count / (count - 1).clamp(min=1)
            # A batch that is not finite is left out, or it would stay in the statistics for ever.
            finite = mean.isfinite().all() & unbiased.isfinite().all()
            for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
                moved = running.lerp(now.float(), self.momentum)
                running.copy_(torch.where(finite, moved, running))
        return (x - mean.float()) / (var.float() + self.eps).sqrt()


def pooled(tokens, pool):
    """Tokens (B, 1 + N, C) -> (B, C): CLS, "cls", or the "mean" of the patches'."""
    check_name("pool", pool, ("cls", "mean"))
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)


class Classifier(nn.Module):
    """ViT encoder with the original ViT's head: one linear layer. Images -> logits (B, classes).

    PAPER: sec. 4, "the original ViT model classification head". PAPER SILENT: whether it sees CLS,
    as the original does, or the mean token; and whether positions are trained: ours stay as they
    are (MAE's fine-tuning trains them).

    pool: "cls", the CLS token, or "mean", the mean patch token, both after the encoder's own final
    norm (MAE's fine-tuning averages first, under a new norm).
    frozen: a linear probe. The encoder then needs no gradient and stays in evaluation mode, and
    the head sees standardised features (PAPER SILENT: MAE's probe has them).
    """

    def __init__(self, encoder, classes, pool="cls", frozen=False):
        super().__init__()
        width = encoder.cls_token.shape[-1]
        self.encoder, self.pool, self.frozen = encoder, pool, frozen
        self.standardize = BatchStandardize(width) if frozen else nn.Identity()
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.encoder.requires_grad_(not frozen).train(not frozen)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def features(self, images):
        """Images (B, 3, H, W) in [0, 1] -> (B, C)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return pooled(self.encoder(images), self.pool)

    def forward(self, images):
        x = self.standardize(self.features(images))
        with torch.autocast(x.device.type, enabled=False):
            # In float32, the weights' type: half would tie logits that differ by a 16th.
            return self.head(x.to(self.head.weight.dtype))

    def layers(self):
        """Parameters from input to output: [[embedding], [block 1], ..., [norm, head]]."""
        *below, norm = self.encoder.layers()
        return [*below, norm + list(self.head.parameters())]


def build_encoder(size, image_size, patch_size, drop=0.0):
    """The encoder of a size in MAE_SIZES; ValueError if the patch size does not fit the image."""
    check_name("size", size, MAE_SIZES)
    sizes = {k: MAE_SIZES[size][k] for k in ("width", "depth", "heads")}
    return ViT(image_size=image_size, patch_size=patch_size, drop=drop, **sizes)


def build_classifier(size, classes, *, image_size, patch_size, pool, frozen, drop=0.0):
    """A classifier of a size in MAE_SIZES; ValueError if the patch size does not fit the image."""
    return Classifier(build_encoder(size, image_size, patch_size, drop), classes, pool, frozen)


# ---- Loss networks phi with published weights (eq. 7, and VGG) -----------------------------------


class DVAEConv(nn.Module):
    """Convolution with the weight names of DALL-E's files: w (out, in, k, k), b (out,)."""

    def __init__(self, c_in, c_out, side):
        super().__init__()
        self.w = nn.Parameter(torch.randn(c_out, c_in, side, side) / (c_in * side**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(c_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[2] // 2)


class DVAEBlock(nn.Module):
    """Residual block of the dVAE encoder: id(x) + res(x) / layers^2, four convolutions in res."""

    def __init__(self, c_in, c_out, layers):
        super().__init__()
        self.gain = 1 / layers**2
        self.id_path = DVAEConv(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        widths = [c_in, c_out // 4, c_out // 4, c_out // 4, c_out]
        self.res_path = nn.ModuleDict(
            {
                f"conv_{n}": DVAEConv(widths[n - 1], widths[n], 3 if n < 4 else 1)
                for n in range(1, 5)
            }
        )

    def forward(self, x):
        branch = x
        for conv in self.res_path.values():
            branch = conv(F.relu(branch))
        return self.id_path(x) + self.gain * branch


class DVAEEncoder(nn.Module):
    """Encoder of DALL-E's discrete VAE (Ramesh et al. 2021), the loss network phi of eq. 7.

    Parameter names are those of the published encoder.pkl (see `read_dvae`), without its last
    layer, which names codes and gives no features. Frozen.
    """

    def __init__(self, width=256):
        super().__init__()
        widths, groups = [width, width, 2 * width, 4 * width, 8 * width], {}
        groups["input"] = DVAEConv(3, width, 7)
        for n in range(1, 5):
            groups[f"group_{n}"] = nn.ModuleDict(
                {
                    "block_1": DVAEBlock(widths[n - 1], widths[n], layers=8),
                    "block_2": DVAEBlock(widths[n], widths[n], layers=8),
                }
            )
        self.blocks = nn.ModuleDict(groups).requires_grad_(False)

    def forward(self, images):
        """Images (B, 3, H, W) in [0, 1], H and W divisible by 8 -> the outputs of the four groups.

        (B, 256, H/2, W/2), (B, 512, H/4, W/4), (B, 1024, H/8, W/8), (B, 2048, H/8, W/8). Of a list
        of scales, which discriminators take, the finest.
        PAPER SILENT: which layers of the dVAE are phi^1..phi^J.
        """
        # 0.8 x + 0.1: what OpenAI trained it on, away from black and white.
        x, features = self.blocks["input"](0.8 * finest(images) + 0.1), []
        for n in range(1, 5):
            for block in self.blocks[f"group_{n}"].values():
                x = block(x)
            x = F.max_pool2d(x, 2) if n < 4 else x
            features.append(x)
        return features


class VGGFeatures(nn.Module):
    """VGG-16, frozen, as Johnson et al. 2016 compare with it: relu1_2, relu2_2, relu3_3, relu4_3.

    Parameter names are those of torchvision's vgg16. To copy: needs torchvision too.
    """

    def __init__(self):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        self.features = make_layers(cfgs["D"])[:23].requires_grad_(False)

    def forward(self, images):
        """Images (B, 3, H, W) in [0, 1] -> 64, 128, 256, 512 channels at H, H/2, H/4, H/8.

        Of a list of scales, which discriminators take, the finest.
        """
        x, features = imagenet_normalize(finest(images)), []
        for number, layer in enumerate(self.features):
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)  # torchvision's is in place
            if number in (3, 8, 15, 22):
                features.append(x)
        return features


# ---- Weights: files -------------------------------------------------------------------
# Whatever is wrong with a file or its weights is a ValueError that says so in one line.


def load_file(path, kind="a checkpoint"):
    """A file of tensors -> the dict it holds, on the CPU, as data: nothing in it is executed.

    path: .safetensors, or anything that torch.save wrote. kind: what to say that the file is not.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file as load_safetensors

            return load_safetensors(path)
        # The published MAE's own checkpoints hold their arguments: a class that does nothing.
        harmless = torch.serialization.safe_globals([argparse.Namespace])
        with warnings.catch_warnings(), harmless:
            warnings.simplefilter("ignore")  # of foreign pickles: refused just below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the path of {kind}") from None
    except Exception as error:  # anything can be in the file
        raise ValueError(f"{path} is not {kind} ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {kind} (it holds a {type(content).__name__})")
    return content


def read_weights(path, kind="a file of ViT-MAE weights"):
    """Weights of an autoencoder or encoder, ours or another project's -> as `named_as_ours`."""
    return named_as_ours(load_file(path, kind), path, kind)


def named_as_ours(content, path, kind):
    """What `load_file` returned -> ({our name: tensor}, [remarks to print]); see `from_others`.

    Where a script other than train.py trained more than an autoencoder, the encoder alone.
    """
    other_script = content.get("script", "train.py") != "train.py"
    for name in ("mae", "model", "state_dict"):
        content = content[name] if isinstance(content.get(name), dict) else content
    weights = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not weights:
        raise ValueError(f"{path} is not {kind} (it holds no tensors)")
    if other_script and not all(k.startswith((*ENCODER, *DECODER)) for k in weights):
        encoder = {k: v for k, v in weights.items() if k.startswith(ENCODER)}
        others = sorted({k.split(".")[0] for k in weights.keys() - encoder.keys()})
        return encoder, [f"left out {few(others)}"]
    return from_others(weights, path)


# ---- Weights: loss networks -----------------------------------------------------------

# Where the weights of loss networks are published, and what they are.
PUBLISHED = {
    "dvae": ("https://cdn.openai.com/dall-e/encoder.pkl", "OpenAI's dVAE encoder"),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", "torchvision's VGG-16"),
}


def build_loss_network(kind, path=None):
    """A frozen phi, "dvae" or "vgg", with its published weights; ValueError if they do not fit.

    path: the published file; None downloads it (vgg alone).
    """
    phi = DVAEEncoder() if kind == "dvae" else VGGFeatures()
    url, what = PUBLISHED[kind]
    try:
        if path is None and kind == "dvae":
            raise ValueError("no file given")
        if path is None:
            weights = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", check_hash=True, weights_only=True
            )
        else:
            weights = read_dvae(path) if kind == "dvae" else load_file(path)
        if kind == "vgg":  # the classifier and the last convolutions are not needed
            wanted = phi.state_dict()
            weights = {k: v for k, v in weights.items() if k in wanted} or weights
        if faults := misfits(phi, weights):
            raise ValueError(faults)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path or kind + '_p'}: not the weights of {what} ({error}); --{kind}-weights takes "
            f"the file {url}"
        ) from None
    phi.load_state_dict(weights)
    return phi


# ---- Weights: into a network ----------------------------------------------------------

# How the names of an encoder's weights begin, and those of a decoder's.
ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
DECODER = ("decoder_", "mask_token")
# In no other project: MSG-MAE's skips and scales.
OURS_ALONE = ("decoder_fuse", "decoder_rgb")


def load_whole(network, weights, path):
    """Load weights into a network, all of them or none: ValueError lists what does not fit."""
    if faults := misfits(network, weights):
        raise ValueError(f"{path} does not fit, nothing was loaded; {faults}")
    network.load_state_dict(weights)


def load_encoder(path):
    """An encoder from any file that `read_weights` takes -> `ViT` in evaluation mode, on the CPU.

    Its sizes are read from the weights. It normalises by ImageNet's mean and deviation. Weights
    that were trained under others, as timm's augreg ones (.5, .5), load, but see wrong colours.
    ValueError, one line, for any other file.
    """
    weights, _ = read_weights(path)
    sizes = published_sizes(weights, path)
    encoder = build_encoder(sizes["model"], sizes["image_size"], sizes["patch_size"])
    load_whole(encoder, encoder_weights(weights, encoder.side, path), path)
    return encoder.eval()


def load_mae(path):
    """An autoencoder, as `load_encoder`, from a file that holds a decoder, too -> `MAE`."""
    weights, _ = read_weights(path)
    if not any(k.startswith(DECODER) for k in weights):
        raise ValueError(f"{path} holds an encoder alone; its decoder is needed, to paint")
    arch = "msg_mae" if any(k.startswith("decoder_fuse") for k in weights) else "mae"
    smaller = {k.split(".")[1] for k in weights if k.startswith("decoder_rgb.")}
    sizes = published_sizes(weights, path)
    mae = build_mae(sizes.pop("model"), **sizes, arch=arch, scales=1 + len(smaller))
    load_autoencoder(mae, weights, path)
    return mae.eval()


def load_autoencoder(mae, weights, path):
    """Give an autoencoder another's encoder, and decoder where there is one -> what was taken.

    weights: {our name: tensor}. All of the encoder must be there, and all of the decoder or
    nothing of it; the skips and scales of MSG-MAE may be missing. Positions are resized.
    """
    expected = mae.state_dict()
    decoder = {k: v for k, v in weights.items() if k.startswith(DECODER)}
    if "decoder_pos_embed" in decoder:  # fixed
        decoder["decoder_pos_embed"] = expected["decoder_pos_embed"]
    encoder = encoder_weights(weights, mae.side, path)
    may_lack = OURS_ALONE if decoder else DECODER
    new = {k: v for k, v in expected.items() if k not in decoder and k.startswith(may_lack)}
    load_whole(mae, encoder | decoder | new, path)
    parts = ", ".join(sorted({k.split(".")[0] for k in new})) or "none"
    return f"{len(encoder)} tensors of the encoder and {len(decoder)} of the decoder; new: {parts}"


def resize_positions(positions, side):
    """Position embedding (1, 1 + n*n, C), CLS first -> (1, 1 + side*side, C), bicubic.

    ValueError if the patches are not those of a square image.
    """
    _, tokens, C = positions.shape
    n = math.isqrt(tokens - 1)
    if n * n != tokens - 1:
        raise ValueError(f"{tokens - 1} positions are not those of a square image")
    if n == side:
        return positions
    grid = positions[:, 1:].reshape(1, n, n, C).permute(0, 3, 1, 2).float()  # (1, C, n, n)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions)], dim=1)


def encoder_weights(weights, side, path):
    """Weights of an autoencoder, ours or published -> those of a `ViT` of side x side patches.

    weights: {name: tensor}, read from `path`. Leaves out the decoder, resizes the positions, fixed
    or learnt, and moves CLS's position, which `ViT.encode` takes for zero, into the CLS token. Any
    other name is kept, for strict loading to judge.
    """
    weights = {k: v for k, v in weights.items() if not k.startswith(DECODER)}
    if "pos_embed" in weights and "cls_token" in weights:
        try:
            positions = resize_positions(weights["pos_embed"], side)
            cls_token = weights["cls_token"] + positions[:, :1]
        except (ValueError, RuntimeError) as error:  # of any shape, in a foreign file
            raise ValueError(f"{path} has positions that cannot be resized: {error}") from None
        weights["cls_token"] = cls_token
        zero = torch.zeros_like(positions[:, :1])
        weights["pos_embed"] = torch.cat([zero, positions[:, 1:]], dim=1)
    return weights


def few(names, most=3):
    """Names in a message: at most so many, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest


def misfits(network, weights):
    """How weights {name: tensor} do not fit a network: one line, "" if they do."""
    expected = network.state_dict()
    faults = {
        "missing": [k for k in expected if k not in weights],
        "unexpected": [str(k) for k in weights if k not in expected],
        "of another shape": [
            f"{k} {list(getattr(v, 'shape', '?'))} for {list(expected[k].shape)}"
            for k, v in weights.items()
            if k in expected and getattr(v, "shape", None) != expected[k].shape
        ],
    }
    return "; ".join(f"{what}: {few(names)}" for what, names in faults.items() if names)


def check_sizes(weights, path, model, patch_size):
    """ValueError that names both sizes, if an encoder's weights are for another model or patch."""
    theirs = published_sizes(weights, path, model)
    if (theirs["model"], theirs["patch_size"]) != (model, patch_size):
        raise ValueError(
            f"{path} is of --model {theirs['model']} --patch-size {theirs['patch_size']}, this run "
            f"of --model {model} --patch-size {patch_size}: give those of the file"
        )


def published_sizes(weights, path, model=None, remedy="--model names the one it should be"):
    """Model, image and patch size of an encoder, from the shapes of its weights -> dict.

    model: what to take it for if its width and depth are none of MAE_SIZES; remedy: else.
    """
    dimensions = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    missing = [k for k, n in dimensions.items() if getattr(weights.get(k), "ndim", None) != n]
    if missing:
        raise ValueError(
            f"{path} is no MAE encoder; missing: {', '.join(missing)}; there is: "
            f"{few(list(weights))}"
        )
    width, patch_size = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    known = {(v["width"], v["depth"]): k for k, v in MAE_SIZES.items()}
    model = known.get((width, depth), model)
    if model is None:
        raise ValueError(
            f"{path} is {width} wide with {depth} blocks, which is none of "
            f"{', '.join(MAE_SIZES)}; {remedy}"
        )
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    return dict(model=model, image_size=side * patch_size, patch_size=patch_size)


# ---- Weights: the names of other projects ---------------------------------------------

# Hugging Face's names for ours, as its published files have them; inside a block, then elsewhere.
HF_IN_BLOCK = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.{}",  # three layers there: query, key, value
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HF_OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "blocks": "vit.encoder.layer",
    "norm": "vit.layernorm",
    "decoder_embed": "decoder.decoder_embed",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_blocks": "decoder.decoder_layers",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
HF_NEWER = {  # transformers 5 names its layers anew and renames files as it reads them
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def hf_names(name):
    """Our name of a weight -> Hugging Face's: one, or three for query, key and value together."""
    stem, dot, kind = name, "", ""
    if name.endswith((".weight", ".bias")):
        stem, dot, kind = name.rpartition(".")
    inside = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)", stem)
    if inside:
        stem = f"{HF_OUTSIDE[inside[1]]}.{inside[2]}.{HF_IN_BLOCK[inside[3]]}"
    else:
        stem = HF_OUTSIDE[stem]
    parts = ("query", "key", "value") if "{}" in stem else ("",)
    return [stem.format(part) + dot + kind for part in parts]


def from_hf(weights):
    """Weights of transformers' ViTMAE or ViTMAEModel -> {our name: tensor}; unknown names stay."""
    theirs, ours = {}, {}
    for name, value in weights.items():
        name = name if name.startswith(("vit.", "decoder.")) else f"vit.{name}"
        for newer, older in HF_NEWER.items():
            name = name.replace(newer, older)
        theirs[name] = value
    blocks = {int(n) for name in theirs for n in re.findall(r"layers?\.(\d+)\.", name)}
    stems = list(HF_OUTSIDE)
    for part, number in itertools.product(("blocks", "decoder_blocks"), sorted(blocks)):
        stems += [f"{part}.{number}.{layer}" for layer in HF_IN_BLOCK]
    for name in [stem + end for stem in stems for end in ("", ".weight", ".bias")]:
        names = hf_names(name)
        if all(n in theirs for n in names):
            parts = [theirs.pop(n) for n in names]
            ours[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ours | theirs


def strip_prefix(weights, path):
    """Weights all of whose encoder lies under one prefix, as wrappers give it -> (weights without
    it, the prefix). ValueError if there are several encoders.
    """
    found = [re.fullmatch(r"(|.*?\.)((vit\.)?embeddings\.)?cls_token", name) for name in weights]
    prefixes = sorted({match[1] for match in found if match})
    if len(prefixes) > 1 and "" not in prefixes:
        raise ValueError(
            f"{path} holds {len(prefixes)} encoders, under {few(prefixes)}: save the one to take"
        )
    if "" in prefixes or not prefixes:
        return weights, ""
    [prefix] = prefixes
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, prefix


def from_others(weights, path="the file"):
    """Weights of a ViT-MAE or its encoder, as the published MAE, timm or Hugging Face name them.

    -> ({our name: tensor}, [remarks to print]). A prefix of all names ("module.") goes. A
    classifier's head is left out, and so is `fc_norm`, which fine-tuned MAEs have in place of the
    encoder's norm: it comes after averaging, and the encoder's starts anew. Any other name that is
    not ours is kept, for strict loading to judge.
    """
    weights, prefix = strip_prefix(before := weights, path)
    notes = [f"names begin with {prefix}"] if prefix else []
    left_out = [k for k in before if not k.startswith(prefix)]
    if any(k.startswith(("vit.", "embeddings.")) for k in weights):
        weights = from_hf(weights)
    left_out += [k for k in weights if k.startswith("head.")]
    if "fc_norm.weight" in weights and "norm.weight" not in weights:
        left_out += [k for k in weights if k.startswith("fc_norm.")]
        scale = weights["fc_norm.weight"]
        new = {"norm.weight": torch.ones_like(scale), "norm.bias": torch.zeros_like(scale)}
        weights = weights | new
        notes.append("the encoder up to its last block; its norm is new, since fc_norm is not its")
    if left_out:
        notes.append(f"left out {few(left_out)}")
    return {k: v for k, v in weights.items() if k not in left_out}, notes


# ---- Weights: OpenAI's pickled dVAE ---------------------------------------------------


class InertObject:
    """Stands for any class that a pickled network names: keeps its state, and does nothing."""

    dump_patches = False  # torch asks a module's class, in files of its oldest format

    def __init__(self, *args, **kwargs):
        self.state = {}

    def __setstate__(self, state):
        self.state = state


class TensorsOnly(pickle.Unpickler):
    """Unpickler for a pickled network whose code must not run: tensors are real, all else inert."""

    TENSORS = {
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.nn.parameter", "Parameter"),
        ("collections", "OrderedDict"),
    }
    INERT = ("dall_e.", "torch.nn.", "torch.device", "builtins.set", "__builtin__.set")

    def find_class(self, module, name):
        full = f"{module}.{name}"
        if (module, name) in self.TENSORS or (module == "torch" and name.endswith("Storage")):
            return super().find_class(module, name)
        if full.startswith(self.INERT):
            return InertObject
        raise pickle.UnpicklingError(f"it asks for {full}")


def load_tensors_only(file, **options):
    """pickle.load with `TensorsOnly`: what torch.load asks of a pickle module."""
    return TensorsOnly(file, **options).load()


def read_dvae(path):
    """OpenAI's encoder.pkl, a whole pickled module -> {name: tensor} for `DVAEEncoder`.

    Needs no package of theirs, and nothing that the file names is executed: see `TensorsOnly`.
    Plain {name: tensor} files are read too. ValueError for anything else, TorchScript above all:
    torch.load would hand it on to torch.jit.load, which runs what it holds.
    """
    if zipfile.is_zipfile(path):
        if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise ValueError("it is TorchScript, a program")
    safe = SimpleNamespace(Unpickler=TensorsOnly, load=load_tensors_only, __name__="TensorsOnly")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files hold their source code: not ours, indeed
            found = torch.load(path, map_location="cpu", weights_only=False, pickle_module=safe)
    except Exception as error:  # anything can be in the file
        reason = (str(error) or "no reason given").splitlines()[0]
        raise ValueError(f"{type(error).__name__}: {reason}") from None
    weights = {}

    def collect(node, prefix):
        state = getattr(node, "state", {})
        for name, value in (state.get("_parameters") or {}).items():
            weights[prefix + name] = value.detach()
        for name, child in (state.get("_modules") or {}).items():
            collect(child, f"{prefix}{name}.")

    if isinstance(found, dict):
        weights = found
    else:
        collect(found, "")
    return {k: v for k, v in weights.items() if not str(k).startswith("blocks.output.")}
