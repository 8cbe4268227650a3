"""Networks of Perceptual MAE: ViT encoder, MAE and MSG-MAE, discriminators, ADA, fine-tuning.

Implements the MAE of He et al. 2022 as the Perceptual MAE paper configures it (sec. 4 and the
supplement's Table 1), its skip connections (sec. 3.3), the discriminators D of sec. 3.1 and 3.2,
each of which is also the loss network phi, adaptive discriminator augmentation (sec. 3.2), and
what fine-tuning puts on the encoder: classifier (sec. 4), detector, segmenter (supplement A.2).
Between pre-training and fine-tuning stand siblings: MAE with one thing changed, from other papers.
At the end: phi of eq. 7 (dVAE, VGG), Inception for FID, and weights in and out.

Self-contained: needs only torch (the detector, VGG and Inception also torchvision, .safetensors
files safetensors). Every network takes images as float (B, 3, H, W) in [0, 1] and normalises them
on its own first line; reconstructions come back in the same units. Parameter names are those of the
published MAE, so its checkpoints load strictly into `MAE`, and the encoder loads into timm's ViT.

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
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

# Pixel statistics of ImageNet (RGB, for images in [0, 1]): the unit in which MAE sees and predicts.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# PAPER: supplement, Table 1 (base, large). PAPER SILENT: `small` is ViT-S with the same decoder;
# `tiny` and `nano` are for CPUs and tests.
MAE_SIZES = {
    "nano": dict(width=128, depth=4, heads=4, decoder_width=64, decoder_depth=3, decoder_heads=4),
    "tiny": dict(width=192, depth=6, heads=3, decoder_width=128, decoder_depth=4, decoder_heads=4),
    "small": dict(
        width=384, depth=12, heads=6, decoder_width=512, decoder_depth=8, decoder_heads=16
    ),
    "base": dict(
        width=768, depth=12, heads=12, decoder_width=512, decoder_depth=8, decoder_heads=16
    ),
    "large": dict(
        width=1024, depth=24, heads=16, decoder_width=512, decoder_depth=8, decoder_heads=16
    ),
}
# PAPER SILENT: D's channels at the finest scale and their cap. 64/512 is StyleGAN2's width at
# this resolution; smaller models get a D they can keep up with. (--d-channels, --d-max)
DISCRIMINATOR_WIDTHS = {
    "nano": (16, 64),
    "tiny": (16, 128),
    "small": (32, 256),
    "base": (64, 512),
    "large": (64, 512),
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
    1 = hidden, 0 = visible. K = int(N * (1 - mask_ratio)), as in the published MAE.
    PAPER: sec. 4, "we mask 75% of input patches".
    """
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

    def weights(self, x):
        """Softmax weights (B, heads, N, N), each row adding up to 1; `forward` never forms them."""
        q, k, _ = self.split(x)
        return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(dim=3)


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
        if patch_size < 1 or patch_size & (patch_size - 1):
            raise ValueError(f"patch size {patch_size} is not a power of two")
        if image_size % patch_size:
            raise ValueError(
                f"image size {image_size} is not divisible by patch size {patch_size}; "
                f"use {image_size // patch_size * patch_size or patch_size}"
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
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + K, C)
        kept = {0: x}
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in levels:  # keeping all would cost memory where no gradient needs them
                kept[number] = x
        return self.norm(x), [kept[number] for number in levels]

    def forward(self, images):
        """Images (B, 3, H, W) in [0, 1] -> tokens (B, 1 + N, C), CLS first."""
        return self.encode(images)[0]

    def cls_attention(self, images):
        """Where CLS looks in the last block (paper, Figure 3): (B, heads, side, side).

        images: (B, 3, H, W) in [0, 1], nothing hidden. A map's values, with the weight that CLS
        keeps for itself, add up to 1.
        """
        last = self.blocks[-1]
        _, [x] = self.encode(images, levels=[len(self.blocks) - 1])  # what the last block takes
        return last.attn.weights(last.norm1(x))[:, :, 0, 1:].unflatten(2, (self.side, self.side))


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
        most = patch_size.bit_length()  # 16 px patches: 16, 8, 4, 2, 1
        if not 1 <= scales <= most:
            raise ValueError(f"{scales} scales, but {patch_size} px patches halve to {most} only")
        # ... and the decoder: narrower and shallower, since it is thrown away.
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
        units, float32, unclamped.
        """
        if mask_noise is None:
            mask_noise = torch.rand(len(images), self.side**2, device=images.device)
        ids_keep, ids_restore, mask = random_masking(mask_noise, mask_ratio)
        inputs = self.decoder_inputs(images, ids_keep, ids_restore)  # the encoder sees K patches
        return self.decode(inputs), mask

    def reconstruct(self, images, mask_ratio, mask_noise):
        """What is shown and measured: MAE's `forward`, even where a sibling has its own."""
        return MAE.forward(self, images, mask_ratio, mask_noise)

    def decoder_inputs(self, images, ids_keep, ids_restore):
        """Encode the patches ids_keep (B, K) -> [the decoder's input, then skips if there are any],
        (B, 1 + N, d) each.
        """
        tokens, _ = self.encode(images, ids_keep)  # (B, 1 + K, C)
        return [self.to_decoder(tokens, ids_restore)]

    def to_decoder(self, x, ids_restore):
        """Encoder tokens (B, 1 + K, C) -> the decoder's (B, 1 + N, d), mask tokens where hidden.

        PAPER: sec. 3.3, "mask tokens are added to the encoder feature maps of dimension d along
        with positional embeddings".
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

    Multi-scale losses reach every decoder block; without skips they reach the encoder, the part
    that is kept, through the decoder's input alone. Decoder block k > 1 takes its predecessor's
    map concatenated with an encoder level, brought back from 2d to d by one linear layer. The
    encoder is MAE's, under the same names.
    """

    def __init__(self, *, depth, decoder_width, decoder_depth, **sizes):
        super().__init__(
            depth=depth, decoder_width=decoder_width, decoder_depth=decoder_depth, **sizes
        )
        # PAPER SILENT: which levels, where encoder and decoder differ in depth. Evenly spaced,
        # deep to shallow, from the last but one to the first (the last is the decoder's input).
        # ViT-B's blocks 2 to 8 take levels 11, 9, 8, 6, 4, 3, 1.
        # The authors' code: levels 11 to 5; the first four get no skip.
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
        # PAPER SILENT: intermediate levels have no norm of their own; without one their size grows
        # with depth, and `decoder_embed` is shared with the normalised last level.
        skips = [F.layer_norm(x, x.shape[-1:]) for x in skips]
        return [self.to_decoder(x, ids_restore) for x in [tokens, *skips]]

    def fuse(self, x, inputs, number):
        """What decoder block `number` takes. PAPER: "concatenated", "of length 2d"."""
        if number == 1:  # it takes the decoder's input as it is
            return x
        both = torch.cat([x, inputs[number - 1]], dim=2)  # (B, 1 + N, 2d)
        return self.decoder_fuse[number - 2](both)  # (B, 1 + N, d)


def build_mae(size, image_size=224, patch_size=16, arch="mae", scales=1):
    """An autoencoder of a size in MAE_SIZES: arch "mae" or "msg_mae", with `scales` outputs.

    ValueError if the patch size does not fit the image, or the scales the patch.
    """
    network = {"mae": MAE, "msg_mae": MSGMAE}[arch]
    return network(image_size=image_size, patch_size=patch_size, scales=scales, **MAE_SIZES[size])


# ---- Discriminator D, which is also the loss network phi (sec. 3.1) ------------------------------


class ConvDiscriminator(nn.Module):
    """Strided-convolution discriminator for LS-GAN: is this image real or reconstructed?

    PAPER SILENT: the paper gives no architecture. Ours halves the image with 4 x 4 convolutions
    (as DCGAN does) until the side is below 8, doubling the channels each time; a linear layer on
    that last map gives the logit. No BatchNorm, which the authors' code has: statistics of real
    and reconstructed batches differ, so it hides brightness and contrast errors from phi. No
    sigmoid, which their code has too: eq. 4 and 5 compare the output itself with 0 and 1.
    """

    def __init__(self, image_size, channels=64, max_channels=512):
        super().__init__()
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
        """
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


class Mean2x2(nn.Module):
    """F.avg_pool2d(x, 2): (B, C, h, w) -> (B, C, h // 2, w // 2), odd last rows, columns left out.

    Its gradient is what it must be, nearest-neighbour upsampling, to any order; avg_pool2d's own
    backward pass is slow on GPUs in channels_last.
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
    `StyleGAN2Discriminator` alone.
    """

    def __init__(self, image_size, scales, channels, max_channels):
        super().__init__()
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

        PAPER SILENT: which of D's layers are phi. The map at the end of each block, before the
        next image joins it: what D has seen, not what it is shown.
        """
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
    """Last map (B, C, side, side) and its minibatch deviation -> logits (B,), in float32."""

    def __init__(self, width, side, mbstd_group):
        super().__init__()
        self.mbstd_group = mbstd_group
        self.conv = EqualConv2d(width + 1, width, 3, padding=1)
        self.hidden = EqualLinear(width * side**2, width, activate=True)
        self.logit = EqualLinear(width, 1, activate=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = self.conv(append_minibatch_std(x.float(), self.mbstd_group))
            return self.logit(self.hidden(x.flatten(1))).squeeze(1)


class StyleGAN2Discriminator(nn.Module):
    """StyleGAN2's residual discriminator with an image entering at every scale.

    At 224 px and widths 64 to 512 (those of StyleGAN2 at 256 px, whose maps of 256 ... 8 become
    224 ... 7) it has 27.7 M parameters with one scale and 28.6 M with five. Train it with Adam
    at StyleGAN2's rate, 0.0025, betas (0, 0.99): its weights are N(0, 1), not N(0, 1 / fan_in).
    """

    # DIFFERS: under autocast all blocks run in half precision, not only the four largest maps;
    # the epilogue is float32 as published, so only the small blocks lose digits.

    def __init__(self, image_size, scales, channels, max_channels, mbstd_group=4):
        super().__init__()
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

        phi: see `MSGDiscriminator.forward`.
        """
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

    ValueError where the scales or widths do not fit the image size.
    """
    if kind == "conv":
        return ConvDiscriminator(image_size, channels, max_channels)
    network = {"msg": MSGDiscriminator, "stylegan2": StyleGAN2Discriminator}[kind]
    return network(image_size, scales, channels, max_channels)


# ---- Adaptive discriminator augmentation (sec. 3.2; Karras et al. 2020) --------------------------
# Self-contained: to copy it, take this section, LinearMap, `functools`, `math`, torch, nn and F.


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
        # PAPER SILENT: the transforms, target and speed. All as in Karras et al. 2020.
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

    def __call__(self, images, T, C):
        """Images: list of (B, 3, S, S) in [0, 1] -> same shapes, float32, beyond [0, 1] at times.

        Samples whose T (or C) is the identity come back bitwise as they were.
        """

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
        # DIFFERS: p is also kept below 1; Karras et al. do not (no transform changes beyond 1).
        self.p = min(max(self.p + rise * self.images / self.ramp_images, 0.0), 1.0)
        self.sign_sum, self.images, self.steps = 0.0, 0, 0


# ---- Siblings: MAE with one thing changed --------------------------------------------------------
#
# Not of the Perceptual MAE paper. BootMAE and the regression of features: Dong et al. 2022; R-MAE
# and C-MAE: Kong and Zhang 2023. A forward pass takes images (C-MAE: two views of each), mask_ratio
# and mask_noise, as MAE's but without defaults, and returns what the loss compares (train.py,
# "Siblings"). PAPER, PAPER SILENT and DIFFERS mean the sibling's paper here.


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
        """As `MAE.reconstruct`."""
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


SECOND_VIEWS, GRAINS = ("complement", "independent", "whole"), ("token", "mean", "cls")
SIBLINGS = {"feature_mae": FeatureMAE, "boot_mae": BootMAE, "r_mae": RMAE, "c_mae": CMAE}


def build_sibling(arch, size, image_size, patch_size, **options):
    """A network of SIBLINGS, of a size in MAE_SIZES; options: its own (see the classes)."""
    sizes = dict(image_size=image_size, patch_size=patch_size)
    return SIBLINGS[arch](**sizes, **MAE_SIZES[size], **options)


def open_teacher(path, image_size, patch_size):
    """The encoder in a file of ViT-MAE weights, for images of `image_size`; ValueError if none."""
    weights, _ = read_weights(path)
    sizes = published_sizes(weights, path, remedy="take another teacher")
    if sizes["patch_size"] != patch_size:
        raise ValueError(
            f"{path} has patches of {sizes['patch_size']} px, this run has {patch_size}, so its "
            f"features are of other patches; give --patch-size {sizes['patch_size']}"
        )
    teacher = build_encoder(sizes["model"], image_size, patch_size)
    load_whole(teacher, encoder_weights(weights, teacher.side, path), path)
    return teacher


# ---- Classifier: the encoder after pre-training (sec. 4, fine-tuning) ----------------------------


class BatchStandardize(nn.Module):
    """Batch normalisation without weights, for features (B, C) that need no gradient.

    As nn.BatchNorm1d(affine=False), but with the statistics of all processes' batches, so that
    two processes do what one with twice the batch does (nn.SyncBatchNorm does it on GPUs alone).
    """

    def __init__(self, width, momentum=0.1, eps=1e-6):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        x, mean, var = x.float(), self.running_mean, self.running_var
        if self.training:
            double = x.double()
            sums = torch.stack([torch.ones_like(double), double, double.square()]).sum(1)  # (3, C)
            if dist.is_initialized():
                dist.all_reduce(sums)
            count = sums[0]
            mean = sums[1] / count
            var = (sums[2] / count - mean.square()).clamp(min=0)
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_(unbiased.float(), self.momentum)
        return (x - mean.float()) / (var.float() + self.eps).sqrt()


def pooled(tokens, pool):
    """Tokens (B, 1 + N, C) -> (B, C): CLS, "cls", or the "mean" of the patches'."""
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)


class Classifier(nn.Module):
    """ViT encoder with the original ViT's head: one linear layer. Images -> logits (B, classes).

    PAPER: sec. 4, "the original ViT model classification head". PAPER SILENT: whether it sees CLS,
    as the original does, or the mean token; and whether positions are trained: ours stay as they
    are (MAE's fine-tuning trains them).

    pool: "cls", the CLS token, or "mean", the mean patch token, both after the encoder's own final
    norm (MAE's fine-tuning averages first, under a new norm).
    frozen: a linear probe. The encoder then needs no gradient and stays in evaluation mode, and
    the head sees standardised features.
    """

    def __init__(self, encoder, classes, pool="cls", frozen=False):
        super().__init__()
        width = encoder.cls_token.shape[-1]
        self.encoder, self.pool, self.frozen = encoder, pool, frozen
        self.standardize = BatchStandardize(width) if frozen else nn.Identity()
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.encoder.requires_grad_(not frozen)

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
            return self.head(x.float())  # half precision would tie logits that differ by a 16th

    def layers(self):
        """Parameters from input to output: [[embedding], [block 1], ..., [norm, head]]."""
        *below, norm = self.encoder.layers()
        return [*below, norm + list(self.head.parameters())]


def build_encoder(size, image_size, patch_size, drop=0.0):
    """The encoder of a size in MAE_SIZES; ValueError if the patch size does not fit the image."""
    sizes = {k: MAE_SIZES[size][k] for k in ("width", "depth", "heads")}
    return ViT(image_size=image_size, patch_size=patch_size, drop=drop, **sizes)


def build_classifier(size, classes, *, image_size, patch_size, pool, frozen, drop=0.0):
    """A classifier of a size in MAE_SIZES; ValueError if the patch size does not fit the image."""
    return Classifier(build_encoder(size, image_size, patch_size, drop), classes, pool, frozen)


# ---- Dense tasks: levels of a ViT as maps of four sizes (supplement A.2) -------------------------


def group_norm(channels):
    """GroupNorm of at most 32 groups, of 8 channels or more; `channels` is a multiple of 8.

    PAPER SILENT: the norm of heads and pyramids. This one has no running statistics, so that it
    does the same in training and use, for any batch and on any number of processes; it also takes
    a 1 x 1 map of a single image, as UperNet's coarsest pooling may give it (BatchNorm does not).
    """
    return nn.GroupNorm(math.gcd(32, channels // 8), channels)


class FeaturePyramid(nn.Module):
    """A ViT's levels as maps of 1/4, 1/2, 1 and 2 patches a cell: strides 4 to 32 at 16 px patches.

    PAPER: supplement A.2. A ViT has one scale; levels [0, 4, 8, 12] of its 12 blocks are resampled
    to the four of a convolutional network, "bilinear interpolation is used with a scale factor of
    two (if required) followed by a 3x3 convolution"; down, "a 3x3 convolution" (here of stride 2).
    Sec. 4 speaks of "intermediate feature maps of MSG-MAE": of its encoder, as for any other row.
    PAPER SILENT: which level gives which map (early ones the fine maps); one convolution per
    factor of two; its width, `width` from the first on, since the ViT's own would cost more than
    the encoder (for ViT-B at 224 px 25 against 17 billion multiplications; at 256 channels 5); a
    norm per level. The last level's norm is the encoder's own, pre-trained.
    """

    def __init__(self, encoder, width):
        super().__init__()
        C, p, side = encoder.cls_token.shape[-1], encoder.patch_size, encoder.side
        if p < 4 or side % 2:
            raise ValueError(
                f"{p * side} px images of {p} px patches give no maps of 1/4 to 2 patches a cell; "
                f"use patches of 4 px or more, and images of a multiple of {2 * p} px"
            )
        self.encoder, self.image_size = encoder, p * side
        self.levels = [round(i * len(encoder.blocks) / 3) for i in range(3)]  # and the last
        self.norms = nn.ModuleList(nn.LayerNorm(C, eps=1e-6) for _ in self.levels)
        fine = nn.Sequential(*self.up(C, width), *self.up(width, width))
        coarse = nn.Conv2d(C, width, 3, stride=2, padding=1)
        self.resample = nn.ModuleList(
            [fine, nn.Sequential(*self.up(C, width)), nn.Identity(), coarse]
        )
        self.channels = [width, width, C, width]  # of the four maps

    @staticmethod
    def up(c_in, c_out):
        """Layers (B, c_in, h, w) -> (B, c_out, 2 h, 2 w)."""
        grow = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        return grow, nn.Conv2d(c_in, c_out, 3, padding=1)

    def maps(self, images):
        """Images (B, 3, S, S) in [0, 1] -> four maps (B, C_j, s, s), s = S / (p/4, p/2, p, 2 p)."""
        S, side = self.image_size, self.encoder.side
        if images.shape[2:] != (S, S):  # 16 patches can also be 2 x 8
            raise ValueError(f"images of {list(images.shape[2:])} for a network of {S} px squares")
        last, levels = self.encoder.encode(images, levels=self.levels)  # (B, 1 + N, C) each
        tokens = [norm(x) for norm, x in zip(self.norms, levels, strict=True)] + [last]
        grids = [x[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for x in tokens]
        return [layers(x) for layers, x in zip(self.resample, grids, strict=True)]

    def layers(self):
        """Parameters from input to output: [[embedding], [block 1], ..., [norm, maps, heads]]."""
        *below, norm = self.encoder.layers()
        top = [p for name, p in self.named_parameters() if not name.startswith("encoder.")]
        return [*below, norm + top]


# ---- Detection: Mask R-CNN over the pyramid (supplement A.2, Table 3) ----------------------------

MASK_SIDE = 28  # cells of a predicted mask, which spans its box


def mask_targets(masks, boxes, matched):
    """What the mask head should predict in each box: (R, 28, 28) in [0, 1].

    masks: (N, H, W), the image's objects. boxes: (R, 4), x0 y0 x1 y1 in pixels, (0, 0) = the
    image's corner. matched: (R,), the object in each box. Pixel i has its centre at i + .5
    (aligned=True), as `paste_masks` takes it; torchvision's own targets lie half a pixel off.
    """
    from torchvision.ops import roi_align

    rois = torch.cat([matched[:, None].to(boxes), boxes], dim=1)  # (R, 5)
    return roi_align(masks[:, None].to(boxes), rois, MASK_SIDE, aligned=True)[:, 0]


def paste_masks(masks, boxes, height, width, threshold=0.5):
    """Masks of boxes -> masks of the image, bool (N, height, width).

    masks: (N, 28, 28), probabilities over each box. boxes: (N, 4), x0 y0 x1 y1 in pixels of the
    image of height x width. A pixel belongs to an object if its centre, i + .5, is in the box and
    the probability there, interpolated, is `threshold` or more. One mask at a time, and only inside
    its box: the float values of 100 whole images of 1024 px would take 400 MB.
    """
    pasted = masks.new_zeros((len(masks), height, width), dtype=torch.bool)
    rows, columns = (torch.arange(n, device=masks.device) + 0.5 for n in (height, width))
    limits = boxes.new_tensor([width, height, width, height])
    corners = (boxes - 0.5).ceil().clamp(min=0).minimum(limits).int().tolist()
    for i, (left, top, right, bottom) in enumerate(corners):
        if left >= right or top >= bottom:  # no pixel's centre in the box
            continue
        box, mask = boxes[i], masks[i][None, None].float()  # (1, 1, 28, 28)
        x = (columns[left:right] - box[0]) / (box[2] - box[0]) * 2 - 1  # -1 to 1 across the box
        y = (rows[top:bottom] - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)[None]  # (1, h, w, 2)
        inside = F.grid_sample(mask, grid, padding_mode="border", align_corners=False)
        pasted[i, top:bottom, left:right] = inside[0, 0] >= threshold
    return pasted


class Detector(FeaturePyramid):
    """Mask R-CNN (He et al. 2017) over the pyramid of a ViT: boxes, classes and masks of objects.

    PAPER: supplement A.2, "the original Mask-RCNN head" over an FPN. FPN, RPN and heads are
    torchvision's; the model around them is ours: torchvision's resizes images, and pastes masks
    half a pixel off. RoI pooling infers the scales of its maps from the first batch, which is safe
    only because `maps` refuses all image sizes but one. To copy: needs torchvision too.
    PAPER SILENT: width of the FPN (256, its own), norm (GroupNorm), and the heads' depth: an RPN of
    two convolutions, a box head of four and a linear layer, as detectors with a plain ViT have
    them (Li et al. 2021, ViTDet).
    """

    def __init__(self, encoder, classes, width=256):
        from torchvision.models.detection import MaskRCNN, faster_rcnn, mask_rcnn, rpn
        from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__(encoder, width)
        self.classes, p, S = classes, encoder.patch_size, self.image_size
        self.fpn = FeaturePyramidNetwork(
            self.channels, width, extra_blocks=LastLevelMaxPool(), norm_layer=group_norm
        )
        # PAPER SILENT: anchors and sampling. One size per map, of FPN's 8 cells (32 to 512 px at
        # patches of 16), fewer where the largest would exceed the image; under 4 px they round
        # to nothing. An object of 14 patches is pooled from the map of one patch a cell. Heads
        # learn from 512 regions an image and judge 1000, or fewer where there are few patches.
        strides = [p * 2.0**i for i in range(-2, 3)]
        sizes = [(max(4.0, min(8.0, S / strides[-1]) * stride),) for stride in strides]
        scale = dict(
            featmap_names=["0", "1", "2", "3"],
            sampling_ratio=2,
            canonical_scale=14 * p,
            canonical_level=p.bit_length() - 1,
        )
        samples = min(512, 2 * encoder.side**2)
        layers, outputs = 4 * [width], classes + 1  # 0 = background
        parts = MaskRCNN(
            SimpleNamespace(out_channels=width),  # no backbone: `forward` calls the parts
            rpn_anchor_generator=rpn.AnchorGenerator(tuple(sizes), 5 * ((0.5, 1.0, 2.0),)),
            rpn_head=rpn.RPNHead(width, 3, conv_depth=2),
            box_roi_pool=MultiScaleRoIAlign(output_size=7, **scale),
            box_head=faster_rcnn.FastRCNNConvFCHead(
                (width, 7, 7), layers, [4 * width], norm_layer=group_norm
            ),
            box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, outputs),
            mask_roi_pool=MultiScaleRoIAlign(output_size=MASK_SIDE // 2, **scale),
            mask_head=mask_rcnn.MaskRCNNHeads(width, layers, 1, norm_layer=group_norm),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(width, width, outputs),
            box_batch_size_per_image=samples,
            rpn_post_nms_top_n_test=min(1000, 2 * samples),
        )
        self.rpn, self.roi_heads = parts.rpn, parts.roi_heads

    def forward(self, images, targets=None):
        """Images (B, 3, S, S) in [0, 1] -> five losses by name, or in evaluation mode detections.

        targets: in training, a dict for each image: boxes, float32 (N, 4), x0 y0 x1 y1 in pixels;
        labels, int64 (N,), 1 to `classes`; masks, (N, S, S), 0 or 1. N may be 0.
        Detections: a dict for each image, best first: boxes (N, 4), labels (N,), scores (N,) and
        masks (N, 28, 28), probabilities for `paste_masks`. At most 100 with scores above .05.
        Draws samples from torch's global generator. ValueError if targets are not as above.
        """
        sizes = [tuple(images.shape[2:])] * len(images)
        if self.training:
            self.check(targets)
        maps = self.fpn({str(i): x for i, x in enumerate(self.maps(images))})
        # float32 whatever the autocast: torchvision gives anchors and boxes the type of the maps,
        # and bf16 has steps of 4 px near 1000.
        with torch.autocast(images.device.type, enabled=False):
            maps = {name: x.float() for name, x in maps.items()}
            batch = SimpleNamespace(tensors=images, image_sizes=sizes)  # torchvision's ImageList
            proposals, losses = self.rpn(batch, maps, targets)
            if self.training:
                return losses | self.head_losses(maps, proposals, sizes, targets)
            found, _ = self.roi_heads(maps, proposals, sizes)
        return [image | {"masks": image["masks"].squeeze(1)} for image in found]

    def head_losses(self, maps, proposals, sizes, targets):
        """Losses of box and mask head on a sample of the RPN's proposals -> {name: scalar}.

        torchvision's own steps, written out for the sake of the masks (see `mask_targets`).
        """
        from torchvision.models.detection.roi_heads import fastrcnn_loss

        heads = self.roi_heads
        boxes, matched, labels, deltas = heads.select_training_samples(proposals, targets)
        features = heads.box_head(heads.box_roi_pool(maps, boxes, sizes))
        logits, offsets = heads.box_predictor(features)
        classifier, box_reg = fastrcnn_loss(logits, offsets, labels, deltas)
        # Masks are learnt where a sample hits an object, and for that object's class alone.
        hits = [found > 0 for found in labels]
        boxes = [b[hit] for b, hit in zip(boxes, hits, strict=True)]
        wanted = torch.cat(
            [
                mask_targets(t["masks"], b, m[hit])
                for t, b, m, hit in zip(targets, boxes, matched, hits, strict=True)
            ]
        )  # (R, 28, 28)
        x = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, boxes, sizes)))
        of_class = torch.cat(labels)[torch.cat(hits)]  # (R,)
        x = x[torch.arange(len(x), device=x.device), of_class]  # (R, 28, 28)
        # As a sum: without a hit, this is 0 and still gives every parameter a gradient.
        mask = F.binary_cross_entropy_with_logits(x, wanted, reduction="sum")
        mask = mask / max(1, wanted.numel())
        return {"loss_classifier": classifier, "loss_box_reg": box_reg, "loss_mask": mask}

    def check(self, targets):
        """ValueError for targets that would be taken, silently, for something else."""
        S = self.image_size
        for target in targets:
            boxes, labels, masks = (target[name] for name in ("boxes", "labels", "masks"))
            wrong = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
            wrong |= (labels < 1) | (labels > self.classes)  # 0 would be background
            if wrong.any() or masks.shape != (len(boxes), S, S):
                raise ValueError(
                    f"boxes without area, or labels that are not in 1 to {self.classes}: "
                    f"{boxes[wrong].tolist()}, {labels[wrong].tolist()}; or masks that are not "
                    f"{[len(boxes), S, S]}: {list(masks.shape)}"
                )


# ---- Segmentation: UperNet over the pyramid (supplement A.2, Table 3) ----------------------------


def conv_norm(c_in, c_out, kernel):
    """Convolution, norm, ReLU: (B, c_in, h, w) -> (B, c_out, h, w)."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, group_norm(c_out), nn.ReLU())


def resize(x, side):
    """(B, C, h, w) -> (B, C, side, side), bilinear."""
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


class Segmenter(FeaturePyramid):
    """UperNet (Xiao et al. 2018) over the pyramid of a ViT: a class for every pixel.

    PAPER: supplement A.2. PAPER SILENT: all else; the head is that of mmsegmentation's ViTs, where
    the first maps are fused as an FPN does and the last is pooled to the image's context, with a
    second head on the map of one patch a cell, in training alone. GroupNorm replaces its
    SyncBatchNorm; and the last layers start as torch has them: its N(0, .01), made for a width of
    512, holds narrow heads back: at 64, for 80 steps and more.
    """

    BINS = (1, 2, 3, 6)  # sides to which the last map is pooled

    def __init__(self, encoder, classes, width=512):
        super().__init__(encoder, width)
        *channels, last = self.channels
        self.pooled = nn.ModuleList(conv_norm(last, width, 1) for _ in self.BINS)
        self.context = conv_norm(last + len(self.BINS) * width, width, 3)
        self.laterals = nn.ModuleList(conv_norm(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(conv_norm(width, width, 3) for _ in channels)
        self.fuse = nn.Sequential(conv_norm(4 * width, width, 3), nn.Dropout2d(0.1))
        self.aux = nn.Sequential(conv_norm(channels[-1], width // 2, 3), nn.Dropout2d(0.1))
        self.classify = nn.Conv2d(width, classes, 1)
        self.aux_classify = nn.Conv2d(width // 2, classes, 1)

    def forward(self, images):
        """Images (B, 3, S, S) in [0, 1] -> logits (B, classes, S, S), float32.

        In training: (logits, those of the second head), for `segmentation_loss`. Both are computed
        at 1/4 and 1 patch a cell, and enlarged bilinearly.
        """
        maps, S = self.maps(images), images.shape[-1]
        x = self.fuse(self.decode(maps))
        # float32 whatever the autocast: half precision would tie logits that differ by a 16th
        with torch.autocast(images.device.type, enabled=False):
            logits = resize(self.classify(x.float()), S)
        if not self.training:
            return logits
        x = self.aux(maps[2])
        with torch.autocast(images.device.type, enabled=False):
            return logits, resize(self.aux_classify(x.float()), S)

    def decode(self, maps):
        """The pyramid's four maps -> (B, 4 width, s, s), each as large as the finest."""
        *maps, last = maps
        pooled = [
            resize(layers(F.adaptive_avg_pool2d(last, side)), last.shape[-1])
            for layers, side in zip(self.pooled, self.BINS, strict=True)
        ]
        merged = [self.context(torch.cat([last, *pooled], dim=1))]
        laterals = [layers(x) for layers, x in zip(self.laterals, maps, strict=True)]
        for x in reversed(laterals):  # what is coarser is added to what is finer
            merged.insert(0, x + resize(merged[0], x.shape[-1]))
        fine = [layers(x) for layers, x in zip(self.smooth, merged[:-1], strict=True)]
        side = fine[0].shape[-1]
        return torch.cat([resize(x, side) for x in [*fine, merged[-1]]], dim=1)


def build_detector(size, classes, *, image_size, patch_size, drop=0.0, width=256):
    """A detector on an encoder of a size in MAE_SIZES; ValueError if sizes do not fit each other.

    classes: without the background. drop: see `ViT`. width: channels of the FPN and the heads, a
    multiple of 8.
    """
    return Detector(build_encoder(size, image_size, patch_size, drop), classes, width)


def build_segmenter(size, classes, *, image_size, patch_size, drop=0.0, width=512):
    """A segmenter on an encoder of a size in MAE_SIZES; ValueError if sizes do not fit each other.

    drop: see `ViT`. width: channels of the head, a multiple of 16.
    """
    return Segmenter(build_encoder(size, image_size, patch_size, drop), classes, width)


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

        (B, 256, H/2, W/2), (B, 512, H/4, W/4), (B, 1024, H/8, W/8), (B, 2048, H/8, W/8).
        PAPER SILENT: which layers of the dVAE are phi^1..phi^J.
        """
        # 0.8 x + 0.1: what OpenAI trained it on, away from black and white.
        x, features = self.blocks["input"](0.8 * images + 0.1), []
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
        from torchvision.models import vgg16

        self.features = vgg16(weights=None, init_weights=False).features[:23].requires_grad_(False)

    def forward(self, images):
        """Images (B, 3, H, W) in [0, 1] -> 64, 128, 256, 512 channels at H, H/2, H/4, H/8."""
        x, features = imagenet_normalize(images), []
        for number, layer in enumerate(self.features):
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)  # torchvision's is in place
            if number in (3, 8, 15, 22):
                features.append(x)
        return features


# ---- Inception: features for FID, classes for the Inception Score (Table 1) ----------------------


class InceptionFeatures(nn.Module):
    """torchvision's Inception v3 as FID and IS use it. To copy: needs torchvision too.

    weights: {name: tensor}, either those with which published FIDs are computed, converted from
    TensorFlow ("pt_inception-2015-12-05-6726825d.pth", 1008 classes), or torchvision's own (1000
    classes); ValueError, naming what does not fit, for anything else. `published` says which.
    The published network pools differently from torchvision's in nine blocks: averages leave the
    padding out, and the last block takes a maximum.
    """

    def __init__(self, weights):
        super().__init__()
        from torchvision.models import inception_v3

        shape = tuple(getattr(weights.get("fc.bias"), "shape", ()))
        if shape not in ((1000,), (1008,)):
            raise ValueError(f"fc.bias has shape {shape}, not (1008,) (published) or (1000,)")
        classes = shape[0]
        weights = {k: v for k, v in weights.items() if not str(k).startswith("AuxLogits")}
        network = inception_v3(num_classes=classes, aux_logits=False, init_weights=False)
        # Older files do not count batches; the count is of no use in evaluation.
        counters = {k: v for k, v in network.state_dict().items() if "num_batches_tracked" in k}
        weights = counters | weights
        if faults := misfits(network, weights, most=3):
            raise ValueError(faults)
        network.load_state_dict(weights)
        self.published = classes == 1008
        if self.published:
            average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
            for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
                self.pool_instead(getattr(network, f"Mixed_{name}"), average)
            self.pool_instead(network.Mixed_7c, nn.MaxPool2d(3, stride=1, padding=1))
        self.classify, network.fc = network.fc, nn.Identity()
        self.network = network.eval().requires_grad_(False)

    @staticmethod
    def pool_instead(block, pool):
        """Feed a block's `branch_pool` from `pool`, whatever torchvision's own code pools."""

        def remember(block, inputs):
            block.pooled = pool(inputs[0])

        block.register_forward_pre_hook(remember)
        block.branch_pool.register_forward_pre_hook(lambda *_: (block.pooled,))

    def train(self, mode=True):
        return super().train(False)  # a fixed ruler: never in training mode

    def forward(self, images):
        """Images (B, 3, H, W) in [0, 1] -> (features (B, 2048), logits (B, classes))."""
        x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        features = self.network(2 * x - 1)
        return features, self.classify(features)


# ---- Weights in and out: files -------------------------------------------------------------------
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
    """What `load_file` returned -> ({our name: tensor}, [names left out]); see `from_others`."""
    for name in ("mae", "model", "state_dict"):
        content = content[name] if isinstance(content.get(name), dict) else content
    weights = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not weights:
        raise ValueError(f"{path} is not {kind} (it holds no tensors)")
    return from_others(weights)


def write_weights(path, weights, names):
    """Write an autoencoder's weights for another project -> (tensors written, left out).

    names: "mae", as published: with the decoder where it is a plain MAE's; "timm": the encoder;
    "hf": transformers' ViTMAEForPreTraining. path: .safetensors, or else a file of torch.save.
    """
    encoder = {k: v for k, v in weights.items() if not k.startswith(DECODER)}
    plain = not any(k.startswith(OURS_ALONE) for k in weights)
    written = weights if plain and names == "mae" else encoder
    if names == "hf":
        written = to_hf(weights)
    written = {k: v.contiguous() for k, v in written.items()}
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import save

            Path(path).write_bytes(save(written))
        else:
            with open(path, "wb") as file:
                torch.save({"model": written} if names == "mae" else written, file)
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"cannot write {path}: {reason}") from None
    return len(written), 0 if names == "hf" else len(weights) - len(written)


# ---- Weights in and out: loss networks -----------------------------------------------------------

# Where the weights of loss networks are published, and what they are.
PUBLISHED = {
    "dvae": ("https://cdn.openai.com/dall-e/encoder.pkl", "OpenAI's dVAE encoder"),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", "torchvision's VGG-16"),
}


def build_loss_network(kind, path=None, random=False):
    """A frozen phi, "dvae" or "vgg", with its published weights; ValueError if they do not fit.

    path: the published file; None downloads it (vgg alone). random: weights as initialised, for
    tests and timing.
    """
    phi = DVAEEncoder() if kind == "dvae" else VGGFeatures()
    url, what = PUBLISHED[kind]
    if random:
        return phi
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
        if faults := misfits(phi, weights, most=3):
            raise ValueError(faults)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path or kind + '_p'}: not the weights of {what} ({error}); --{kind}-weights takes "
            f"the file {url}"
        ) from None
    phi.load_state_dict(weights)
    return phi


# ---- Weights in and out: into a network ----------------------------------------------------------

# In no other project: MSG-MAE's skips and scales, and what siblings have beside the encoder.
SIBLINGS_OWN = ("teacher.", "regressor.", "predictor.", "projector.")
OURS_ALONE = ("decoder_fuse", "decoder_rgb", *SIBLINGS_OWN)
# How the names of all that is not the encoder begin.
DECODER = ("decoder_", "mask_token", *SIBLINGS_OWN)


def load_whole(network, weights, path):
    """Load weights into a network, all of them or none: ValueError lists what does not fit."""
    if faults := misfits(network, weights):
        raise ValueError(f"{path} does not fit, nothing was loaded; {faults}")
    network.load_state_dict(weights)


def load_autoencoder(mae, weights, path):
    """Give an autoencoder another's encoder, and decoder where there is one -> what was taken.

    weights: {our name: tensor}. All of the encoder must be there, and all of the decoder or
    nothing of it; the skips and scales of MSG-MAE may be missing. Positions are resized. To or from
    a sibling with a teacher: the encoder alone.
    """
    expected = mae.state_dict()
    either_is_sibling = hasattr(mae, "teacher") or any(k.startswith(SIBLINGS_OWN) for k in weights)
    wanted = () if either_is_sibling else DECODER
    decoder = {k: v for k, v in weights.items() if k.startswith(wanted)}
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


def misfits(network, weights, most=None):
    """How weights {name: tensor} do not fit a network: one line, "" if they do.

    most: list no more than so many names of a kind.
    """
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
    listed = []
    for what, names in faults.items():
        if names:
            rest = f" and {len(names) - most} more" if most and len(names) > most else ""
            listed.append(f"{what}: {', '.join(names[:most])}{rest}")
    return "; ".join(listed)


def published_sizes(weights, path, model=None, remedy="--model names the one it should be"):
    """Model, image and patch size of an encoder, from the shapes of its weights -> dict.

    model: what to take it for if its width and depth are none of MAE_SIZES; remedy: else.
    """
    dimensions = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    missing = [k for k, n in dimensions.items() if getattr(weights.get(k), "ndim", None) != n]
    if missing:
        raise ValueError(
            f"{path} is no MAE encoder; missing: {', '.join(missing)}; there is: "
            f"{', '.join(map(str, weights))}"
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


# ---- Weights in and out: the names of other projects ---------------------------------------------

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


def to_hf(weights):
    """Weights of a plain `MAE` -> those of transformers' ViTMAEForPreTraining.

    ValueError for networks that it cannot express: MSG-MAE, or several scales.
    """
    extra = [k for k in weights if k.startswith(OURS_ALONE)]
    if extra:
        raise ValueError(
            f"transformers has no place for {extra[0]} and {len(extra) - 1} more of these weights; "
            "the names of timm and mae take the encoder alone"
        )
    out = {}
    for name, value in weights.items():
        names = hf_names(name)
        out |= dict(zip(names, value.chunk(len(names)), strict=True))
    return out


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


def from_others(weights):
    """Weights of a ViT-MAE or its encoder, as the published MAE, timm or Hugging Face name them.

    -> ({our name: tensor}, [names left out]): a classifier's head is left out; any other name that
    is not ours is kept, for strict loading to judge.
    """
    if any(k.startswith(("vit.", "embeddings.")) for k in weights):
        weights = from_hf(weights)
    left_out = [k for k in weights if k.startswith("head.")]
    return {k: v for k, v in weights.items() if k not in left_out}, left_out


# ---- Weights in and out: OpenAI's pickled dVAE ---------------------------------------------------


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
    Plain {name: tensor} files are read too. ValueError for anything else.
    """
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
