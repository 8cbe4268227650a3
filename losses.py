"""Losses of Perceptual MAE (paper sec. 3.1, eq. 1-7), gradient regularisers (sec. 3.2), metrics.

Self-contained: needs only torch. Images are float (B, 3, H, W) in [0, 1]; masks are
(B, N) with 1 = hidden; feature maps come as lists of (B, C_j, H_j, W_j). Every loss returns a
scalar, in float32 whatever the autocast.

`LOSSES` is the one table from which `train.py --loss` chooses. In order: the pixel terms (MAE's
masked MSE, eq. 1, eq. 2), the perceptual term (eq. 3), the adversarial pair (eq. 4 and 5), the
regularisers; then the metrics of images.
"""

import math

import torch
from torch.nn import functional as F

# Each row is one loss of the paper, Tables 1 to 3; vgg_p, for comparison, is the classic perceptual
# loss (Johnson et al. 2016) in the form of eq. 7:
#   pixel      what compares pixels: masked MSE (MAE's), MS-SSIM + L1 (eq. 2), or L1 (eq. 1)
#   phi        the loss network of eq. 3: None; "disc", the discriminator itself; or a network with
#              published weights, "dvae" (eq. 7) or "vgg"
#   adversary  D of the least-squares pair (eq. 4 and 5): None, "conv", "msg" or "stylegan2"; the
#              last two judge images at every scale
#   weight     of eq. 5 in eq. 6, unless --adversarial-weight is given.
#              DIFFERS: the paper's is 1 in every row; ours is 0.1 with D "msg". There, 1 costs 10
#              points in the linear probe with D's rate at 1e-4, 1.3 at 4e-5 (4.7 in a run of four
#              times the length), and at 1e-5 none, but then D learns nothing. The authors' code:
#              0.7, beside twice the L1 where phi is D.
#   ada        adaptive augmentation of all that D sees (sec. 3.2)
#   path       path-length regularisation of G (sec. 3.2)
#   arch       the autoencoder that the paper pairs with the loss
ROW = dict(pixel="l1", phi=None, adversary=None, weight=1.0, ada=False, path=False, arch="mae")
MSG = ROW | dict(adversary="msg", weight=0.1, arch="msg_mae")
LOSSES = {
    "mse": ROW | dict(pixel="mse"),
    "ms_ssim": ROW | dict(pixel="ms_ssim_l1"),
    "ls_gan": ROW | dict(adversary="conv"),
    "ls_gan_p": ROW | dict(adversary="conv", phi="disc"),
    "msg_gan": MSG,
    "msg_gan_p": MSG | dict(phi="disc"),
    "stylegan2_ada_p": MSG
    | dict(adversary="stylegan2", weight=1.0, phi="disc", ada=True, path=True),
    "dvae_p": ROW | dict(phi="dvae"),
    "vgg_p": ROW | dict(phi="vgg"),
}

# Pixel statistics of ImageNet, as in model.py: each file can be copied alone.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---- Scales --------------------------------------------------------------------------------------


def pyramid(images, scales):
    """Images (B, 3, H, W) -> [(B, 3, H, W), (B, 3, H/2, W/2), ...], finest first, by averaging.

    The targets of a multi-scale G, and what a multi-scale D sees of a real image (sec. 3.2).
    """
    levels = [images]
    while len(levels) < scales:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def per_channel(values, like):
    """Three numbers -> (3, 1, 1) of the type and device of `like`.

    Filled on the device: `like.new_tensor(values)` would copy from the CPU and make it wait.
    """
    return torch.cat([like.new_full((1, 1, 1), value) for value in values])


# ---- Masked MSE: the original MAE ----------------------------------------------------------------


def patchify(images, patch_size):
    """Images (B, 3, H, W) -> patches (B, N, p*p*3), each in (row, column, channel) order."""
    B, _, H, W = images.shape
    p = patch_size
    x = images.view(B, 3, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, 3 * p * p)


def patch_statistics(patches):
    """Mean and standard deviation of each patch's values, (B, N, 1) each, as MAE takes them.

    The variance is the unbiased one, and 1e-6 under the root keeps flat patches finite.
    """
    mean = patches.mean(dim=2, keepdim=True)
    return mean, (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()


def patch_errors(reconstruction, images, patch_size, norm_pix=False):
    """Mean squared error of each patch, (B, N), in ImageNet-normalised units, as published values.

    reconstruction, images: (B, 3, H, W) in [0, 1]. norm_pix: each target patch is normalised by its
    own mean and deviation, and the network predicts the normalised patch.
    """
    reconstruction, images = reconstruction.float(), images.float()
    mean, std = per_channel(IMAGENET_MEAN, images), per_channel(IMAGENET_STD, images)
    prediction = patchify((reconstruction - mean) / std, patch_size)
    target = patchify((images - mean) / std, patch_size)
    if norm_pix:
        patch_mean, patch_std = patch_statistics(target)
        target = (target - patch_mean) / patch_std
    return (prediction - target).square().mean(dim=2)


def masked_mse(reconstruction, images, mask, patch_size, norm_pix=False):
    """MAE's loss: mean squared error over the hidden patches (He et al. 2022).

    PAPER SILENT: whether `mse` has norm_pix, MAE's better variant; off unless --norm-pix-loss.

    mask: (B, N), 1 = hidden; visible patches give no gradient. Others: see `patch_errors`. nan if
    none is hidden. ValueError for a mask of another shape.
    """
    errors = patch_errors(reconstruction, images, patch_size, norm_pix)
    if errors.shape != mask.shape:
        raise ValueError(f"a mask of {list(mask.shape)} for patches of {list(errors.shape)}")
    return (errors * mask).sum() / mask.sum()


# ---- L1 (eq. 1) ----------------------------------------------------------------------------------


def normalised_l1(reconstruction, images):
    """L1 of the full image, visible patches included. PAPER: first term of eq. 1, 6 and 7.

    PAPER SILENT: its unit, and whether its norm is a sum. Ours is the mean over pixels, so that
    weights do not depend on the image size. The images are ImageNet-normalised first, as the MAE
    predicts them. The authors add this term twice where phi is D.
    """
    difference = reconstruction.float() - images.float()  # the mean colour cancels
    return (difference / per_channel(IMAGENET_STD, difference)).abs().mean()


# ---- MS-SSIM + L1 (eq. 2) ------------------------------------------------------------------------


def ssim_map(x, y, window):
    """Structural similarity (Wang et al. 2004) of every window that fits in the image.

    x, y: (B, C, H, W) in [0, 1]. window: (k, k), weights that sum to 1, of x's type and device.
    Returns (B, C, H - k + 1, W - k + 1) in [-1, 1]; 1 = equal. Population variances; constants
    for a data range of 1. Autocast is off: variances are differences of squares, which half
    precision would lose (its error rivals C2).
    """
    C1, C2 = 0.01**2, 0.03**2
    C = x.shape[1]
    kernel = window.expand(C, 1, -1, -1)  # the same window for each channel

    def mean(v):
        return F.conv2d(v, kernel, groups=C)

    with torch.autocast(x.device.type, enabled=False):
        mu_x, mu_y = mean(x), mean(y)
        var_x = mean(x * x) - mu_x * mu_x
        var_y = mean(y * y) - mu_y * mu_y
        cov = mean(x * y) - mu_x * mu_y
    luminance = (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1)
    return luminance * (2 * cov + C2) / (var_x + var_y + C2)


def ms_ssim_l1(reconstruction, images, alpha=0.85, scales=4):
    """Multi-scale SSIM + L1. PAPER: eq. 2 and the text below it, mean over the scales of
    alpha (1 - SSIM) / 2 + (1 - alpha) L1, with 3 x 3 mean windows; alpha .85, 4 scales.

    PAPER SILENT: eq. 2 sums over pixels and divides by scales alone; here pixels, those of visible
    patches included, are averaged, too. Each scale has the whole SSIM (MS-SSIM as published
    multiplies its parts). (1 - alpha) L1 takes the place of eq. 1's L1, at every scale; each scale
    halves the last by averaging; windows stay inside the image; images are in [0, 1] (the authors'
    code sums over the scales, and feeds ImageNet-normalised images to constants made for [0, 1]).
    ValueError if the coarsest scale is smaller than a window.
    """
    smallest = min(images.shape[2:]) >> (scales - 1)
    if smallest < 3:
        raise ValueError(
            f"images of {images.shape[2]} x {images.shape[3]} px have no {scales} scales for "
            f"MS-SSIM; use {3 << (scales - 1)} px or more"
        )
    x, y = reconstruction.float(), images.float()
    window = x.new_full((3, 3), 1 / 9)
    total = 0
    for scale in range(scales):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        dissimilarity = (1 - ssim_map(x, y, window).mean()) / 2
        total = total + alpha * dissimilarity + (1 - alpha) * F.l1_loss(x, y)
    return total / scales


# ---- The pixel term of a row ---------------------------------------------------------------------


def pixel_loss(kind, fakes, reals, mask, *, patch_size, norm_pix=False, alpha=0.85):
    """The pixel term of a LOSSES row, before its weight: scalar, the mean over the scales.

    kind: "mse" (masked), "ms_ssim_l1" (eq. 2) or "l1" (eq. 1). fakes, reals: reconstructions and
    images, [(B, 3, H, W), (B, 3, H/2, W/2), ...] in [0, 1]. mask: (B, N), the patches of
    patch_size pixels that were hidden. norm_pix: see `masked_mse`; alpha: see `ms_ssim_l1`.

    PAPER SILENT: whether the pixel term covers one scale or all of them. Here all, in the
    authors' code the finest alone. (--pixel-scales)
    """
    terms = []
    for level, (fake, real) in enumerate(zip(fakes, reals, strict=True)):
        if kind == "mse":
            # Coarser scales shrink to patches of one pixel, whose deviation is 0: no norm_pix.
            norm_here = norm_pix and level == 0
            terms.append(masked_mse(fake, real, mask, patch_size >> level, norm_here))
        elif kind == "ms_ssim_l1":
            side = min(real.shape[2:])
            fitting = min(4, (side // 3).bit_length())  # scales that hold a 3 px window
            if fitting:
                terms.append(ms_ssim_l1(fake, real, alpha=alpha, scales=fitting))
        elif kind == "l1":
            terms.append(normalised_l1(fake, real))
        else:
            raise ValueError(f"there is no pixel term {kind!r}; there are mse, ms_ssim_l1, l1")
    return sum(terms) / len(terms)


# ---- The perceptual term (eq. 3) -----------------------------------------------------------------


def gram(features):
    """Gram matrix Psi: X X^T / (C H W) of X (C, H W), for each sample.

    PAPER SILENT: its scale. Eq. 3 cites Gatys et al., who do not divide; Johnson et al. 2016 and
    the authors' code do, as here.

    (B, C, H, W) -> (B, C, C), in float32. Autocast is off: it would run the product in fp16, where
    the diagonal overflows, whatever the type of its inputs.
    """
    B, C, H, W = features.shape
    with torch.autocast(features.device.type, enabled=False):
        # X^T, (B, H W, C): of the channels-last maps that D returns a view, not a copy.
        flat = features.float().permute(0, 2, 3, 1).reshape(B, H * W, C)
        return flat.transpose(1, 2) @ flat / (C * H * W)


def feature_loss(features_fake, features_real):
    """First sum of eq. 3: sum over layers of the mean, over batch and elements, of
    |phi^j(G(I_m)) - phi^j(I)|.

    Lists of (B, C_j, H_j, W_j) from the same phi. PAPER SILENT: does eq. 3 train phi, too? Here it
    moves G alone: the real side, its target, is detached.
    """
    pairs = zip(features_fake, features_real, strict=True)
    return sum(F.l1_loss(fake.float(), real.detach().float()) for fake, real in pairs)


def style_loss(features_fake, features_real):
    """Second sum of eq. 3: sum over layers of the mean |Psi(phi^j(G(I_m))) - Psi(phi^j(I))|.

    PAPER SILENT: N_j, "the number of elements in each layer", is here the number of elements of
    what is compared, C_j^2 for a Gram matrix, as in the authors' code. Taking C_j H_j W_j for it
    would multiply layer j's weight by C_j / (H_j W_j): at 224 px by .005 in the first layer, by 10
    in the last.
    """
    pairs = zip(features_fake, features_real, strict=True)
    return sum(F.l1_loss(gram(fake), gram(real.detach())) for fake, real in pairs)


def perceptual_terms(features_fake, features_real, delta_f=0.05, delta_s=40.0):
    """L_feat^G. PAPER: eq. 3, with the weights of sec. 4: delta_f .05, delta_s 40.

    PAPER SILENT: sec. 4 calls delta_s the smaller one, but gives 40. Ours is 40. (--delta-f,
    --delta-s) Its aim is "to focus learning on the perceptual term". Here pixels lead: in
    `msg_gan_p`, `tiny` model, after 24,000 CIFAR-10 images, the two terms are .02 and .1 beside an
    L1 of .35.

    features_fake, features_real: [phi^1, ..., phi^J] of G(I_m) and of I, from the same phi.
    Returns its two weighted sums by name: {"feature": scalar, "style": scalar}.
    """
    return {
        "feature": delta_f * feature_loss(features_fake, features_real),
        "style": delta_s * style_loss(features_fake, features_real),
    }


# ---- Least-squares adversarial pair (eq. 4 and 5) ------------------------------------------------


def lsgan_d_loss(logits_real, logits_fake):
    """Least-squares loss of D, labels real = 1 and fake = 0 (Mao et al. 2017). PAPER: eq. 4.

    Raw logits of any shapes -> scalar >= 0; 0 = perfect D. DIFFERS: eq. 4 as printed halves only
    the real term; both are halved here, as in Mao et al. and in the authors' code, so that D is
    not pushed twice as hard on reconstructions as on images.
    """
    real, fake = logits_real.float(), logits_fake.float()  # fp16 squares overflow
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def lsgan_g_loss(logits_fake):
    """Least-squares loss of G: D should call its reconstructions real. PAPER: eq. 5."""
    return 0.5 * (logits_fake.float() - 1).square().mean()


# ---- Gradient regularisers (sec. 3.2, StyleGANv2-ADA) --------------------------------------------


def r1_penalty(logits_real, reals):
    """R1 (Mescheder et al. 2018): squared gradient of D at real images; the caller weighs it.

    logits_real: (B,), computed from `reals`; reals: [(B, 3, h, w)], one leaf per scale with
    requires_grad, as they were before augmentation. Returns: scalar, the mean over batch and
    scales of ||d logit / d image||^2, ready for backward (create_graph).
    Compute logits in float32 or bf16: in fp16 the second derivative is mostly rounding.
    """
    grads = torch.autograd.grad(logits_real.sum(), reals, create_graph=True)
    # PAPER SILENT: R1 on a pyramid. Mean over scales, as in MSG-GAN's StyleGAN version. Gammas
    # that were tuned on one scale do not carry over.
    return torch.stack([g.float().square().sum(dim=(1, 2, 3)) for g in grads]).mean()


def feature_slopes(features, images, probe):
    """How fast D's features, projected on a random direction, move with each pixel: ds/d image.

    PAPER: sec. 3.2, "... and discriminator feature maps". PAPER SILENT: the projection,
    s = sum_j <phi^j, eps_j> / sqrt(J N_j). Dividing by sqrt(J N_j) gives every map the same weight
    in s, whatever its size. The slopes have no graph.

    features: J maps (B, C_j, h_j, w_j) of D at `images`, N_j = C_j h_j w_j
    images:   [(B, 3, h, w)], leaves that require a gradient
    probe:    J tensors eps_j shaped as `features`, from N(0, I), drawn by the caller
    Returns as many slopes as images, shaped like them; zeros for scales that D does not look at.
    """
    divisors = [math.sqrt(len(features) * f[0].numel()) for f in features]
    s = sum((f.float() * e / n).sum() for f, e, n in zip(features, probe, divisors, strict=True))
    return torch.autograd.grad(s, images, materialize_grads=True)  # samples are independent


def path_lengths(outputs, z, slopes):
    """How far D's features move with the decoder's input, per sample: (B,), with a graph.

    PAPER: sec. 3.2, "perceptual path regularisation between the decoder input and ...". With the
    slopes ds/d image of projected features s (see `feature_slopes`), the chain rule gives
    g = ds/dz, one vector per token. The length a is the root mean square, over tokens, of |g|.
    Averaged over directions, a^2 is (channels of z) x (mean squared entry of the maps' Jacobians).

    outputs: [(B, 3, h, w)], G's images of all scales, with a graph
    z:       (B, tokens, channels), the decoder input that `outputs` were computed from
    slopes:  one per output, shaped like it

    The graph takes the slopes as constant, which is exact where D is linear between the kinks of
    its leaky ReLUs, as ours are. Attention must run its forward under
    sdpa_kernel(SDPBackend.MATH): the fused kernels have no second derivative.
    """
    (g,) = torch.autograd.grad(outputs, z, slopes, create_graph=True)  # samples are independent
    return (g.float().square().sum(dim=2).mean(dim=1) + 1e-8).sqrt()  # sqrt(0) has slope inf


def path_length_penalty(lengths, mean):
    """Penalty mean((a / mean - 1)^2) on lengths a (B,) away from their running mean (detached).

    PAPER SILENT: its scale. Relative to the mean, a number without a unit, because the size of a
    depends on the number of tokens and on D's features; StyleGAN2 penalises (a - mean)^2.
    """
    return (lengths / mean - 1).square().mean()


# ---- Image metrics -------------------------------------------------------------------------------


def psnr(x, y, weight=None):
    """Peak signal-to-noise ratio in dB for a data range of 1, per image: (B, C, H, W) -> (B,).

    weight: (B, 1, H, W), which pixels count (1) or not (0); None = all.
    """
    error = (x.float() - y.float()).square()
    if weight is None:
        mse = error.flatten(1).mean(dim=1)
    else:
        mse = (error * weight).flatten(1).sum(dim=1) / (weight.flatten(1).sum(dim=1) * x.shape[1])
    return -10 * mse.clamp(min=1e-10).log10()  # equal images: 100 dB


def ssim(x, y, weight=None):
    """SSIM per image, (B, C, H, W) in [0, 1] -> (B,): 11 x 11 Gaussian window, sigma 1.5.

    As Wang et al. 2004 and scikit-image (gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1) compute it, over windows inside the image; in
    float64, since variances of flat windows are differences of nearly equal numbers.
    weight: (B, 1, H, W), which window centres count; None = all.
    """
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    gaussian = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(gaussian, gaussian)
    values = ssim_map(x.double(), y.double(), window / window.sum()).mean(dim=1, keepdim=True)
    if weight is None:
        return values.flatten(1).mean(dim=1)
    weight = weight[:, :, 5:-5, 5:-5]
    return (values * weight).flatten(1).sum(dim=1) / weight.flatten(1).sum(dim=1).clamp(min=1)


KINDS = ("pasted", "full")  # reconstructions: with the true visible patches; as predicted
METRICS = ("psnr", "ssim", "psnr_mean_fill")  # of the hidden part; then of the whole image
METRICS += tuple(f"{name}_{kind}" for kind in KINDS for name in ("l1", "psnr", "ssim"))


def image_quality(fake, real, hidden):
    """Pixel metrics of reconstructions -> ({name: sum over the batch}, {"pasted", "full": images}).

    fake, real: (B, 3, H, W). hidden: (B, 1, H, W), 1 = hidden. l1_... (pixels in [0, 1]), psnr_...
    (dB) and ssim_... are of the whole image: "full" as predicted, "pasted" with the true visible
    patches. psnr is of the hidden pixels; ssim, of the windows of the pasted image that are centred
    on them; psnr_mean_fill, of hidden pixels painted in the mean visible colour. Reconstructions
    have 8 bits, as when written to a file. PAPER SILENT: which of these Table 1 gives; the unit of
    its L1, and of its PSNR (.38 to .58 are no dB); whether its SSIM has several scales, as in the
    work that it cites. Ours has one, see `ssim`.
    """
    fake = (fake.clamp(0, 1) * 255).round() / 255
    fakes = {"pasted": torch.where(hidden > 0, fake, real), "full": fake}
    visible_mean = (real * (1 - hidden)).sum((2, 3)) / (1 - hidden).sum((2, 3))
    fill = visible_mean[:, :, None, None].expand_as(real)
    values = {
        "psnr": psnr(fake, real, hidden),
        "ssim": ssim(fakes["pasted"], real, hidden),
        "psnr_mean_fill": psnr(fill, real, hidden),
    }
    for kind, images in fakes.items():
        values[f"l1_{kind}"] = (images - real).abs().flatten(1).mean(dim=1)
        values[f"psnr_{kind}"] = psnr(images, real)
        values[f"ssim_{kind}"] = ssim(images, real)
    return {name: value.sum() for name, value in values.items()}, fakes
