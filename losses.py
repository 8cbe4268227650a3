"""Losses of Perceptual MAE (paper sec. 3.1, eq. 1-6) and image metrics, as plain functions.

To copy: this file needs torch alone. Images are float (B, 3, H, W) in [0, 1]; masks are (B, N)
with 1 = hidden; feature maps come as lists of (B, C_j, H_j, W_j). Every loss returns a scalar, in
float32 whatever the autocast.

`LOSSES` is the one table from which `train.py --loss` chooses.
"""

import torch
from torch.nn import functional as F

# Each row is one loss of the paper's Tables 1 and 2:
#   pixel      what compares pixels: masked MSE (MAE's), MS-SSIM + L1 (eq. 2), or L1 (eq. 1)
#   features   the loss network phi of eq. 3: None, or "disc", the discriminator itself
#   adversary  the adversarial pair: None, or "ls", least squares (eq. 4 and 5)
LOSSES = {
    "mse": dict(pixel="mse", features=None, adversary=None),
    "ms_ssim": dict(pixel="ms_ssim_l1", features=None, adversary=None),
    "ls_gan": dict(pixel="l1", features=None, adversary="ls"),
    "ls_gan_p": dict(pixel="l1", features="disc", adversary="ls"),
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def masked_mse(reconstruction, images, mask, patch_size, norm_pix=False):
    """MAE's loss: mean squared error over the hidden patches (He et al. 2022).

    reconstruction, images: (B, 3, H, W) in [0, 1]; both are ImageNet-normalised here, so that
    values compare with published ones. norm_pix: each target patch is normalised by its own mean
    and deviation, and the reconstruction is what should match that.
    """
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    prediction = patchify((reconstruction.float() - mean) / std, patch_size)
    target = patchify((images.float() - mean) / std, patch_size)
    if norm_pix:
        patch_mean, patch_std = patch_statistics(target)
        target = (target - patch_mean) / patch_std
    per_patch = (prediction - target).square().mean(dim=2)  # (B, N)
    return (per_patch * mask).sum() / mask.sum()


# ---- MS-SSIM + L1 (eq. 2) ------------------------------------------------------------------------


def ssim_map(x, y, window):
    """Structural similarity (Wang et al. 2004) of every window that fits in the image.

    x, y: (B, C, H, W) in [0, 1]. window: (k, k), weights that sum to 1. Returns
    (B, C, H - k + 1, W - k + 1) in [-1, 1]; 1 = equal. Population variances; constants for a
    data range of 1.
    """
    C1, C2 = 0.01**2, 0.03**2
    C = x.shape[1]
    kernel = window.to(x).expand(C, 1, -1, -1)

    def mean(v):
        return F.conv2d(v, kernel, groups=C)

    mu_x, mu_y = mean(x), mean(y)
    var_x = mean(x * x) - mu_x * mu_x
    var_y = mean(y * y) - mu_y * mu_y
    cov = mean(x * y) - mu_x * mu_y
    luminance = (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1)
    return luminance * (2 * cov + C2) / (var_x + var_y + C2)


def ms_ssim_l1(reconstruction, images, alpha=0.85, scales=4):
    """Multi-scale SSIM + L1. PAPER: eq. 2, mean over the scales of alpha (1 - SSIM) / 2 + (1 -
    alpha) L1, with 3 x 3 mean windows; alpha .85, 4 scales.

    PAPER SILENT: each scale halves the last by averaging; windows stay inside the image; L1 is
    taken at every scale, like SSIM; images are in [0, 1] (the authors' code sums over the scales,
    and feeds ImageNet-normalised images to constants made for [0, 1]).
    ValueError if the coarsest scale is smaller than a window.
    """
    smallest = min(images.shape[2:]) >> (scales - 1)
    if smallest < 3:
        raise ValueError(
            f"{images.shape[2]} px images have no {scales} scales for MS-SSIM; "
            f"use {3 << (scales - 1)} px or more"
        )
    # Variances are differences of squares: half precision would lose them (its error rivals C2).
    with torch.autocast(images.device.type, enabled=False):
        x, y = reconstruction.float(), images.float()
        window = torch.full((3, 3), 1 / 9)
        total = 0
        for scale in range(scales):
            if scale:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
            dissimilarity = (1 - ssim_map(x, y, window).mean()) / 2
            total = total + alpha * dissimilarity + (1 - alpha) * F.l1_loss(x, y)
        return total / scales


# ---- Feature and style terms (eq. 3) -------------------------------------------------------------


def gram(features):
    """Gram matrix Psi (Johnson et al. 2016): (B, C, H, W) -> F F^T / (C H W), (B, C, C).

    float32 with autocast off: in fp16 the products overflow on the diagonal, also under autocast
    with float32 inputs.
    """
    B, C, H, W = features.shape
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view: channels last
        return flat.transpose(1, 2) @ flat / (C * H * W)


def feature_loss(features_fake, features_real):
    """First sum of eq. 3: sum over layers of the mean |phi^j(G(I_m)) - phi^j(I)|.

    Lists of (B, C_j, H_j, W_j) from the same phi. The real side is detached: it is the target.
    """
    pairs = zip(features_fake, features_real, strict=True)
    return sum(F.l1_loss(fake.float(), real.detach().float()) for fake, real in pairs)


def style_loss(features_fake, features_real):
    """Second sum of eq. 3: sum over layers of the mean |Psi(phi^j(G(I_m))) - Psi(phi^j(I))|.

    PAPER SILENT: N_j, "the number of elements in each layer", is here the number of elements of
    what is compared, C_j^2 for a Gram matrix. Taking C_j H_j W_j for it would weigh layer j by
    C_j / (H_j W_j) more: at 224 px from .005 in the first layer to 10 in the last.
    """
    pairs = zip(features_fake, features_real, strict=True)
    return sum(F.l1_loss(gram(fake), gram(real.detach())) for fake, real in pairs)


def feature_style_loss(features_fake, features_real, delta_f=0.05, delta_s=40.0):
    """L_feat^G. PAPER: eq. 3, with the weights of sec. 4: delta_f .05, delta_s 40."""
    feature = feature_loss(features_fake, features_real)
    return delta_f * feature + delta_s * style_loss(features_fake, features_real)


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
    use_sample_covariance=False, data_range=1) compute it, over windows inside the image.
    weight: (B, 1, H, W), which window centres count; None = all.
    """
    offsets = torch.arange(-5, 6, dtype=torch.float32)
    gaussian = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(gaussian, gaussian)
    values = ssim_map(x.float(), y.float(), window / window.sum()).mean(dim=1, keepdim=True)
    if weight is None:
        return values.flatten(1).mean(dim=1)
    weight = weight[:, :, 5:-5, 5:-5]
    return (values * weight).flatten(1).sum(dim=1) / weight.flatten(1).sum(dim=1).clamp(min=1)
