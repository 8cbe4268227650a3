"""Networks of Perceptual MAE: ViT encoder, masked autoencoder, discriminator.

Implements the MAE of He et al. 2022 as the Perceptual MAE paper configures it (sec. 4 and the
supplement's Table 1), and the discriminator D of sec. 3.1, which is also its loss network phi.

To copy: this file needs torch alone. Every network takes images as float (B, 3, H, W) in [0, 1]
and normalises them on its own first line; reconstructions come back in the same units. Parameter
names are those of the published MAE, so its checkpoints load strictly into `MAE`, and the encoder
loads into timm's ViT.

    mae = build_mae("base")                                # 224 px, 16 px patches
    reconstructions, mask = mae(images, mask_ratio=0.75)   # [(B, 3, 224, 224)], (B, 196)
"""

import torch
from torch import nn
from torch.nn import functional as F

# Pixel statistics of ImageNet (RGB, for images in [0, 1]): the unit in which MAE sees and predicts.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# PAPER: supplement, Table 1 (base, large). PAPER SILENT: `small` is ViT-S with the same decoder;
# `tiny` is for CPUs and tests.
MAE_SIZES = {
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
    "tiny": (16, 128),
    "small": (32, 256),
    "base": (64, 512),
    "large": (64, 512),
}


# ---- Pixels and patches --------------------------------------------------------------------------


def imagenet_normalize(images):
    """Images (B, 3, H, W) in [0, 1] -> zero mean, unit variance per channel over ImageNet."""
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def imagenet_denormalize(images):
    """Inverse of `imagenet_normalize`: back to [0, 1] units, not clamped."""
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return images * std + mean


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


def random_masking(noise, mask_ratio):
    """Hide a random subset of each sample's patches: those with the largest noise.

    noise: (B, N), any distribution without ties. Returns ids_keep (B, K), the visible patches;
    ids_restore (B, N), which undoes the shuffle "visible first, then hidden"; and mask (B, N),
    1 = hidden, 0 = visible. K = int(N * (1 - mask_ratio)), as in the published MAE.
    """
    B, N = noise.shape
    K = int(N * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= K).float()  # a patch is hidden if its rank is K or more
    return ids_shuffle[:, :K], ids_restore, mask


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

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, C / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    """Two linear layers around an exact GELU; hidden width 4 C. (B, N, C) -> same."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = linear(width, 4 * width)
        self.fc2 = linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. (B, N, C) -> same."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


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
        x = images.view(B, 3, H // p, p, W // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 3 * p * p)  # (B, N, 3pp), the weight's order
        if ids_keep is not None:
            x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))  # (B, K, 3pp)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision transformer encoder: fixed positions, CLS token, final norm; no head."""

    def __init__(self, *, image_size, patch_size, width, depth, heads):
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
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(self, images, ids_keep=None):
        """Images (B, 3, H, W) in [0, 1] -> tokens (B, 1 + K, C), CLS first, after the final norm.

        ids_keep: (B, K), the patches to look at; None = all N.
        """
        images = imagenet_normalize(images)
        x = self.patch_embed(images, ids_keep)  # (B, K, C)
        positions = self.pos_embed[:, 1:]  # CLS's is zero
        x = x + (positions if ids_keep is None else positions[0][ids_keep])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + K, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images):
        return self.encode(images)


# ---- Masked autoencoder: the generator G ---------------------------------------------------------


class MAE(ViT):
    """Masked autoencoder: encodes the visible patches, reconstructs the whole image.

    PAPER: "G is the MAE model" of eq. 1; architecture of He et al. 2022, sec. 4 and supplement.
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
    ):
        super().__init__(
            image_size=image_size, patch_size=patch_size, width=width, depth=depth, heads=heads
        )
        self.decoder_embed = linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.register_buffer("decoder_pos_embed", sincos_positions(decoder_width, self.side))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = linear(decoder_width, 3 * patch_size**2)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, mask_ratio=0.75, noise=None):
        """Hide patches, reconstruct the image.

        images: (B, 3, H, W) in [0, 1]. noise: (B, N) fixes the mask (see `random_masking`);
        None draws it. Returns ([reconstruction (B, 3, H, W)], mask (B, N) with 1 = hidden). The
        list holds one image a scale, finest first; MAE has one scale. Values are in [0, 1] units,
        float32, unclamped.
        """
        if noise is None:
            noise = torch.rand(len(images), self.side**2, device=images.device)
        ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
        latent = self.encode(images, ids_keep)  # (B, 1 + K, C)
        return self.decode(latent, ids_restore), mask

    def decode(self, latent, ids_restore):
        """Encoder output (B, 1 + K, C) -> the list of reconstructions that `forward` returns."""
        x = self.unshuffle(self.decoder_embed(latent), ids_restore)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_pred(self.decoder_norm(x)[:, 1:])  # (B, N, 3pp), CLS dropped
        # float32 from here on: losses compare pixels, and half precision cannot resolve them.
        return [imagenet_denormalize(unpatchify(x.float(), self.patch_size))]

    def unshuffle(self, x, ids_restore):
        """Visible tokens (B, 1 + K, d) -> all (B, 1 + N, d), mask tokens at the hidden places."""
        B, _, d = x.shape
        hidden = self.mask_token.expand(B, 1 + ids_restore.shape[1] - x.shape[1], -1).to(x.dtype)
        tokens = torch.cat([x[:, 1:], hidden], dim=1)  # (B, N, d), visible first
        tokens = tokens.gather(1, ids_restore[:, :, None].expand(-1, -1, d))  # in image order
        return torch.cat([x[:, :1], tokens], dim=1)


def build_mae(size, image_size=224, patch_size=16):
    """An `MAE` of a size in MAE_SIZES. ValueError if the patch size does not fit the image."""
    return MAE(image_size=image_size, patch_size=patch_size, **MAE_SIZES[size])


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
        return self.head(x.flatten(1)).squeeze(1), features


def build_discriminator(image_size, channels, max_channels):
    """The discriminator of the LS-GAN rows, for images of 8 pixels or more."""
    return ConvDiscriminator(image_size, channels, max_channels)
