"""Tests: `python test_smoke.py` (or pytest). CPU, offline, minutes; exit status 1 on failure.

Those of the eight files come first, then those of extras/; `python test_smoke.py core` runs the
former alone, `python test_smoke.py WORD ...` those with one of these words in their names.

Each test is one claim. Expected values come from hand calculation or from a slow, independent
computation, never from the code under test. GPUs are hidden, since resuming bit for bit is a CPU's
promise; one test looks for a GPU, in a process of its own, and says so if it finds none.
"""

import argparse
import atexit
import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

import data
import finetune
import losses
import model
import train
from model import AdaAugment, MSGDiscriminator, StyleGAN2Discriminator

VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # as found
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when CUDA is first used, which is later
ROWS = [(loss, "auto") for loss in losses.LOSSES]  # and the ablations
ROWS += [("msg_gan_p", "mae"), ("stylegan2_ada_p", "mae"), ("mse", "msg_mae")]
TINY = ["--model", "tiny", "--image-size", "32", "--patch-size", "8", "--data", "shapes"]
TINY += ["--d-channels", "8", "--d-max", "32"]
FAST = [*TINY, "--model", "nano", "--batch-size", "4", "--val-images", "4", "--workers", "0"]
FAST += ["--lr", "1e-3"]


torch.set_num_threads(1)  # on so small networks a second thread costs more than it brings
os.fsync = lambda file: None  # what tests write need not survive a power cut
# In tests the dVAE has a sixteenth of its width.
WholeDVAE, model.DVAEEncoder = model.DVAEEncoder, functools.partial(model.DVAEEncoder, width=16)


# ---- Helpers -------------------------------------------------------------------------------------


def close(a, b, tolerance):
    """Largest absolute difference is at most `tolerance`."""
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"differs by {difference}, allowed {tolerance}"


@functools.cache
def loss_network_flags():
    """Flags that name stand-in files for the published weights of loss networks."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg = model.VGGFeatures()
        for name, network in (("dvae", model.DVAEEncoder()), ("vgg", vgg)):
            for p in network.parameters():
                torch.nn.init.normal_(p, std=1.4 * (p[0].numel() or 1) ** -0.5 if p.ndim > 1 else 0)
            torch.save(network.state_dict(), f"{folder.name}/{name}.pth")
    return [f"--{n}-weights={folder.name}/{n}.pth" for n in ("dvae", "vgg")]


def tiny_run(*flags):
    """A training run without data: (run, args), small enough for a test."""
    args = train.parse_args([*TINY, "--out", "unused", *loss_network_flags(), *flags])
    return train.build_run(args, torch.device("cpu")), args


def save_autoencoder(path, *flags):
    """Write random weights as a checkpoint of train.py."""
    run, args = tiny_run(*flags)
    content = {"mae": run.mae.state_dict(), "arguments": vars(args), "script": "train.py"}
    torch.save(content, path)


def tiny_batch(B=4, seed=0):
    """(images (B, 3, 32, 32) in [0, 1], noise (B, 16), seeds (B,))."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(B, 3, 32, 32, generator=generator)
    return images, torch.rand(B, 16, generator=generator), torch.arange(B) + 100


def perceptual_loss(features_fake, features_real):
    """Eq. 3 as one number, with the paper's weights."""
    return sum(losses.perceptual_terms(features_fake, features_real).values())


def backward(run, batch, eq3_on, args):
    """`train.backward` of a step's only batch."""
    return train.backward(run, *batch, eq3_on=eq3_on, share=1.0, args=args)


def gradients(network):
    """Every gradient of a network as one vector."""
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])


def command(*flags, script=train):
    """Run a script's main in this process -> (exit status, standard error)."""
    errors = io.StringIO()
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = script.main([str(f) for f in flags]) or 0
        except SystemExit as exit:
            status = exit.code
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)
    return status, errors.getvalue()


def command_output(*flags, script=train):
    """Run a script's main in this process -> standard output; it must succeed."""
    output = io.StringIO()
    with mock.patch.object(train, "say", lambda line, file=None: output.write(f"{line}\n")):
        assert command(*flags, script=script)[0] == 0
    return output.getvalue()


def refused(*flags, names, script=train):
    """The command ends with status 2 and one line on standard error that holds each of `names`."""
    status, errors = command(*flags, script=script)
    assert status == 2, (status, errors)
    assert errors.count("\n") == 1 and "Traceback" not in errors, errors
    assert all(name in errors for name in names), (names, errors)


def raises_value_error(function, *args, says=""):
    """function(*args) raises a ValueError whose message holds `says`."""
    try:
        function(*args)
    except ValueError as error:
        assert says in str(error), error
    else:
        raise AssertionError(f"accepted {args}")


@contextlib.contextmanager
def scratch():
    """A folder that is gone afterwards, as Path."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def tune(*flags):
    """`command` for finetune.py."""
    return command(*flags, script=finetune)


def tune_refused(*flags, names):
    """`refused` for finetune.py."""
    refused(*flags, names=names, script=finetune)


def log_of(out):
    """Rows of a run's log."""
    return [json.loads(row) for row in (Path(out) / "log.jsonl").read_text().splitlines()]


def kept_in(out):
    """What a run's checkpoint holds."""
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def same_weights(*outs):
    """The checkpoints of two runs hold the same weights, bit for bit."""
    a, b = (
        {
            (name, k): value
            for name, part in kept.items()
            for k, value in (part.items() if isinstance(part, dict) else ())
            if isinstance(value, torch.Tensor)
        }
        for kept in map(kept_in, outs)
    )
    assert a and a.keys() == b.keys()
    differ = [k for k in a if not torch.equal(a[k], b[k])]
    assert not differ, differ


# ---- Losses --------------------------------------------------------------------------------------


def test_lsgan_losses_equal_hand_values():
    # (0.5-1)^2 = 0.25 real; 0.25^2 = 0.0625 fake; half the sum = 0.15625
    real, fake = torch.full((2, 1), 0.5), torch.full((2, 1), 0.25)
    assert math.isclose(losses.lsgan_d_loss(real, fake).item(), 0.15625)
    # G: half of (0.25-1)^2 = 0.28125
    assert math.isclose(losses.lsgan_g_loss(fake).item(), 0.28125)
    # The square is of each logit, not of their mean: (3-1)^2 and (-1-1)^2 both count 4.
    assert math.isclose(losses.lsgan_g_loss(torch.tensor([3.0, -1.0])).item(), 2.0)


def test_masked_mse_counts_hidden_patches_alone_in_normalised_units():
    images = torch.rand(2, 3, 8, 8)
    mask = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1]])
    error = torch.zeros(2, 3, 8, 8)
    std = torch.tensor(model.IMAGENET_STD).view(3, 1, 1)
    error[0, :, :4, :4] = 2 * std  # hidden: 2 standard deviations, squared 4
    error[0, :, :4, 4:] = 9.0  # visible: must not count
    error[1, :, 4:, 4:] = 1 * std  # hidden: squared 1; the other hidden patch has no error
    loss = losses.masked_mse(images + error, images, mask, patch_size=4)
    close(loss, (4 + 0 + 1) / 3, 1e-5)


def test_masked_mse_with_norm_pix_equals_a_slow_loop():
    images, reconstruction = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    mask = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])
    mean, std = np.array(model.IMAGENET_MEAN), np.array(model.IMAGENET_STD)
    total = []
    for b, n in mask.nonzero().tolist():  # hidden patches, in row order of a 2 x 2 grid
        rows, columns = slice(n // 2 * 4, n // 2 * 4 + 4), slice(n % 2 * 4, n % 2 * 4 + 4)
        target = images[b, :, rows, columns].permute(1, 2, 0).double().numpy()
        target = (target - mean) / std
        target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
        prediction = reconstruction[b, :, rows, columns].permute(1, 2, 0).double().numpy()
        total.append((((prediction - mean) / std - target) ** 2).mean())
    close(losses.masked_mse(reconstruction, images, mask, 4, norm_pix=True), np.mean(total), 1e-5)


def test_ms_ssim_l1_equals_the_closed_form_on_flat_images():
    # Flat images have no variance: SSIM is the luminance term, and the same at every scale.
    a, b = 0.3, 0.7
    similarity = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    expected = 0.85 * (1 - similarity) / 2 + 0.15 * (b - a)
    x, y = torch.full((1, 3, 32, 32), a), torch.full((1, 3, 32, 32), b)
    close(losses.ms_ssim_l1(x, y), expected, 2e-4)  # float32 variances are good to 1e-7 of C2 9e-4
    close(losses.ms_ssim_l1(y, y), 0.0, 1e-6)


def slow_ssim(x, y, window):
    """Mean SSIM of two 2-D arrays, window by window, from the definition."""
    k, values = len(window), []
    for i in range(x.shape[0] - k + 1):
        for j in range(x.shape[1] - k + 1):
            u, v = x[i : i + k, j : j + k], y[i : i + k, j : j + k]
            mu, mv = (window * u).sum(), (window * v).sum()
            vu, vv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
            cov = (window * (u - mu) * (v - mv)).sum()
            top = (2 * mu * mv + 0.01**2) * (2 * cov + 0.03**2)
            values.append(top / ((mu**2 + mv**2 + 0.01**2) * (vu + vv + 0.03**2)))
    return np.mean(values)


def test_ms_ssim_l1_equals_a_slow_loop_over_windows_and_scales():
    rng = np.random.default_rng(0)
    x, y = rng.random((3, 24, 24)), rng.random((3, 24, 24))
    images = [torch.tensor(v[None], dtype=torch.float32) for v in (x, y)]
    expected = 0
    for scale in range(4):
        if scale:
            x, y = (v.reshape(3, v.shape[1] // 2, 2, -1, 2).mean((2, 4)) for v in (x, y))
        similarity = np.mean([slow_ssim(x[c], y[c], np.full((3, 3), 1 / 9)) for c in range(3)])
        expected += (0.85 * (1 - similarity) / 2 + 0.15 * np.abs(x - y).mean()) / 4
    close(losses.ms_ssim_l1(*images), expected, 1e-5)


def test_gram_and_feature_terms_equal_hand_values():
    # Two channels of two pixels: rows (1, 2) and (3, 4), C H W = 4.
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    close(losses.gram(features), torch.tensor([[[5.0, 11], [11, 25]]]) / 4, 0)
    # Against zeros: feature = mean (1, 2, 3, 4) = 2.5; style = mean (5, 11, 11, 25) / 4 = 3.25
    zeros = torch.zeros_like(features)
    close(losses.feature_loss([features], [zeros]), 2.5, 0)
    close(losses.style_loss([features], [zeros]), 3.25, 0)
    # Two layers sum, with the paper's weights .05 and 40.
    terms = losses.perceptual_terms([features, features], [zeros, zeros])
    close(terms["feature"], 2 * 0.05 * 2.5, 1e-6)
    close(terms["style"], 2 * 40 * 3.25, 1e-4)


def test_gram_is_float32_under_autocast():
    features = torch.rand(1, 8, 16, 16)
    flat = features.double().flatten(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = losses.gram(features)
    assert result.dtype == torch.float32
    close(result.double(), flat @ flat.transpose(1, 2) / flat.numel(), 1e-6)


def test_psnr_and_ssim_metrics_equal_closed_forms_and_a_slow_loop():
    x = torch.full((2, 3, 16, 16), 0.5)
    close(losses.psnr(x + 0.1, x), torch.tensor([20.0, 20.0]), 1e-3)  # MSE .01
    weight = torch.zeros(2, 1, 16, 16)
    weight[:, :, :8] = 1
    y = x.clone()
    y[:, :, :8] += 0.01  # counts: MSE 1e-4
    y[:, :, 8:] += 0.5  # does not
    close(losses.psnr(y, x, weight), torch.tensor([40.0, 40.0]), 1e-2)
    rng = np.random.default_rng(0)
    u, v = rng.random((14, 14)), rng.random((14, 14))
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    u4, v4 = (torch.tensor(a, dtype=torch.float32).expand(1, 3, 14, 14) for a in (u, v))
    close(losses.ssim(u4, v4), slow_ssim(u, v, window / window.sum()), 1e-5)


A, B = [0, 0, 10, 10], [20, 0, 30, 10]  # two objects
FAR = [40, 40, 50, 50]  # where there is none


# ---- Networks ------------------------------------------------------------------------------------


def slow_mae(weights, images, noise, depth, heads, decoder_depth, decoder_heads, patch):
    """The MAE of He et al. 2022 written out slowly, one sample at a time -> normalised patches.

    A convolution embeds all patches, attention is an explicit softmax, masking is index lists.
    """

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[name + ".weight"] + weights[name + ".bias"]

    def apply(x, name):
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def block(x, name, heads):
        q, k, v = apply(norm(x, name + ".norm1"), name + ".attn.qkv").chunk(3, dim=-1)
        out = []
        for h in range(heads):
            part = slice(h * q.shape[1] // heads, (h + 1) * q.shape[1] // heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(q.shape[1] // heads)
            out.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[:, part])
        x = x + apply(torch.cat(out, dim=1), name + ".attn.proj")
        hidden = apply(norm(x, name + ".norm2"), name + ".mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + apply(hidden, name + ".mlp.fc2")

    mean = torch.tensor(model.IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(model.IMAGENET_STD).view(3, 1, 1)
    results = []
    for image, sample_noise in zip(images, noise, strict=True):
        kernel = [weights[f"patch_embed.proj.{name}"] for name in ("weight", "bias")]
        embedded = F.conv2d(((image - mean) / std)[None], *kernel, stride=patch)[0].flatten(1).T
        visible = sorted(range(16), key=lambda n: sample_noise[n])[:4]
        x = embedded[visible] + weights["pos_embed"][0, 1:][visible]
        x = torch.cat([weights["cls_token"][0], x])
        for i in range(depth):
            x = block(x, f"blocks.{i}", heads)
        x = apply(norm(x, "norm"), "decoder_embed")
        full = weights["mask_token"][0].repeat(17, 1)
        full[0] = x[0]
        for place, token in zip(visible, x[1:], strict=True):
            full[1 + place] = token
        x = full + weights["decoder_pos_embed"][0]
        for i in range(decoder_depth):
            x = block(x, f"decoder_blocks.{i}", decoder_heads)
        results.append(apply(norm(x, "decoder_norm"), "decoder_pred")[1:])
    return torch.stack(results)


def test_pasted_and_full_reconstructions_are_told_apart():
    real = torch.full((2, 3, 32, 32), 0.4)  # 102 of 255
    hidden = torch.zeros(2, 1, 32, 32)
    hidden[:, :, :, :16] = 1
    fake = torch.full((2, 3, 32, 32), 0.8)  # .4 off where visible,
    fake[:, :, :, :16] = 0.6001  # .2 off where hidden, once it has 8 bits
    sums, fakes = losses.image_quality(fake, real, hidden)
    assert set(sums) == set(losses.METRICS)
    close(sums["l1_full"], 2 * 0.3, 1e-6)
    close(sums["l1_pasted"], 2 * 0.1, 1e-6)
    close(sums["psnr_full"], 2 * -10 * math.log10((0.16 + 0.04) / 2), 1e-4)
    close(sums["psnr_pasted"], 2 * -10 * math.log10(0.04 / 2), 1e-4)
    close(sums["psnr"], 2 * -10 * math.log10(0.04), 1e-4)
    close(sums["ssim_full"], losses.ssim(fakes["full"], real).sum(), 1e-6)
    close(fakes["pasted"][:, :, :, 16:], real[:, :, :, 16:], 0)
    close(fakes["pasted"][:, :, :, :16] * 255, 153.0, 1e-4)


def test_ssim_of_flat_images_equals_the_closed_form_to_seven_digits():
    x, y = torch.full((1, 3, 16, 16), 0.9), torch.full((1, 3, 16, 16), 0.899)
    a, b = x[0, 0, 0, 0].double(), y[0, 0, 0, 0].double()
    close(losses.ssim(x, y), (2 * a * b + 1e-4) / (a * a + b * b + 1e-4), 1e-7)


def test_mae_equals_a_slow_implementation():
    torch.manual_seed(0)
    mae = model.build_mae("tiny", 32, 8)
    with torch.no_grad():
        for p in mae.parameters():  # biases and norms away from their neutral start
            p.add_(0.05 * torch.randn_like(p))
        images, noise, _ = tiny_batch(2)
        (reconstruction,), _ = mae(images, 0.75, noise)
        expected = slow_mae(mae.state_dict(), images, noise, 6, 3, 4, 4, 8)
    normalised = model.imagenet_normalize(reconstruction)
    for n in range(16):  # rows from 8 (n // 4), columns from 8 (n % 4); channel runs fastest
        rows, columns = slice(n // 4 * 8, n // 4 * 8 + 8), slice(n % 4 * 8, n % 4 * 8 + 8)
        patch = normalised[:, :, rows, columns].permute(0, 2, 3, 1).flatten(1)
        close(patch, expected[:, n], 1e-4)


def test_masking_hides_three_quarters_and_the_encoder_never_sees_them():
    mae = model.build_mae("tiny", 32, 8)
    images, noise, _ = tiny_batch(3)
    ids_keep, ids_restore, mask = model.random_masking(noise, 0.75)
    assert mask.sum(1).tolist() == [12, 12, 12]  # 1 = hidden
    for b in range(3):  # the visible patches are those with the least noise
        assert sorted(ids_keep[b].tolist()) == (mask[b] == 0).nonzero().flatten().tolist()
        assert noise[b][mask[b] == 0].max() < noise[b][mask[b] == 1].min()
    hidden = data.pixel_mask(mask, 32)
    changed = torch.where(hidden > 0, torch.rand_like(images), images)
    with torch.no_grad():
        (a,), _ = mae(images, 0.75, noise)
        (b,), _ = mae(changed, 0.75, noise)
        (c,), _ = mae(torch.where(hidden > 0, images, torch.rand_like(images)), 0.75, noise)
    close(a, b, 0)
    assert (a - c).abs().max() > 1e-3  # the visible ones do matter


def test_positions_equal_hand_values():
    table = model.sincos_positions(8, side=3)[0]  # CLS, then rows of 3
    assert table.shape == (10, 8) and table[0].abs().max() == 0
    # Row 2, column 1. Two wavelengths: frequencies 1 and 10000^(-1/2) = .01; column first.
    s, c = math.sin, math.cos
    expected = [s(1), s(0.01), c(1), c(0.01), s(2), s(0.02), c(2), c(0.02)]
    close(table[1 + 2 * 3 + 1], torch.tensor(expected), 1e-6)


def test_vit_base_has_the_published_names_and_numbers():
    mae = model.build_mae("base")
    # 111,907,840 with its two position tables (197 * 768 + 197 * 512), as the published MAE counts.
    assert sum(v.numel() for v in mae.state_dict().values()) == 111_907_840
    shapes = {k: tuple(v.shape) for k, v in mae.state_dict().items()}
    expected = {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 197, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "blocks.11.attn.qkv.weight": (2304, 768),
        "blocks.11.attn.proj.bias": (768,),
        "blocks.0.mlp.fc1.weight": (3072, 768),
        "blocks.0.norm2.weight": (768,),
        "norm.bias": (768,),
        "decoder_embed.weight": (512, 768),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, 197, 512),
        "decoder_blocks.7.mlp.fc2.weight": (512, 2048),
        "decoder_norm.weight": (512,),
        "decoder_pred.weight": (768, 512),
    }
    assert expected.items() <= shapes.items()
    # Xavier-uniform: bound sqrt(6 / (in + out)), deviation bound / sqrt(3). Tokens: .02.
    qkv = mae.blocks[3].attn.qkv.weight
    bound = math.sqrt(6 / (768 + 2304))
    assert qkv.abs().max() <= bound and abs(qkv.std().item() / (bound / math.sqrt(3)) - 1) < 0.01
    kernel = mae.patch_embed.proj.weight
    assert abs(kernel.std().item() / math.sqrt(2 / (768 + 768)) - 1) < 0.01
    assert abs(mae.cls_token.std().item() / 0.02 - 1) < 0.1
    assert mae.blocks[3].attn.qkv.bias.abs().max() == 0


def test_single_scale_discriminator_looks_at_the_finest_image_alone():
    disc, images = model.build_discriminator("conv", 32, 1, 4, 16), random_pyramid(2, 32, 2)
    logits, features = disc(images)
    assert [f.shape[1] for f in features] == [4, 8, 16]
    close(logits, disc(images[:1])[0], 0)


# ---- Multi-scale discriminators ------------------------------------------------------------------

NETWORKS = (MSGDiscriminator, StyleGAN2Discriminator)


def random_pyramid(batch, image_size, scales):
    return [torch.rand(batch, 3, image_size >> i, image_size >> i) for i in range(scales)]


def both_orders(y, x):
    """y, its cube's gradient at x, and that of the gradient's square, as R1 takes it."""
    first = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0]
    return y, first, torch.autograd.grad(first.square().sum(), x)[0]


def test_blur_and_mean_equal_direct_sums_and_convolutions_to_the_second_derivative():
    torch.manual_seed(0)
    taps = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel = torch.outer(taps, taps).expand(2, 1, 4, 4)
    for side in (4, 5, 7, 8):  # an odd side leaves a row and a column over at stride 2
        x = torch.randn(2, 2, side, side, dtype=torch.float64, requires_grad=True)
        assert_close(model.Mean2x2()(x), slow_mean(x))
        pairs = [(model.Mean2x2(), F.avg_pool2d(x, 2))]
        for stride, padding in ((1, 2), (2, 1), (1, 0), (3, 2)):
            blur = model.Blur(side, stride, padding).double()
            assert_close(blur(x), slow_blur(x, padding)[:, :, ::stride, ::stride])
            pairs.append((blur, F.conv2d(x, kernel, None, stride, padding, groups=2)))
        for layer, plain in pairs:
            wanted, wide = both_orders(plain, x), x.contiguous(memory_format=torch.channels_last)
            for y in (layer(x), layer(wide)):
                for ours, theirs in zip(both_orders(y, x), wanted, strict=True):
                    close(ours, theirs, 1e-12)
            if side < 6:
                assert torch.autograd.gradcheck(layer, x[:1])
                assert torch.autograd.gradgradcheck(lambda x, f=layer: f(x).square(), x[:1])


def test_mean_gives_a_left_over_row_or_column_no_gradient():
    x = torch.rand(1, 2, 5, 7, requires_grad=True)
    model.Mean2x2()(x).sum().backward()
    assert (x.grad[:, :, :4, :6] == 0.25).all()
    assert (x.grad[:, :, 4:] == 0).all() and (x.grad[:, :, :, 6:] == 0).all()


def test_blur_and_mean_neither_copy_nor_convert_a_map_in_either_layout():
    # By the profiler, forwards, backwards and twice backwards. A map has 4 x 8 x 16 x 16 values or,
    # at half the size, a quarter of that; the blurs' matrices have at most 17 x 16.
    moves = ("aten::copy_", "aten::clone", "aten::_to_copy")
    for layout in (torch.contiguous_format, torch.channels_last):
        for layer in (model.Mean2x2(), model.Blur(16, 1, 2), model.Blur(16, 2, 1)):
            x = torch.rand(4, 8, 16, 16).contiguous(memory_format=layout).requires_grad_()
            shape = torch.empty_like(layer(x))
            probe = torch.rand(shape.shape).contiguous(memory_format=layout).requires_grad_()
            with torch.profiler.profile(record_shapes=True) as profile:
                y = layer(x)
                (first,) = torch.autograd.grad(y, x, probe, create_graph=True)
                torch.autograd.grad(first, probe, torch.ones_like(first))
            assert y.is_contiguous(memory_format=layout), (layer, layout)
            events = [e for e in profile.events() if "conv" in e.name or e.name in moves]
            sizes = [max(map(math.prod, filter(None, e.input_shapes)), default=0) for e in events]
            of_maps = [e.name for e, size in zip(events, sizes, strict=True) if size > 500]
            assert not of_maps, (layer, layout, of_maps)


def test_equalised_layers_scale_by_root_of_fan_in():
    # fan_in 2*3*3 = 18: weights 1 on ones give 18 / sqrt(18) = sqrt(18); sqrt(2) of that is 6
    x = torch.ones(1, 2, 3, 3)
    linear = model.EqualConv2d(2, 1, 3, activate=False)
    active = model.EqualConv2d(2, 1, 3)
    halved = model.EqualConv2d(2, 1, 3, gain=0.5)
    for layer in (linear, active, halved):
        torch.nn.init.ones_(layer.weight)
    assert math.isclose(linear(x).item(), math.sqrt(18), rel_tol=1e-5)
    assert math.isclose(active(x).item(), 6.0, rel_tol=1e-5)
    assert math.isclose(active(-x).item(), -1.2, rel_tol=1e-5)  # leaky slope 0.2
    assert math.isclose(active(100 * x).item(), 600, rel_tol=1e-5)
    assert active.half()(100 * x.half()).item() == 256  # 600, clamped in fp16 alone
    assert halved.half()(100 * x.half()).item() == 128  # 300: the limit follows the gain
    assert active.bfloat16()(100 * x.bfloat16()).item() > 590
    active.float()
    torch.nn.init.ones_(active.bias)
    assert math.isclose(active(x).item(), 6 + math.sqrt(2), rel_tol=1e-5)
    dense = model.EqualLinear(9, 1, activate=True)  # 9 / sqrt(9) = 3
    torch.nn.init.ones_(dense.weight)
    assert math.isclose(dense(torch.ones(1, 9)).item(), 3 * math.sqrt(2), rel_tol=1e-5)


def test_equalised_weights_have_deviation_one_over_root_fan_in():
    torch.manual_seed(0)
    basis = torch.eye(64).view(64, 64, 1, 1)  # one unit vector per sample reads the weights
    weights = model.EqualConv2d(64, 256, 1, activate=False)(basis)
    assert abs(weights.std().item() * 8 - 1) < 0.03  # 16384 draws: standard error 0.6 %


def slow_mean(x):
    """Means of 2 x 2 pixels as four shifted sums; an odd last row or column is left out."""
    h, w, two = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2, range(2)
    return sum(x[:, :, i:h:2, j:w:2] for i in two for j in two) / 4


def slow_blur(x, padding):
    """[1, 3, 3, 1] / 8 along both axes, as sixteen shifted sums."""
    x, taps = F.pad(x, [padding] * 4), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
    h, w, four = x.shape[2] - 3, x.shape[3] - 3, range(4)
    return sum(taps[i] * taps[j] * x[:, :, i : i + h, j : j + w] for i in four for j in four)


def test_residual_block_equals_its_steps_done_slowly():
    torch.manual_seed(0)

    def act(x):
        return math.sqrt(2) * torch.where(x > 0, x, 0.2 * x)

    for side in (8, 9):  # an odd side rounds down
        block = model.ResidualBlock(side, 6, 8)
        conv1, conv2, skip = block.main[0], block.main[2], block.skip[1]
        torch.nn.init.normal_(conv1.bias)
        torch.nn.init.normal_(conv2.bias)
        x = torch.randn(2, 6, side, side)
        h = act(F.conv2d(x, conv1.weight / math.sqrt(54), conv1.bias, padding=1))
        h = F.conv2d(slow_blur(h, 2), conv2.weight / math.sqrt(54))[:, :, ::2, ::2]
        h = act(h + conv2.bias.view(1, -1, 1, 1))
        s = F.conv2d(slow_blur(x, 1)[:, :, ::2, ::2], skip.weight / math.sqrt(6))
        assert_close(block(x), (h + s) / math.sqrt(2), rtol=1e-4, atol=1e-5)
        assert h.shape[2:] == (4, 4)


# ---- Minibatch standard deviation ----------------------------------------------------------------


def test_minibatch_std_equals_hand_value():
    # G = 2, M = 2: samples 0 and 2 differ by 2 and 6, deviations 1 and 3, mean 2;
    # samples 1 and 3 are equal, sqrt(0 + 1e-8) = 1e-4
    x = torch.tensor([[0.0, 0], [1, 1], [2, 6], [1, 1]]).view(4, 1, 1, 2)
    y = model.append_minibatch_std(x, group=2)
    assert_close(y[:, :1], x)
    assert_close(y[:, 1, 0], torch.tensor([[2, 2], [1e-4, 1e-4], [2, 2], [1e-4, 1e-4]]))


def test_minibatch_std_of_interleaved_ranks_equals_whole_batch():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 2, 2)
    whole = model.append_minibatch_std(x, group=4)
    assert whole[:, 3, 0, 0].unique().numel() == 4  # four groups, else nothing is tested
    for ranks in (2, 4):
        for r in range(ranks):
            assert_close(model.append_minibatch_std(x[r::ranks], group=4), whole[r::ranks])


def test_minibatch_std_takes_the_largest_group_that_divides_the_batch():
    # 6 samples, groups of 3: {0, 1, 2} has variance 2 / 3, {0, 0, 0} none. 5 is prime: G = 1.
    threes = [0, 0, 1, 0, 2, 0], [math.sqrt(2 / 3), 1e-4] * 3
    for values, expected in (threes, ([0, 1, 2, 3, 4], [1e-4] * 5)):
        x = torch.tensor(values).float().view(-1, 1, 1, 1)
        assert_close(model.append_minibatch_std(x, group=4)[:, 1].flatten(), torch.tensor(expected))


def test_features_ignore_other_samples_and_only_stylegan2_logits_see_them():
    torch.manual_seed(0)
    reals = random_pyramid(4, 16, 2)
    fakes = [0.1 * x for x in random_pyramid(4, 16, 2)]
    for network in NETWORKS:
        disc = network(16, 2, 4, 8)
        apart, alone = disc(reals)
        joint, together = disc([torch.cat(pair) for pair in zip(reals, fakes, strict=True)])
        for a, b in zip(alone, together, strict=True):
            assert_close(a, b[:4], rtol=1e-4, atol=1e-6)
        mixes = (apart - joint[:4]).abs().max() > 1e-4  # hence one call each for real and fake
        assert mixes == (network is StyleGAN2Discriminator)


def test_levels_double_their_width_up_to_the_most_and_refuse_what_does_not_fit():
    levels = [(64, 8), (32, 16), (16, 32), (8, 32), (4, 32)]
    assert model.discriminator_levels(64, 1, 8, 32) == levels
    for bad in ((32, 5, 8, 32), (32, 0, 8, 32), (32, 1, 7, 32)):
        raises_value_error(model.discriminator_levels, *bad)


def test_any_image_size_gives_one_logit_and_one_feature_map_per_block():
    cases = (  # image_size, scales, sides of the features
        (224, 5, [112, 56, 28, 14, 7]),
        (256, 5, [128, 64, 32, 16, 8, 4]),
        (96, 5, [48, 24, 12, 6]),
        (64, 4, [32, 16, 8, 4]),
        (32, 3, [16, 8, 4]),
        (36, 3, [18, 9, 4]),
        (32, 4, [16, 8, 4]),  # the smallest image joins right before the head
        (32, 1, [16, 8, 4]),  # single-scale, for LS-GAN
    )
    for kind in ("conv", "msg", "stylegan2"):
        for image_size, scales, sides in cases:
            images = random_pyramid(2, image_size, scales)
            logits, features = model.build_discriminator(kind, image_size, scales, 4, 8)(images)
            assert logits.shape == (2,), (kind, image_size)
            assert [f.shape[2] for f in features] == sides, (kind, image_size)
            assert all(f.shape[2] == f.shape[3] for f in features)


def test_every_scale_influences_every_logit():
    torch.manual_seed(0)
    for network in NETWORKS:
        for scales in (1, 3, 4):
            images = [x.requires_grad_() for x in random_pyramid(2, 32, scales)]
            logits, _ = network(32, scales, 4, 16)(images)
            for grad in torch.autograd.grad(logits.sum(), images):
                assert (grad.flatten(1).norm(dim=1) > 1e-6).all(), (network, scales)


def test_wrong_number_of_images_is_an_error():
    for network in NETWORKS:
        raises_value_error(network(32, 3, 4, 8), random_pyramid(1, 32, 2))


def test_stylegan2_parameter_count_equals_hand_count():
    widths = [64, 128, 256, 512, 512, 512]
    blocks = sum(
        (9 * c * c + c) + (9 * c * d + d) + c * d  # conv1, conv2, skip
        for c, d in zip(widths, widths[1:], strict=False)
    )
    epilogue = (9 * 513 * 512 + 512) + (49 * 512 * 512 + 512) + (512 + 1)
    entrances = sum((3 * (c // 2) + c // 2) + c * (c + c // 2) for c in widths[1:5])
    for scales, expected in ((1, 0), (5, entrances)):
        with torch.device("meta"):  # counts without allocating
            disc = StyleGAN2Discriminator(224, scales, 64, 512)
        count = sum(p.numel() for p in disc.parameters())
        assert count == 4 * 64 + blocks + epilogue + expected


# ---- Gradient regularisers -----------------------------------------------------------------------


def test_r1_of_a_linear_discriminator_is_its_mean_squared_weight():
    torch.manual_seed(0)
    weights = [torch.randn(3, s, s, requires_grad=True) for s in (4, 2)]
    reals = [torch.rand(5, 3, s, s, requires_grad=True) for s in (4, 2)]
    logits = sum((w * x).sum(dim=(1, 2, 3)) for w, x in zip(weights, reals, strict=True))
    penalty = losses.r1_penalty(logits, reals)
    assert_close(penalty, (weights[0].square().sum() + weights[1].square().sum()) / 2)
    penalty.backward()
    for w in weights:
        assert_close(w.grad, w.detach())  # derivative of w^2 / 2


def test_r1_trains_both_discriminators():
    torch.manual_seed(0)
    for network in NETWORKS:
        disc = network(16, 2, 4, 8)
        reals = [x.requires_grad_() for x in random_pyramid(4, 16, 2)]
        before = losses.r1_penalty(disc(reals)[0], reals)
        before.backward()
        steps = [(p, p.grad) for p in disc.parameters() if p.grad is not None]
        slope = sum(g.square().sum() for _, g in steps).item()
        size = 0.02 * before.item() / slope  # should lower the penalty by 2 %
        with torch.no_grad():
            for p, g in steps:
                p -= size * g
        after = losses.r1_penalty(disc(reals)[0], reals)
        assert abs((1 - after / before).item() - 0.02) < 0.004, network


def toy_images(z):
    """(B, 2, 3) -> two images of different size, nonlinear in z."""
    x = torch.sin(z).flatten(1)  # (B, 6)
    wide = torch.einsum("bi,bj->bij", x, x).view(-1, 1, 6, 6)
    return [wide, (x[:, :4] * z.flatten(1)[:, 2:]).view(-1, 1, 2, 2)]


def toy_features(images):
    """Two maps, of 12 and 4 values, linear between the kinks, as a discriminator's are."""
    wide, small = images
    first = F.leaky_relu(wide.view(-1, 12, 3).sum(dim=2) - 0.1, 0.2).view(-1, 3, 2, 2)
    return [first, F.leaky_relu(small + first[:, :1], 0.2)]


def test_path_length_penalty_equals_brute_force_per_sample_and_so_does_its_gradient():
    torch.manual_seed(0)
    z = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    noise = [torch.randn_like(f) for f in toy_features(toy_images(z))]

    def at_once(z):  # features as a function of z, differentiated twice
        lengths = []
        for b in range(3):  # one sample at a time, g = sum_j J_j^T eps_j / sqrt(J N_j)
            jac = torch.autograd.functional.jacobian(
                lambda z: tuple(toy_features(toy_images(z))), z[b : b + 1], create_graph=True
            )
            g = sum(
                torch.einsum("oi,o->i", j.reshape(n, 6), e[b].flatten()) / math.sqrt(2 * n)
                for j, e, n in zip(jac, noise, (12, 4), strict=True)
            )
            lengths.append((g.square().sum() / 2).sqrt())  # mean over L = 2
        return torch.stack(lengths)

    outputs = toy_images(z)
    fakes = [x.detach().requires_grad_() for x in outputs]
    slopes = losses.feature_slopes(toy_features(fakes), fakes, noise)
    got, wanted = losses.path_lengths(outputs, z, slopes), at_once(z)
    close(got, wanted, 1e-6)
    penalty = losses.path_length_penalty(got, 0.7)
    close(penalty, (wanted / 0.7 - 1).square().sum() / 3, 1e-6)
    slow = (wanted / 0.7 - 1).square().mean()
    close(torch.autograd.grad(penalty, z)[0], torch.autograd.grad(slow, z)[0], 1e-5)


def test_path_length_gradient_equals_closed_form_and_is_finite_at_zero():
    # x = W z, phi = x, L = 1: a = |W' eps| / sqrt(N), da/dW = eps (W' eps)' / (N a)
    torch.manual_seed(0)
    z, eps = torch.randn(1, 1, 3, requires_grad=True), torch.randn(1, 5, 1, 1)
    for scale in (1.0, 0.0):
        weight = (scale * torch.randn(5, 3)).requires_grad_()
        x = (z.view(1, 3) @ weight.T).view(1, 5, 1, 1)
        phi = x.detach().requires_grad_()
        slopes = losses.feature_slopes([phi + 0], [phi], [eps])
        losses.path_length_penalty(losses.path_lengths([x], z, slopes), 0.5).backward()
        pull = weight.detach().T @ eps.view(5)  # (3,)
        a = math.sqrt(pull.square().sum().item() / 5 + 1e-8)
        expected = 2 * (a / 0.5 - 1) / 0.5 * torch.outer(eps.view(5), pull) / (5 * a)
        assert_close(weight.grad, expected)


def test_path_length_gradient_through_a_discriminator_needs_no_second_derivative_of_it():
    # ADA's warps and colours and both Ds are linear between kinks: with the whole graph, through D
    # as well, the decoder's gradient is the same. D's own parameters get none.
    torch.manual_seed(0)
    ada = AdaAugment(fixed_p=1.0)
    draw = ada.sample(torch.arange(4), 16)
    for network in NETWORKS:
        disc, decoder = network(16, 2, 4, 8), torch.nn.Linear(6, 3 * 8 * 8)
        z = torch.randn(4, 1, 6, requires_grad=True)
        coarse = decoder(z).sigmoid().view(4, 3, 8, 8)
        outputs = [F.interpolate(coarse, scale_factor=2.0), coarse]
        fakes = [x.detach().requires_grad_() for x in outputs]
        _, features = disc(ada(fakes, *draw))
        noise = [torch.randn_like(f) for f in features]
        slopes = losses.feature_slopes(features, fakes, noise)
        penalty = losses.path_length_penalty(losses.path_lengths(outputs, z, slopes), 0.01)
        _, features = disc(ada(outputs, *draw))
        divisors = [math.sqrt(len(features) * f[0].numel()) for f in features]
        s = sum((f * e / n).sum() for f, e, n in zip(features, noise, divisors, strict=True))
        (g,) = torch.autograd.grad(s, z, create_graph=True)
        slow = ((g.square().sum((1, 2)) + 1e-8).sqrt() / 0.01 - 1).square().mean()
        (wanted,) = torch.autograd.grad(slow, decoder.weight, retain_graph=True)
        penalty.backward()
        assert wanted.norm() > 0 and (decoder.weight.grad - wanted).norm() < 3e-6 * wanted.norm()
        assert all(p.grad is None for p in disc.parameters())


# ---- Adaptive discriminator augmentation ---------------------------------------------------------

GEOMETRY = ("xflip", "rot90", "shift", "zoom", "rotate1", "stretch", "rotate2", "drift")
COLOUR = ("brightness", "contrast", "luma", "hue", "saturation")
NO_T, NO_C = torch.eye(3)[None], torch.eye(4)[None]


def noise_images(batch, side, seed=0):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def average_pyramid(images, scales):
    return [F.avg_pool2d(images, 2**level) if level else images for level in range(scales)]


def open_gates(names, table):
    return torch.tensor([[name in names for name in table]])  # (1, 8) or (1, 5)


def slow_sample(image, x, y):
    """Bilinear value at pixel position (x, y), 0 = first centre, edges mirrored; returns (3,)."""
    side, value = image.shape[-1], torch.zeros(3)
    mirrored = [*range(side), *reversed(range(side))]  # period 2 S
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            weight = (1 - abs(y - i)) * (1 - abs(x - j))
            value += weight * image[:, mirrored[i % (2 * side)], mirrored[j % (2 * side)]]
    return value


def slow_geometry(image, names, u, z):
    """Undo the open transforms one by one, last first, on every output pixel; no matrices."""
    side, out = image.shape[-1], torch.zeros_like(image)

    def turned(x, y, angle):  # (1, 0) goes to (cos, sin)
        radius, start = math.hypot(x, y), math.atan2(y, x)
        return radius * math.cos(start + angle), radius * math.sin(start + angle)

    for row in range(side):
        for column in range(side):
            x, y = column - (side - 1) / 2, row - (side - 1) / 2  # pixels from the centre
            if "drift" in names:
                x, y = x - 0.125 * z[2] * side, y - 0.125 * z[3] * side
            if "rotate2" in names:
                x, y = turned(x, y, -math.pi * (2 * u[5] - 1))
            if "stretch" in names:
                x, y = x / 2 ** (0.2 * z[1]), y * 2 ** (0.2 * z[1])
            if "rotate1" in names:
                x, y = turned(x, y, -math.pi * (2 * u[4] - 1))
            if "zoom" in names:
                x, y = x / 2 ** (0.2 * z[0]), y / 2 ** (0.2 * z[0])
            if "shift" in names:
                x, y = (a - round((v - 0.5) / 4 * side) for a, v in ((x, u[2]), (y, u[3])))
            if "rot90" in names:
                for _ in range(int(4 * u[1])):
                    x, y = -y, x
            if "xflip" in names and u[0] >= 0.5:
                x = -x
            out[:, row, column] = slow_sample(image, x + (side - 1) / 2, y + (side - 1) / 2)
    return out


def geometry(images, names, u, z):
    u, z = torch.tensor([u]), torch.tensor([z])
    T = model.geometry_matrix(open_gates(names, GEOMETRY), u, z, images.shape[-1])
    return AdaAugment()([images], T, NO_C)[0]


def test_ada_p_zero_returns_the_images_bitwise():
    # Sides 28, 14, 7: resampling at the identity would leave rounding errors (not so at 16).
    ada, images = AdaAugment(), average_pyramid(noise_images(5, 28) * 3 - 1, 3)
    T, C = ada.sample(torch.arange(5), 28)
    assert all(torch.equal(a, b) for a, b in zip(ada(images, T, C), images, strict=True))


def test_ada_leaves_samples_without_open_gate_bitwise_alone():
    ada, keys, images = AdaAugment(fixed_p=0.08), torch.arange(64), noise_images(64, 28)
    T, C = ada.sample(keys, 28)
    still = torch.tensor([torch.equal(T[b], NO_T[0]) for b in range(64)])
    plain = torch.tensor([torch.equal(C[b], NO_C[0]) for b in range(64)])
    alone = still & plain
    assert 5 < alone.sum() < 59  # a mixed batch
    pyramid = average_pyramid(images, 2)
    for before, after in zip(pyramid, ada(pyramid, T, C), strict=True):
        same = (before == after).flatten(1).all(dim=1)
        assert torch.equal(same, alone)


def test_ada_geometry_equals_a_pixel_loop_alone_and_in_order():
    image, z = noise_images(1, 9), [1.3, -0.8, 0.6, -1.1]
    draws = ([0.7, 0.3, 0.9, 0.2, 0.62, 0.17], [0.6, 0.6, 0.1, 0.4, 0.3, 0.8])
    draws += ([0.5, 0.8, 0.95, 0.15, 0.1, 0.9],)  # flips; turns of 90, 180 and 270 degrees
    for names in (*((name,) for name in GEOMETRY), GEOMETRY):  # each alone, then all
        for u in draws:
            got, expected = geometry(image, names, u, z)[0], slow_geometry(image[0], names, u, z)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
            assert (got - image[0]).abs().max() > 0.1  # it did something
    kept = geometry(image, ("xflip",), [0.4] * 6, z)  # one time in two it does nothing
    assert torch.equal(kept, image)


def slow_colour(rgb, names, u, z):
    """The five colour formulas on one pixel in [-1, 1], a list of three numbers."""
    axis = 1 / math.sqrt(3)  # of each component of the unit grey vector
    if "brightness" in names:
        rgb = [c + 0.2 * z[0] for c in rgb]
    if "contrast" in names:
        rgb = [c * 2 ** (0.5 * z[1]) for c in rgb]
    if "luma" in names and u[0] >= 0.5:
        rgb = [c - 2 * sum(rgb) / 3 for c in rgb]  # mirror the mean, keep the differences
    if "hue" in names:  # Rodrigues: c cos + (v x c) sin + v (v . c)(1 - cos)
        angle, (r, g, b) = math.pi * (2 * u[1] - 1), rgb
        cross = [axis * (b - g), axis * (r - b), axis * (g - r)]
        along = axis * axis * sum(rgb) * (1 - math.cos(angle))
        turned = zip(rgb, cross, strict=True)
        rgb = [c * math.cos(angle) + k * math.sin(angle) + along for c, k in turned]
    if "saturation" in names:
        mean = sum(rgb) / 3
        rgb = [mean + (c - mean) * 2 ** z[2] for c in rgb]
    return rgb


def test_ada_colour_equals_the_formulas_on_each_pixel_alone_and_in_order():
    image, u, z = noise_images(1, 4), [0.8, 0.7], [1.2, -0.9, 0.7]
    for names in (*((name,) for name in COLOUR), COLOUR):
        C = model.colour_matrix(open_gates(names, COLOUR), torch.tensor([u]), torch.tensor([z]))
        got = AdaAugment()([image], NO_T, C)[0]
        pixels = (2 * image[0] - 1).flatten(1).T.tolist()
        expected = torch.tensor([slow_colour(rgb, names, u, z) for rgb in pixels])
        torch.testing.assert_close(2 * got[0].flatten(1).T - 1, expected, atol=1e-5, rtol=0)


def test_ada_scales_stay_aligned():
    # Smooth images; the mean difference of aug(down(x)) and down(aug(x)) is a fraction of the
    # difference of two images (about 0.26), and rounding error for flips and quarter turns.
    coarse = noise_images(16, 7)
    images = F.interpolate(coarse, size=(64, 64), mode="bicubic", align_corners=True)
    pyramid, (_, u, z) = average_pyramid(images, 3), model.ada_noise(torch.arange(16))
    for names, bound in ((GEOMETRY[:2], 1e-5), (GEOMETRY, 0.018)):
        T = model.geometry_matrix(open_gates(names, GEOMETRY).expand(16, 8), u[:, :6], z[:, :4], 64)
        finest, *coarser = AdaAugment()(pyramid, T, NO_C)
        for got, expected in zip(coarser, average_pyramid(finest, 3)[1:], strict=True):
            assert (got - expected).abs().mean() < bound
    C = AdaAugment(fixed_p=1.0).sample(torch.arange(16), 64)[1]  # colour commutes with averaging
    finest, *coarser = AdaAugment()(pyramid, NO_T, C)
    for got, expected in zip(coarser, average_pyramid(finest, 3)[1:], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_ada_draw_depends_on_the_key_alone():
    ada, keys, order = AdaAugment(fixed_p=0.6), torch.tensor([7, -3, 2**40, 0]), [2, 0, 3, 1]
    images = noise_images(4, 8)
    T, C = ada.sample(keys, 8)
    T_again, C_again = ada.sample(keys[order], 8)
    assert torch.equal(T_again, T[order]) and torch.equal(C_again, C[order])
    together, alone = ada([images], T, C)[0], ada([images[2:3]], T[2:3], C[2:3])[0]
    assert torch.equal(together[2:3], alone)
    near = torch.cat(model.ada_noise(torch.tensor([5, 6, 5 + 2**32, 5 + 2**62])), dim=1)
    assert len(near.unique(dim=0)) == 4  # high bits of the key count as well


def test_ada_gates_open_with_probability_p():
    # No change of colour: 4 gates closed, luma closed or drawn 0; of geometry: flip closed or 0,
    # turn closed or 0, and shift, zoom, rotation (two gates, together p), stretch, drift closed.
    p, keys = 0.2, torch.arange(4000)
    T, C = AdaAugment(fixed_p=p).sample(keys, 224)
    still = (T == NO_T).all(dim=(1, 2)).float().mean().item()
    plain = (C == NO_C).all(dim=(1, 2)).float().mean().item()
    assert abs(still - (1 - p / 2) * (1 - 3 * p / 4) * (1 - p) ** 5) < 0.027  # 4 sigma
    assert abs(plain - (1 - p / 2) * (1 - p) ** 4) < 0.03


def test_ada_gradients_of_both_orders_are_right():
    # A square makes the second order non-zero. One sample has no open gate.
    keys, ada = torch.tensor([1, 2]), AdaAugment(fixed_p=1.0)
    T, C = ada.sample(keys, 4)
    T[1], C[1] = NO_T[0], NO_C[0]
    images = noise_images(2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ada([x], T, C)[0].square(), images)
    assert torch.autograd.gradgradcheck(lambda x: ada([x], T, C)[0].square(), images)


def test_ada_computes_in_float32_under_autocast_and_on_half_precision():
    ada, images = AdaAugment(fixed_p=1.0), noise_images(3, 8).bfloat16()
    draw = ada.sample(torch.arange(3), 8)
    expected = ada([images.float()], *draw)[0]
    assert torch.equal(ada([images], *draw)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(x, expected) for x in ada([images, images.float()], *draw))


def test_ada_p_rises_on_a_sure_discriminator_and_falls_on_an_unsure_one():
    # r_t = 1 (right on all real images) or 0 (on half of them), target 0.6: 4 steps of 8 are 32
    # images, and p moves by 32 / 500 000 = 6.4e-5, at every fourth step only.
    ada = AdaAugment()
    for share, sign in ((1.0, 1), (0.5, -1), (0.81, 1), (0.79, -1)):
        ada.p = 0.25
        for _ in range(3):
            ada.update(share, 8)
            assert ada.p == 0.25
        ada.update(share, 8)
        close(ada.p, 0.25 + sign * 6.4e-5, 1e-12)
    for start, share in ((0.0, 0.5), (1.0, 1.0)):  # never below 0 or above 1
        ada.p = start
        for _ in range(4):
            ada.update(share, 8)
        assert ada.p == start


def test_ada_resumes_from_its_state_dict():
    ada, resumed, fixed = AdaAugment(), AdaAugment(), AdaAugment(fixed_p=0.3)
    for _ in range(6):  # one change of p and half an interval
        ada.update(1.0, 8)
    resumed.load_state_dict(ada.state_dict())
    fixed.load_state_dict(ada.state_dict())
    assert resumed.p == ada.p > 0 and fixed.p == 0.3
    for _ in range(2):
        ada.update(1.0, 8), resumed.update(1.0, 8)
    for _ in range(8):
        fixed.update(0.0, 8)
    assert resumed.p == ada.p and fixed.p == 0.3
    close(ada.p, 64 / 500_000, 1e-12)


def test_ada_refuses_images_that_are_not_square():
    T, C = AdaAugment(fixed_p=1.0).sample(torch.arange(1), 8)
    raises_value_error(AdaAugment(), [torch.zeros(1, 3, 8, 6)], T, C, says="(1, 3, 8, 6)")


# ---- The training step ---------------------------------------------------------------------------


def naive_objective(run, args, images, noise, seeds):
    """Eq. 6 as one plain graph through G and D, feature terms included -> (scalar, D's loss)."""
    recipe = losses.LOSSES[args.loss]
    fakes, mask = run.mae(images, args.mask_ratio, noise)
    reals = [F.avg_pool2d(images, 2**i) if i else images for i in range(len(fakes))]
    total = losses.pixel_loss(recipe["pixel"], fakes, reals, mask, patch_size=args.patch_size)
    if run.loss_network is not None:  # eq. 7
        total = total + perceptual_loss(run.loss_network(fakes[0]), run.loss_network(images))
    if run.disc is None:
        return total, None
    if recipe["ada"]:
        transform = run.ada.sample(seeds, 32)
        fakes, reals = run.ada(fakes, *transform), run.ada(reals, *transform)
    logits, fake = run.disc(fakes)
    logits_real, real = run.disc(reals)
    total = total + args.adversarial_weight * losses.lsgan_g_loss(logits)
    if recipe["phi"] == "disc":
        total = total + perceptual_loss(fake, real)
    return total, losses.lsgan_d_loss(logits_real, logits)


def test_every_row_gives_g_the_gradient_of_eq_6_and_d_that_of_eq_4():
    batch = tiny_batch()
    for loss, arch in ROWS:
        run, args = tiny_run("--loss", loss, "--arch", arch, "--ada-p", "0.5")
        active = losses.LOSSES[loss]["phi"] is not None
        backward(run, batch, active, args)
        wanted = gradients(run.mae)
        wanted_d = None if run.disc is None else gradients(run.disc)
        train.update(run, apply=False)

        objective, loss_d = naive_objective(run, args, *batch)
        parameters = [p for p in run.mae.parameters() if p.requires_grad]
        direct = torch.autograd.grad(objective, parameters, retain_graph=True)
        direct = torch.cat([g.flatten() for g in direct])
        close(direct, wanted, 1e-4 * wanted.abs().max().item())
        if run.disc is not None:  # D: from eq. 4 alone, nothing of what G minimises
            direct = torch.autograd.grad(loss_d, list(run.disc.parameters()))
            direct = torch.cat([g.flatten() for g in direct])
            close(direct, wanted_d, 1e-4 * wanted_d.abs().max().item())


def test_published_loss_networks_stay_as_they_are_and_out_of_checkpoints():
    for loss in ("dvae_p", "vgg_p"):
        run, args = tiny_run("--loss", loss)
        before = torch.cat([p.flatten() for p in run.loss_network.parameters()])
        backward(run, tiny_batch(), True, args)
        train.update(run, apply=True)
        assert all(p.grad is None for p in run.loss_network.parameters())
        assert torch.equal(before, torch.cat([p.flatten() for p in run.loss_network.parameters()]))
        assert "loss_network" not in run.parts


def slow_dvae(weights, images):
    """The dVAE's encoder written out: its four groups' outputs."""

    def conv(name, x, pad):
        return F.conv2d(x, weights[f"blocks.{name}.w"], weights[f"blocks.{name}.b"], padding=pad)

    x, outputs = conv("input", images * 0.8 + 0.1, 3), []
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name = f"group_{group}.block_{block}"
            wide = group > 1 and block == 1
            y = x
            for n in (1, 2, 3, 4):
                y = conv(f"{name}.res_path.conv_{n}", y.clamp(min=0), 1 if n < 4 else 0)
            x = (conv(f"{name}.id_path", x, 0) if wide else x) + y / 64
        if group < 4:
            B, C, H, W = x.shape
            x = x.view(B, C, H // 2, 2, W // 2, 2).amax((3, 5))
        outputs.append(x)
    return outputs


def test_dvae_features_equal_a_slow_implementation_and_it_has_the_published_sizes():
    torch.manual_seed(0)
    dvae = model.DVAEEncoder()
    images = torch.rand(2, 3, 32, 32)
    for fast, slow in zip(dvae(images), slow_dvae(dvae.state_dict(), images), strict=True):
        close(fast, slow, 1e-5)
    with torch.device("meta"):
        published = WholeDVAE()
    assert len(published.state_dict()) == 72  # of 74, the last layer's left out
    count = sum(p.numel() for p in published.parameters())
    assert round((count + 2048 * 8192 + 8192) / 1e5) == 538  # 53.8 million with it


def test_vgg_features_are_the_four_layers_of_johnson():
    torch.manual_seed(0)
    vgg = model.VGGFeatures()
    images = torch.rand(1, 3, 32, 32)
    weights, x, wanted = vgg.state_dict(), model.imagenet_normalize(images), []
    layers = iter(sorted({int(k.split(".")[1]) for k in weights}))
    for count in (2, 2, 3, 3):  # convolutions of a group, then pooling
        for _ in range(count):
            n = next(layers)
            layer = [weights[f"features.{n}.{name}"] for name in ("weight", "bias")]
            x = F.conv2d(x, *layer, padding=1).clamp(min=0)
        wanted.append(x)
        x = F.max_pool2d(x, 2)
    for fast, slow in zip(vgg(images), wanted, strict=True):
        close(fast, slow, 1e-5)


class Evil:
    """Pickles into a request to create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickled_dvae_gives_its_weights_without_its_code():
    # A look-alike of OpenAI's file: a whole module whose classes are known here while it is
    # written, and nowhere while it is read.
    names, classes = ("dall_e", "dall_e.encoder", "dall_e.utils"), {}
    for name in names:
        sys.modules[name] = ModuleType(name)
    try:
        places = {"DVAEEncoder": "encoder.Encoder", "DVAEBlock": "encoder.EncoderBlock"}
        for ours, place in (places | {"DVAEConv": "utils.Conv2d"}).items():
            module, name = f"dall_e.{place}".rsplit(".", 1)
            classes[ours] = type(name, (torch.nn.Module,), {"__module__": module})
            setattr(sys.modules[module], name, classes[ours])
        torch.manual_seed(0)
        dvae = model.DVAEEncoder()

        def disguised(node):
            made = classes.get(type(node).__name__, torch.nn.Sequential)()
            for name, parameter in node.named_parameters(recurse=False):
                made.register_parameter(name, parameter)
            for name, child in node.named_children():
                made.add_module(name, disguised(child))
            made.device = torch.device("cpu")
            return made

        whole = disguised(dvae)
        whole.blocks.output = torch.nn.Linear(2, 2)
        with scratch() as folder:
            for new in (True, False):
                torch.save(whole, f"{folder}/{new}.pkl", _use_new_zipfile_serialization=new)
            for name in names:
                del sys.modules[name]
            for new in (True, False):
                weights = model.read_dvae(f"{folder}/{new}.pkl")
                assert model.misfits(dvae, weights) == ""
                assert all(torch.equal(weights[k], v) for k, v in dvae.state_dict().items())
    finally:
        for name in names:
            sys.modules.pop(name, None)


def test_no_loader_executes_what_a_file_asks_for():
    with scratch() as root:
        touched = root / "touched"
        bad, evil = root / "evil.pt", dict.fromkeys(("model", "mae", "fc.bias"), Evil(touched))
        for new in (True, False, None):  # torch's two formats, and a plain pickle
            torch.save(evil, bad, _use_new_zipfile_serialization=bool(new))
            if new is None:
                bad.write_bytes(pickle.dumps(evil))
            fast = [*FAST, "--out", root / "run", "--epochs", 1]
            refused(*fast, "--resume", bad, names=["evil.pt", "not a checkpoint"])
            refused(*fast, "--init", bad, names=["evil.pt", "ViT-MAE"])
            refused(*fast, "--loss", "dvae_p", "--dvae-weights", bad, names=["evil.pt", "dVAE"])
            refused(*fast, "--loss", "vgg_p", "--vgg-weights", bad, names=["evil.pt", "VGG"])
            for task in (["--task", "knn"], ["--eval"]):
                tune_refused("--checkpoint", bad, "--data", "shapes", *task, names=["evil.pt"])
        assert not touched.exists()
        pickle.loads(pickle.dumps(Evil(touched)))
        assert touched.exists()  # it would have been


class Scripted(torch.nn.Module):
    """A module whose TorchScript does something as it is read: it overwrites a file."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        content = torch.from_file(self.path, shared=True, size=4, dtype=torch.uint8)
        content.fill_(7)
        self.training = bool(content[0] == 7)  # else TorchScript leaves the lines above out


def test_torchscript_is_refused_before_it_runs():
    with scratch() as root:
        target, bad = root / "precious", root / "scripted.pkl"
        target.write_bytes(b"keep")
        torch.jit.script(Scripted(str(target))).save(str(bad))
        assert target.read_bytes() == b"keep"
        raises_value_error(model.read_dvae, bad, says="TorchScript")
        raises_value_error(model.load_file, bad, says="scripted.pkl")
        refused(*FAST, "--loss", "dvae_p", "--dvae-weights", bad, names=["scripted", "TorchScript"])
        assert target.read_bytes() == b"keep"
        torch.jit.load(str(bad))
        assert target.read_bytes() == bytes([7] * 4)  # it would have been


def test_networks_refuse_images_of_another_size_than_theirs():
    # 48 px is taken by a patch embedding of 8 px patches, but the positions would be wrong.
    for size in (16, 48):
        images = [torch.rand(2, 3, size >> i, size >> i) for i in range(2)]
        for network in (model.build_mae("nano", 32, 8), model.build_encoder("nano", 32, 8)):
            raises_value_error(network, images[0], says=f"[{size}, {size}] for a network of 32 px")
        for kind in ("conv", "msg", "stylegan2"):
            disc = model.build_discriminator(kind, 32, 2, 4, 8)
            raises_value_error(disc, images, says=f"[{size}, {size}] for a network of 32 px")


def test_networks_and_losses_refuse_what_would_go_wrong_in_silence():
    images, one = torch.rand(2, 3, 32, 32), torch.rand(1, 16)
    mae, encoder = model.build_mae("nano", 32, 8), model.build_encoder("nano", 32, 8)
    for network in (mae, encoder, model.build_mae("nano", 32, 8, "msg_mae", 2)):
        raises_value_error(network, (images * 255).byte(), says="torch.uint8: give float ones")
    raises_value_error(mae, images, 0.75, one, says="of [1, 16] where [2, 16] is due")
    for ratio in (75, -0.1):
        raises_value_error(mae, images, ratio, says=f"mask_ratio {ratio}")
    raises_value_error(losses.masked_mse, images, images, one, 8, says="a mask of [1, 16]")

    def pixel_loss(kind):
        return losses.pixel_loss(kind, [images], [images], torch.ones(2, 16), patch_size=8)

    raises_value_error(pixel_loss, "ms_ssim", says="'ms_ssim'; there are mse, ms_ssim_l1")
    raises_value_error(model.pooled, torch.rand(2, 5, 4), "CLS", says="'CLS'; there are cls, mean")
    raises_value_error(model.build_mae, "nano", 32, 8, "msgmae", says="there are mae, msg_mae")
    kind = "stylegan", 32, 2, 4, 8
    raises_value_error(model.build_discriminator, *kind, says="there are conv, msg, stylegan2")
    raises_value_error(model.BatchStandardize(4), torch.rand(1, 4), says="no variance")
    model.BatchStandardize(4).eval()(torch.rand(1, 4))


def test_networks_and_losses_compute_in_other_precisions_than_float32():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    encoder = model.build_encoder("nano", 32, 8, drop=0.5)
    probe = model.Classifier(encoder, 3, frozen=True)  # from the start without drop path
    assert torch.equal(probe.features(images), probe.features(images))
    probe.eval()
    disc = model.build_discriminator("stylegan2", 32, 1, 4, 8)
    for network, x in ((probe, images), (disc, [images])):
        out = network(x)
        twice = [v.double() for v in x] if isinstance(x, list) else x.double()
        again = network.double()(twice)
        if network is disc:
            out, again = out[0], again[0]
        assert again.dtype == torch.float64
        close(again, out, 1e-5)
    # Under autocast SSIM keeps its digits.
    flat = 0.5 + 0.01 * torch.rand(1, 1, 16, 16)
    window = torch.full((3, 3), 1 / 9)
    exact = losses.ssim_map(flat, flat + 1e-3, window)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.ssim_map(flat, flat + 1e-3, window), exact)
    # ImageNet's constants are float32's, whatever the images are.
    half, mask = images.bfloat16(), torch.ones(2, 16)
    close(
        losses.masked_mse(half.flip(0), half, mask, 8),
        losses.masked_mse(half.flip(0).float(), half.float(), mask, 8),
        1e-6,
    )
    # Of a flat picture MS-SSIM takes the scales whose shorter side holds a window: 16, 8, 4 px.
    tall, args = torch.rand(1, 3, 48, 16), dict(mask=None, patch_size=8)
    loss = losses.pixel_loss("ms_ssim_l1", [tall.flip(3)], [tall], **args)
    close(loss, losses.ms_ssim_l1(tall.flip(3), tall, scales=3), 1e-7)


def test_d_loss_leaves_g_without_gradient():
    run, args = tiny_run("--loss", "ls_gan", "--pixel-weight", "0", "--adversarial-weight", "0")
    backward(run, tiny_batch(), False, args)
    assert gradients(run.mae).abs().max() == 0
    assert gradients(run.disc).abs().max() > 0


def test_perceptual_term_alone_reaches_the_first_encoder_block():
    batch = tiny_batch()
    for loss, arch in [(n, a) for n, a in ROWS if losses.LOSSES[n]["phi"]]:
        off = ["--pixel-weight", "0", "--adversarial-weight", "0", "--arch", arch]
        for kept in (["--delta-s", "0"], ["--delta-f", "0"]):  # the feature term, the style term
            run, args = tiny_run("--loss", loss, *off, *kept)
            backward(run, batch, True, args)
            assert run.mae.blocks[0].attn.qkv.weight.grad.abs().max() > 0, (loss, kept)
            assert run.mae.patch_embed.proj.weight.grad.abs().max() > 0, (loss, kept)
        run, args = tiny_run("--loss", loss, *off)
        odd = train.eq3_is_on(1, args)
        assert odd == (loss in ("dvae_p", "vgg_p")) and train.eq3_is_on(2, args)
        if not odd:  # nothing is left
            backward(run, batch, False, args)
            assert gradients(run.mae).abs().max() == 0


def test_perceptual_term_reaches_the_first_encoder_block_through_every_scale():
    images, noise, _ = tiny_batch()
    for loss in ("msg_gan_p", "stylegan2_ada_p"):
        run, _ = tiny_run("--loss", loss)
        fakes, _ = run.mae(images, 0.75, noise)
        assert len(fakes) == 4
        _, real = run.disc(losses.pyramid(images, 4))
        for scale in range(3):  # D has no block after the fourth entrance, which joins its head
            alone = [f if i == scale else f.detach() for i, f in enumerate(fakes)]
            _, fake = run.disc(alone)
            term = perceptual_loss(fake, real)
            weight = run.mae.blocks[0].attn.qkv.weight
            (gradient,) = torch.autograd.grad(term, weight, retain_graph=True)
            assert gradient.abs().max() > 0, (loss, scale)


def test_reconstructions_are_a_pyramid_finest_first():
    for size, patch, scales in ((224, 16, 5), (64, 8, 4), (32, 4, 3)):
        for arch in ("mae", "msg_mae"):
            mae = model.build_mae("tiny", size, patch, arch, scales)
            with torch.no_grad():
                fakes, _ = mae(torch.rand(1, 3, size, size))
            assert [f.shape[2] for f in fakes] == [size >> level for level in range(scales)]
        means = [p.mean((2, 3)) for p in losses.pyramid(torch.rand(1, 3, size, size), scales)]
        for level in means[1:]:
            close(level, means[0], 1e-5)  # averaging keeps the mean


def test_pixel_loss_averages_over_scales_that_hold_a_window():
    run, args = tiny_run("--loss", "ms_ssim", "--arch", "msg_mae", "--patch-size", "16")
    images, noise, _ = tiny_batch()
    fakes, mask = run.mae(images, mask_noise=noise[:, :4])  # 32 to 2 px: there no window fits
    reals = losses.pyramid(images, 5)
    pairs = list(zip(fakes, reals, (4, 3, 2, 1), strict=False))
    wanted = sum(losses.ms_ssim_l1(f, r, scales=n) for f, r, n in pairs) / 4
    assert_close(losses.pixel_loss("ms_ssim_l1", fakes, reals, mask, patch_size=16), wanted)
    args.pixel_scales = "finest"
    wanted = losses.ms_ssim_l1(fakes[0], reals[0])
    assert_close(backward(run, (images, noise[:, :4], None), False, args)["pixel"], wanted)


def test_skips_that_pass_the_decoder_half_alone_leave_a_plain_mae():
    torch.manual_seed(0)
    plain, skipping = model.build_mae("tiny", 32, 8), model.build_mae("tiny", 32, 8, "msg_mae")
    missing, unexpected = skipping.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("decoder_fuse.") for name in missing)
    images, noise, _ = tiny_batch(2)
    with torch.no_grad():
        (expected,), _ = plain(images, 0.75, noise)
        (with_skips,), _ = skipping(images, 0.75, noise)
        assert (with_skips - expected).abs().max() > 1e-3  # the skips do something
        for layer in skipping.decoder_fuse:
            layer.weight.copy_(torch.cat([torch.eye(128), torch.zeros(128, 128)], dim=1))
        close(skipping(images, 0.75, noise)[0][0], expected, 1e-5)


def test_skips_start_with_the_decoders_half_as_the_identity_and_the_encoders_as_xavier():
    torch.manual_seed(0)
    for layer in model.build_mae("tiny", 32, 8, "msg_mae").decoder_fuse:
        decoder, encoder = layer.weight.detach().split(128, dim=1)
        assert torch.equal(decoder, torch.eye(128)) and layer.bias.abs().max() == 0
        # Uniform within sqrt(6 / (256 + 128)), hence of deviation sqrt(2 / 384).
        assert encoder.abs().max() <= math.sqrt(6 / 384)
        assert abs(encoder.std().item() / math.sqrt(2 / 384) - 1) < 0.02


def test_skips_run_from_deep_to_shallow_and_cost_at_most_5_percent():
    with torch.device("meta"):  # counts without allocating
        plain = model.build_mae("base")
        skipping = model.build_mae("base", arch="msg_mae", scales=5)
    # Encoder levels of decoder blocks 2 to 8: from 11 (12 is the decoder's input) to 1.
    levels = skipping.skip_levels
    assert len(levels) == 7 and levels[0] == 11 and levels[-1] == 1
    assert all(a > b for a, b in zip(levels, levels[1:], strict=False))
    more, count = (sum(p.numel() for p in mae.parameters()) for mae in (skipping, plain))
    assert 1 < more / count <= 1.05  # PAPER: Table 4, +5 %
    encoder = {k for k in plain.state_dict() if "decoder" not in k}
    assert encoder <= set(skipping.state_dict())


def test_lazy_regularisers_reach_their_network_alone_and_in_their_turn():
    images, noise, seeds = tiny_batch()
    batch = [((images * 255).byte(), noise, seeds)]
    off = ["--pixel-weight", "0", "--adversarial-weight", "0", "--delta-f", "0", "--delta-s", "0"]
    run, args = tiny_run("--loss", "stylegan2_ada_p", *off, "--ada-p", "0.5")
    progress = train.new_progress()
    terms = train.regularise(run, images, noise, seeds, 1.0, progress, args)
    assert set(terms) == {"path_length"} and progress["path_mean"] > 0
    assert all(p.grad is None for p in run.disc.parameters())
    assert run.mae.blocks[0].attn.qkv.weight.grad.abs().max() > 0  # the encoder feels it, too
    for step, expected in ((1, set()), (4, {"path_length"})):
        progress["step"] = step
        assert set(train.regularise(run, images, noise, seeds, 1.0, progress, args)) == expected
    for arch in ("mae", "msg_mae"):  # a D that looks at one scale of several, too
        run, args = tiny_run("--loss", "ls_gan", "--arch", arch, *off, "--r1-gamma", "1")
        assert set(train.step_gradients(run, batch, False, train.new_progress(), args)) >= {"r1"}
        assert gradients(run.mae).abs().max() == 0


def test_lazy_terms_are_logged_with_their_whole_weight_and_survive_a_bad_step():
    images, noise, seeds = tiny_batch()
    run, args = tiny_run("--loss", "stylegan2_ada_p", "--ada-p", "0", "--r1-gamma", "3")
    progress = train.new_progress() | {"path_mean": torch.tensor(0.01)}
    terms = train.regularise(run, images, noise, seeds, 1.0, progress, args)
    reals = [x.requires_grad_() for x in losses.pyramid(images, 4)]  # 8 px patches: 4 scales
    slopes = torch.autograd.grad(run.disc(reals)[0].sum(), reals)
    squares = sum(g.square().sum((1, 2, 3)).mean() for g in slopes) / 4
    assert_close(terms["r1"], 3 / 2 * 16 * squares)
    args.path_every, other = 1, train.new_progress() | {"path_mean": torch.tensor(0.01)}
    once = train.regularise(run, images, noise, seeds, 1.0, other, args)["path_length"]
    assert_close(terms["path_length"], 4 * once)
    before = progress["path_mean"]  # a length that is not finite must not become the mean
    train.regularise(run, images * math.nan, noise, seeds, 1.0, progress, args)
    assert progress["path_mean"] == before > 0.01


def test_path_lengths_are_held_to_a_mean_that_starts_at_the_first_and_moves_by_a_hundredth():
    run, args = tiny_run("--loss", "stylegan2_ada_p", "--path-weight", "3", "--path-every", "2")
    lengths = torch.tensor([1.0, 3.0])  # of half of four images; their mean is 2
    fixed = mock.Mock(side_effect=lambda outputs, z, slopes: lengths + 0 * z.sum())
    with mock.patch.object(losses, "path_lengths", fixed):
        for before, mean in ((0.0, 2.0), (1.0, 1.01), (4.0, 3.98)):
            progress = train.new_progress() | {"path_mean": torch.tensor(before)}
            terms = train.regularise(run, *tiny_batch(), 1.0, progress, args)
            close(progress["path_mean"], mean, 1e-6)
            penalty = ((1 / mean - 1) ** 2 + (3 / mean - 1) ** 2) / 2
            close(terms["path_length"], 3 * 2 * penalty, 1e-5)


def test_gradient_scaler_changes_no_update():
    # float32 with a scaler must step exactly as without: every loss is scaled once, and only once.
    batch = tiny_batch()
    runs = [tiny_run("--loss", "stylegan2_ada_p") for _ in range(2)]
    scaled = runs[1][0]
    scaled.scaler_g = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled.scaler_d = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for run, args in runs:
        for optimizer in (run.opt_g, run.opt_d):  # plain steps: Adam would hide a wrong factor
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            name = "opt_g" if optimizer is run.opt_g else "opt_d"
            setattr(run, name, torch.optim.SGD(parameters, lr=1e-3))
        train.regularise(run, *batch, 1.0, train.new_progress(), args)
        backward(run, batch, True, args)
        train.update(run, apply=True)
    for name in ("mae", "disc"):
        a, b = (torch.cat([p.flatten() for p in getattr(r, name).parameters()]) for r, _ in runs)
        close(a, b, 1e-6)


def computed_in_float32(x):
    """Is x float32, and not merely what a bf16 product was cast to? Such values have 8 bits."""
    cut = (x - x.bfloat16().float()).abs() > 1e-4 * x.abs()  # what the other bits hold
    return x.dtype == torch.float32 and cut.float().mean() > 0.8


def test_pixels_and_logits_are_computed_in_float32_under_autocast():
    batch = tiny_batch(16)
    assert not computed_in_float32(batch[0].bfloat16().float()) and computed_in_float32(batch[0])
    for loss, arch in (("ls_gan", "mae"), ("msg_gan", "mae"), ("stylegan2_ada_p", "msg_mae")):
        run, _ = tiny_run("--loss", loss, "--arch", arch, "--amp", "bf16")
        with run.autocast():
            fakes, _ = run.mae(batch[0], 0.75, batch[1])
            logits, features = run.disc(fakes)
        assert len(fakes) == (1 if loss == "ls_gan" else 4) and logits.shape == (16,)
        assert features[0].dtype == torch.bfloat16  # it does act
        for x in (*map(model.imagenet_normalize, fakes), logits):  # as the heads gave them
            assert computed_in_float32(x), (loss, x.shape)
    for task in ("linear", "finetune"):
        run, _ = probe_run("--task", task, "--amp", "bf16")
        with run.autocast():
            assert run.network.encoder.blocks[0].mlp(torch.rand(1, 192)).dtype == torch.bfloat16
            assert computed_in_float32(run.network(batch[0])), task


def test_d_loss_computes_no_gradient_of_the_reconstructions():
    run, args = tiny_run("--loss", "msg_gan_p")
    seen = []
    run.disc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backward(run, tiny_batch(), True, args)
    fakes = seen[1]  # the images come first
    assert len(seen) == 2 and all(x.requires_grad and x.grad is None for x in fakes)
    assert gradients(run.disc).abs().max() > 0


def test_compiled_networks_give_the_losses_of_plain_ones():
    # aot_eager is inductor without its code generator, which takes minutes on two cores: the graphs
    # are cut, differentiated and passed through twice in the same way.
    small = dict(width=32, depth=2, heads=2, decoder_width=32, decoder_depth=2, decoder_heads=2)
    found, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    images, *rest = tiny_batch(2)  # path lengths: of one
    patched = mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend))
    for flags in ([], ["--compile"]):
        with mock.patch.dict(model.MAE_SIZES, tiny=small), patched:
            run, args = tiny_run("--loss", "msg_gan_p", "--lr", "1e-3", *flags)
            train.set_rate(run.opt_g, 1e-3), train.set_rate(run.opt_d, 1e-3)
            assert not graphs or len(graphs) == 1  # that of the trial
            for _ in range(2):
                batches = [((images * 255).byte(), *rest)]
                found.append(train.step_gradients(run, batches, True, train.new_progress(), args))
                train.update(run, apply=True)
    assert len(graphs) >= 3  # G's and D's, too
    for plain, compiled in zip(found[:2], found[2:], strict=True):
        assert plain.keys() == compiled.keys()
        for name, value in plain.items():
            close(compiled[name], value, 1e-4 * value.abs().item())


def test_every_row_learns_a_batch_by_heart():
    images = torch.stack([data.to_float(s[0]) for s in shapes_samples(4)])
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    for loss in losses.LOSSES:
        # Twenty steps show whether gradients work, not how the two players balance.
        flags = ["--loss", loss, "--lr", "1e-3", "--adversarial-weight", "0.1"]
        run, args = tiny_run(*flags, "--model", "nano")
        args.warmup_epochs = 0
        train.set_rate(run.opt_g, 1e-3)
        if run.disc is not None:
            train.set_rate(run.opt_d, args.d_lr)
        history = []
        for step in range(20):
            active = losses.LOSSES[loss]["phi"] is not None and step % 2 == 1
            terms = backward(run, (images, noise, torch.arange(4)), active, args)
            history.append(terms["pixel"].item())
            train.update(run, apply=True)
        assert np.mean(history[-3:]) < 0.75 * np.mean(history[:3]), (loss, history)


def test_adversarial_weight_is_the_rows_own_unless_given():
    weights = {"ls_gan": 1, "ls_gan_p": 1, "msg_gan": 0.1, "msg_gan_p": 0.1, "stylegan2_ada_p": 1}
    for loss, weight in weights.items():
        for flags, factor in (([], weight), (["--adversarial-weight", "0.7"], 0.7)):
            run, args = tiny_run("--loss", loss, *flags)
            term = backward(run, tiny_batch(), False, args)["adversarial"]
            args.adversarial_weight = 1.0
            whole = backward(run, tiny_batch(), False, args)["adversarial"]
            close(term, factor * whole, 1e-6)


def test_learning_rate_follows_the_schedule():
    rate = [train.learning_rate(p, warmup=4, total=12, peak=2.0) for p in range(13)]
    close(rate[:4], torch.tensor([0.5, 1.0, 1.5, 2.0]), 1e-12)
    # cosine from the peak at 4 over its half at 8 to nothing at 12
    close([rate[4], rate[8], rate[12]], torch.tensor([2.0, 1.0, 0.0]), 1e-6)
    close(rate[6], 1 + math.cos(math.pi / 4), 1e-6)
    # A warm-up of 2.5 steps never passes the peak: 1 / 2.5, 2 / 2.5, 1.
    short = [train.learning_rate(p, warmup=2.5, total=10, peak=1.0) for p in range(3)]
    close(short, torch.tensor([0.4, 0.8, 1.0]), 1e-6)
    # PAPER: batch 32 on 8 GPUs and 40 of 300 warm-up epochs give 1.5e-4
    args = train.parse_args(["--batch-size", "256"])
    assert math.isclose(args.lr, 1.5e-4) and args.warmup_epochs == 40
    for epochs, warmup in ((1600, 40), (30, 4)):  # PAPER: ViT-L's 1600 epochs have 40, too
        args = train.parse_args(["--epochs", str(epochs)])
        assert math.isclose(args.warmup_epochs, warmup)


def test_a_flag_that_a_row_does_not_look_at_is_named_and_one_at_its_default_is_not():
    other = (
        "alpha adversarial-weight delta-s feature-every dvae-weights vgg-weights ada-p path-weight"
    )
    values = dict(zip(other.split(), "0.5 0.5 1 1 phi.pkl phi.pth 0.5 1".split(), strict=True))
    for loss, looked_at in (
        ("mse", ""),
        ("ms_ssim", "alpha"),
        ("ls_gan", "adversarial-weight"),
        ("msg_gan_p", "adversarial-weight delta-s feature-every"),
        ("stylegan2_ada_p", "adversarial-weight delta-s feature-every ada-p path-weight"),
        ("dvae_p", "delta-s dvae-weights"),
        ("vgg_p", "delta-s vgg-weights"),
    ):
        flags = ["--loss", loss, "--delta-f", "0.05"]
        flags += [part for name, value in values.items() for part in (f"--{name}", value)]
        said = [name for name in values if name not in looked_at.split()]
        with mock.patch.object(train, "say") as say:
            train.parse_args(flags)
        lines = [f"--{flag} has no effect on --loss {loss}" for flag in said]
        assert [call.args[0] for call in say.call_args_list] == lines

    random = ["--checkpoint", "none"]
    for flags, said in (
        (["--task", "knn", "--lr", "1", "--k", "5", "--mixup", "0"], ["mixup", "lr"]),
        (["--task", "logistic", "--k", "5", "--crop-min", "1", "--seed", "1"], ["k", "crop-min"]),
        (["--task", "knn", "--resume", "off", "--save-steps", "2"], ["resume", "save-steps"]),
        (["--task", "linear", "--whiten", "--epochs", "5", "--k", "20"], ["whiten"]),
        (["--task", "finetune", "--lr", "1", "--mixup", "0"], []),
        (["--demo", "--k", "5", "--lr", "1"], ["lr"]),
        (["--task", "linear", "--eval", "--checkpoint", "x.pt", "--k", "5"], []),
    ):
        with mock.patch.object(train, "say") as say:
            task = finetune.parse_args([*random, *flags]).task
        lines = [f"--{flag} has no effect on --task {task}" for flag in said]
        assert [call.args[0] for call in say.call_args_list] == lines


def test_a_discriminator_at_rate_0_stays_as_drawn_while_g_learns_from_its_features():
    with scratch() as root:
        flags = [*FAST, "--loss", "msg_gan_p", "--limit-images", 8, "--adversarial-weight", 0]
        assert command(*flags, "--epochs", 2, "--d-lr", 0, "--out", root)[0] == 0
        kept = kept_in(root)
        assert kept["progress"]["step"] == 4 and log_of(root)[1]["feature"] > 0
        # The same seed draws the same D.
        run, _ = tiny_run("--loss", "msg_gan_p", "--model", "nano")
        drawn = run.disc.state_dict()
        assert all(torch.equal(v, drawn[k]) for k, v in kept["disc"].items())
        moved = (
            run.mae.state_dict()["blocks.0.mlp.fc1.weight"]
            != kept["mae"]["blocks.0.mlp.fc1.weight"]
        )
        assert moved.all()


def test_weight_decay_spares_norms_biases_and_tokens():
    mae = model.build_mae("tiny", 32, 8)
    decayed, spared = train.parameter_groups(mae.parameters(), 0.05)
    names = {id(p): name for name, p in mae.named_parameters()}
    for p in decayed["params"]:
        assert names[id(p)].endswith("weight") and "norm" not in names[id(p)]
    spared_names = {names[id(p)] for p in spared["params"]}
    assert {"cls_token", "mask_token", "norm.weight", "blocks.0.attn.qkv.bias"} <= spared_names
    assert spared["weight_decay"] == 0 and decayed["weight_decay"] == 0.05


def test_gpu_support_is_judged_by_machine_code_and_ptx():
    assert train.gpu_is_supported((7, 0), ["sm_70", "sm_80"])
    assert train.gpu_is_supported((8, 6), ["sm_80"])  # a later minor of the same major
    assert train.gpu_is_supported((12, 0), ["sm_80", "compute_90"])  # PTX compiles for later GPUs
    assert not train.gpu_is_supported((7, 0), ["sm_75", "sm_80", "sm_90a", "compute_120"])
    assert not train.gpu_is_supported((9, 0), ["sm_80"])
    assert train.gpu_is_supported((9, 0), ["gfx90a", "gfx1100"])  # AMD's


# ---- Data ----------------------------------------------------------------------------------------


def shapes_samples(count, size=32, epoch=1, seed=0):
    """The first training samples of `shapes`."""
    dataset = data.PretrainSet(
        data.Shapes("train", size), image_size=size, num_patches=16, seed=seed, limit=64
    )
    return [dataset[epoch, i] for i in range(count)]


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    state = torch.get_rng_state()
    first = shapes_samples(3)
    torch.rand(5)  # whatever others draw
    again = shapes_samples(3)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
    assert not torch.equal(first[0][0], first[1][0])
    for other in (shapes_samples(1, epoch=2), shapes_samples(1, seed=1)):
        assert not torch.equal(first[0][1], other[0][1]) and first[0][2] != other[0][2]
    torch.set_rng_state(state)
    shapes_samples(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is given back


def test_a_long_epoch_goes_round_few_images_with_draws_of_its_own():
    source = data.Shapes("train", 32)

    def keys_and_images(limit, length, epochs):
        common = dict(image_size=32, num_patches=16, seed=0, limit=limit, epoch_images=length)
        drawn, dataset = [], data.PretrainSet(source, augment=False, **common)
        for epoch in range(1, epochs + 1):
            drawn += [dataset[epoch, i] for i in range(len(dataset))]
        assert len(drawn) == epochs * (length or limit)
        return drawn

    def distinct(samples, part):
        return len({sample[part].numpy().tobytes() for sample in samples})

    long = keys_and_images(3, 10, 2)  # not augmented: equal images are equal pixels
    assert distinct(long, 0) == 3 and distinct(long, 1) == 20 == len({s[2] for s in long})
    counts = [sum(torch.equal(a[0], b[0]) for b in long) for a in long[:3]]
    assert sorted(counts) == [6, 7, 7]  # of 20 samples, over both epochs
    assert distinct(keys_and_images(6, 4, 3), 0) == 6  # shorter than the images: the rest is next
    for a, b in zip(keys_and_images(5, None, 2), keys_and_images(5, 5, 2), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_a_run_over_few_images_stopped_in_mid_epoch_continues_bit_for_bit():
    with scratch() as root:
        flags = [*FAST, "--limit-images", 3, "--epoch-images", 8, "--epochs", 2]
        assert command(*flags, "--out", root / "once")[0] == 0
        assert command(*flags, "--out", root / "twice", "--steps", 3)[0] == 0  # of 4
        twice = [*flags, "--out", root / "twice"]
        refused(*twice, "--epoch-images", 12, names=["8 images per epoch (now 12)"])
        refused(*twice, "--limit-images", 2, names=["--limit-images 3 (now 2)"])
        assert command(*twice)[0] == 0
        same_weights(root / "once", root / "twice")
        refused(*twice, "--epoch-images", 3, names=["3 training images per epoch", "the 4 of"])


def test_of_few_images_unreadable_ones_are_named_once_and_never_all():
    with scratch() as root:
        write_folder(root / "train", count=2)
        write_folder(root / "val", count=2)
        (root / "train" / "b" / "1.png").write_text("not an image")
        flags = [*FAST, "--data", root, "--out", root / "run", "--epoch-images", 40]
        status, errors = command(*flags, "--epochs", 2)
        assert status == 0 and errors.count("replaced by another") == 1 and "b/1.png" in errors, (
            errors
        )
        assert [row["bad_images"] for row in log_of(root / "run")] == [1, 1]
        for name in ("a/0.png", "a/1.png", "b/0.png"):
            (root / "train" / name).write_text("not an image")
        status, errors = command(*flags, "--epochs", 2, "--resume", "off")
        assert status == 2 and "4 of 4 images are unreadable" in errors.splitlines()[-1], errors


def test_sampler_deals_each_image_once_and_resumes_in_mid_epoch():
    def order(rank=0, world=1, start=0, epoch=1):
        sampler = data.EpochSampler(23, global_batch=4, seed=0, rank=rank, world=world)
        sampler.epoch, sampler.start = epoch, start
        assert len(sampler) == len(list(sampler))
        return list(sampler)

    whole = order()
    assert len(whole) == 20 == len(set(whole))  # 5 steps of 4; the incomplete one is left out
    assert sorted(i for _, i in whole) != [i for _, i in whole]
    assert order(start=3) == whole[12:]
    assert [i for _, i in order(epoch=2)] != [i for _, i in whole]
    # Two processes, two images each a step: step k holds the images of the single process's step k.
    halves = [order(rank=r, world=2) for r in range(2)]
    for k in range(5):
        both = halves[0][2 * k : 2 * k + 2] + halves[1][2 * k : 2 * k + 2]
        assert set(both) == set(whole[4 * k : 4 * k + 4])


def test_processes_of_a_node_share_its_cores_among_their_loaders():
    for cores, processes, workers in ((64, 8, 8), (16, 8, 2), (1, 2, 1), (64, 1, 8), (6, 1, 6)):
        usable = mock.patch.object(
            os, "sched_getaffinity", lambda _, n=cores: range(n), create=True
        )
        with usable, mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(processes)):
            assert data.default_workers() == workers, (cores, processes)


def test_shapes_are_balanced_deterministic_and_alike_at_every_size():
    small, large = data.Shapes("val", 32), data.Shapes("val", 64)
    assert len(small.classes) == 10 and np.bincount(small.targets).tolist() == [500] * 10
    for i in (0, 7, 123):
        assert small.scene(i) == large.scene(i)
        areas = sorted(((o.area, o.kind) for o in large.scene(i)), reverse=True)
        assert areas[0][1] == large[i][1]  # the label is the class of the largest...
        assert len(areas) == 1 or areas[0][0] > 2.5 * areas[1][0]  # ...which is clearly so
        halved = np.asarray(large[i][0], dtype=float).reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(halved - np.asarray(small[i][0])).mean() < 5  # of 255
        assert np.array_equal(np.asarray(large[i][0]), np.asarray(data.Shapes("val", 64)[i][0]))
    assert not np.array_equal(np.asarray(small[0][0]), np.asarray(data.Shapes("train", 32)[0][0]))


def test_large_shapes_are_one_nearly_upright_object_each_and_drawn_once():
    large = data.open_sources("shapes-large", image_size=32, seed=0)[1]
    for i in range(20):
        (drawn,) = large.scene(i)
        assert drawn.kind == large.targets[i] and abs(drawn.angle) <= 0.5
        assert math.pi * 0.26**2 <= drawn.area <= math.pi * 0.36**2
    first = large[3]
    assert large[3] is first and first[1] == 3
    pixels = np.asarray(data.LargeShapes("val", 32)[3][0])
    with mock.patch.object(data.LargeShapes, "memory", 2 * 3 * 32**2):  # of two pictures
        few = data.LargeShapes("val", 32)
        for index in (3, 4, 5, 3):
            assert np.array_equal(few[index][0], data.LargeShapes("val", 32)[index][0])
        assert list(few.kept) == [3, 4]
    assert np.array_equal(pixels, np.asarray(first[0]))  # a function of seed, split and index


def test_shape_outlines_cover_the_area_they_state():
    # An object in the middle, large enough: its antialiased mask sums to its area.
    for kind in range(10):
        drawn = data.Shapes("val", 64).scene(0)[0]._replace(kind=kind, x=0.5, y=0.5, radius=0.4)
        assert abs(data.coverage(drawn, 200).mean() / drawn.area - 1) < 0.01, kind


def picture_file(folder, name, image, **options):
    path = folder / name
    image.save(path, **options)
    return path


def test_every_kind_of_file_reads_as_upright_rgb():
    with scratch() as folder:

        def read(name, image, **options):
            path = picture_file(folder, name, image, **options)
            return np.asarray(data.to_rgb(Image.open(path))).astype(int)

        grey = Image.new("L", (4, 4), 100)
        assert (read("grey.png", grey) == 100).all()
        deep = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))  # 16 bits: 257 = 65535 / 255
        assert (read("deep.png", deep) == 100).all()
        dark = Image.fromarray(np.full((4, 4), 200, np.uint16))  # nearly black: 200 / 257 < 1
        assert (read("dark.png", dark) == 1).all()
        real = Image.fromarray(np.array([[0, 0.5], [0.2, 1]], np.float32))  # in [0, 1]
        assert read("real.tif", real)[:, :, 0].tolist() == [[0, 128], [51, 255]]
        whole = Image.fromarray(np.array([[0, 1]], np.int32))  # of 255: as dark as can be
        assert read("whole.tif", whole)[:, :, 0].tolist() == [[0, 1]]
        wide = Image.fromarray(np.full((4, 4), 100 * 257, np.int32))  # 16 bits kept in 32
        assert (read("wide.tif", wide) == 100).all()
        palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4)
        assert np.abs(read("palette.png", palette)[0, 0] - [10, 200, 30]).max() <= 2
        half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))  # red, but fully transparent: white
        assert (read("clear.png", half) == 255).all()
        cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
        assert np.abs(read("cmyk.jpg", cmyk, quality=95)[8, 8] - [255, 0, 0]).max() <= 6
        # Orientation 6: what is stored lies on its left side; the stored left column is the top.
        stored = np.zeros((4, 8, 3), np.uint8)
        stored[:, 0] = 255
        exif = Image.Exif()
        exif[data.EXIF_ORIENTATION] = 6
        for name in ("turned.png", "turned.tif"):
            turned = read(name, Image.fromarray(stored), exif=exif)
            assert turned.shape == (8, 4, 3), name
            assert (turned[0] == 255).all() and (turned[1:] == 0).all(), name
            opened = Image.open(folder / name)
            assert data.upright_size(opened) == (4, 8), name
            crop = np.asarray(data.resized_crop(opened, (0, 0, 4, 4), 4))  # the upper half
            assert (crop[0] == 255).all() and (crop[2:] == 0).all(), name


def test_crops_are_upright_and_large_jpegs_decode_at_a_reduced_scale():
    # A smooth picture, so that decoding at 1/4 scale and resizing agree.
    y, x = np.mgrid[:600, :800] / 800
    smooth = Image.fromarray((np.stack([x, y, 1 - x], 2) * 255).astype(np.uint8))
    box, size = (100, 50, 500, 450), 50
    with scratch() as folder:
        exif = Image.Exif()
        exif[data.EXIF_ORIENTATION] = 3  # stored upside down
        flat = picture_file(folder, "flat.jpg", smooth, quality=95)
        turned = smooth.transpose(Image.Transpose.ROTATE_180)
        turned = picture_file(folder, "turned.jpg", turned, quality=95, exif=exif)
        expected = smooth.crop(box).resize((size, size), Image.Resampling.BOX)
        for path in (flat, turned):
            crop = data.resized_crop(Image.open(path), box, size)
            error = np.abs(np.asarray(crop, dtype=int) - np.asarray(expected, dtype=int))
            assert error.mean() < 2, (path, error.mean())
        opened = Image.open(flat)
        data.resized_crop(opened, box, size)
        assert opened.size == (100, 75)  # 400 / 50 = 8: an eighth of 800 x 600


def write_folder(root, classes=("a", "b"), count=12, size=32):
    """A folder of class folders with small random PNGs."""
    rng = np.random.default_rng(0)
    for name in classes:
        (Path(root) / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(root) / name / f"{i}.png")


def test_folder_layouts_are_read_as_what_they_are():
    with scratch() as root:
        write_folder(root / "imagenet" / "train")
        write_folder(root / "imagenet" / "val", count=3)
        options = dict(image_size=32, seed=0, labelled=True)
        train_part, val_part = data.open_sources(str(root / "imagenet"), **options)
        assert (len(train_part), len(val_part), train_part.classes) == (24, 6, ["a", "b"])
        assert train_part.targets == [0] * 12 + [1] * 12

        # Class folders alone: 8 are held out, the same ones for the same seed, none in both.
        parts = data.open_sources(str(root / "imagenet" / "train"), **options)
        again = data.open_sources(str(root / "imagenet" / "train"), image_size=32, seed=0)
        assert [len(p) for p in parts] == [16, 8] and parts[1].files == again[1].files
        assert not set(parts[0].files) & set(parts[1].files)

        # Files that come or go leave the choice among the others as it is.
        deep = root / "imagenet" / "train" / "a" / "more"
        deep.mkdir()
        for i in range(3):
            Image.new("RGB", (32, 32)).save(deep / f"{i}.png")
        Path(parts[0].files[0]).unlink()
        now = data.open_sources(str(root / "imagenet" / "train"), image_size=32, seed=0)
        assert len(now[0]) + len(now[1]) == 26
        other = data.open_sources(str(root / "imagenet" / "train"), image_size=32, seed=1)
        assert other[1].files != now[1].files  # another seed holds out others
        assert {f for f in now[1].files if "more" not in f} <= set(parts[1].files)
        # Labelled tasks would not see what lies deeper, and hold out others.
        options["data"] = str(root / "imagenet" / "train")
        raises_value_error(lambda: data.open_sources(**options), says=f"{deep}/ holds images")
        for file in deep.iterdir():
            file.unlink()
        assert data.open_sources(**options)[1].files == parts[1].files

        assert len(parts[0].classes) == 2
        write_folder(root / "flat", classes=("",), count=20)
        flat = data.open_sources(str(root / "flat"), image_size=32, seed=0)
        assert [len(p) for p in flat] == [12, 8]

    # Of few, the 8 smallest hashes: for one that goes comes one that was trained on.
    few = data.Folder([f"photos/{i}.png" for i in range(100)], [0] * 100, ["photos"])
    rest, held_out = data.hold_out(few, "photos", 0)
    few.files.remove(held_out.files[3])
    now = data.hold_out(data.Folder(few.files, [0] * 99, ["photos"]), "photos", 0)[1].files
    assert len(now) == 8 and len(set(now) & set(rest.files)) == 1
    # Of many, about 1 %: of 4,000 the binomial's 40, within three of its deviations of 6.3.
    many = data.Folder([f"photos/{i}.png" for i in range(4000)], [0] * 4000, ["photos"])
    rest, held_out = data.hold_out(many, "photos", 0)
    assert 21 < len(held_out) < 59 and len(rest) == 4000 - len(held_out)


def test_pre_training_takes_folders_of_any_depth_and_labelled_tasks_do_not():
    with scratch() as root:
        write_folder(root / "site" / "day" / "a", classes=("x", "y"), count=6)
        write_folder(root / "site" / "b", classes=("",), count=5)
        Image.new("RGB", (32, 32)).save(root / "site" / "stray.png")
        (root / "site" / "__MACOSX").mkdir()
        (root / "site" / "loop").symlink_to(root / "site")
        parts = data.open_sources(str(root / "site"), image_size=32, seed=0)
        assert [len(p) for p in parts] == [10, 8] and parts[0].note == (
            f"{root / 'site'}: 18 images in 4 folders, 8 of them, a choice of seed 0, are held out "
            "for validation"
        )
        (root / "site" / "loop").unlink()

        def labelled(path):
            return data.open_sources(str(path), image_size=32, seed=0, labelled=True)

        raises_value_error(labelled, root / "site", says="holds both images and folders (stray.png")
        (root / "site" / "stray.png").unlink()
        raises_value_error(labelled, root / "site" / "day", says="are the classes in")
        write_folder(root / "own" / "train")
        (root / "own" / "train" / "0 empty").mkdir()
        part, _ = labelled(root / "own" / "train")
        assert part.classes == ["a", "b"] and part.note.endswith("without images: 0 empty")
        assert sorted(set(part.targets)) == [0, 1]
        (root / "own" / "test").mkdir()
        for name in ("validation", "valid", "val"):  # what comes last is the one to take
            write_folder(root / "own" / name, count=2)
            train_part, val_part = labelled(root / "own")
            assert len(train_part) == 24 and {f.split("/")[-3] for f in val_part.files} == {name}
        assert train_part.note.endswith(
            "4 for validation in val/; folders without images: 0 empty; "
            "not used: test, valid, validation"
        )
        Image.new("RGB", (32, 32)).save(root / "own" / "loose.png")
        assert labelled(root / "own")[0].note.endswith("not used: test, valid, validation, ...")
        for name in ("test", "valid", "validation"):
            shutil.rmtree(root / "own" / name)
        assert labelled(root / "own")[0].note.endswith("not used: loose.png")
        # What is called validation is never trained on.
        (root / "own" / "train").rename(root / "own" / "training")
        raises_value_error(labelled, root / "own", says="has val/, but no train/")
        raises_value_error(
            lambda: data.open_sources(str(root / "own"), image_size=32, seed=0), says="no train/"
        )


def test_bad_input_ends_in_one_line_with_status_2():
    with scratch() as root:
        fast = [*FAST, "--out", root / "run"]
        (root / "empty").mkdir()
        write_folder(root / "few", count=3)
        refused(*fast, "--data", root / "missing", names=["missing", "--data shapes"])
        refused(*fast, "--data", root / "empty", names=["empty", "no images"])
        refused(*fast, "--data", root / "few", names=["6 images", "hold out"])
        half = ["--loss", "msg_gan", "--image-size", 36, "--patch-size", 6]
        refused(*fast, *half, names=["3 scales", "6 px patches give 2", "power of two"])
        refused(*fast, "--image-size", 44, names=["image size 44", "patch size 8"])
        refused(*fast, "--patch-size", 64, names=["image size 32", "patch size 64"])
        refused(*fast, "--crop-min", 1.5, names=["--crop-min 1.5"])
        refused(*fast, "--ada-p", 1.5, names=["--ada-p 1.5"])
        refused(*fast, "--ada-target", 1.5, names=["--ada-target 1.5"])
        refused(*fast, "--alpha", 1.5, names=["--alpha 1.5"])
        for value in ("nan", "-1.5"):
            status, errors = command(*fast, "--ada-target", value)
            assert status == 2 and f"{value} is not a number of -1 or more" in errors, errors
        for flag in ("--init", "--data", "--out", "--resume"):  # a shell's variable is not set
            status, errors = command(*fast, flag, "")
            assert status == 2 and f"argument {flag}: it is empty" in errors, errors
        refused(*fast, "--loss", "ls_gan", "--norm-pix-loss", names=["--norm-pix-loss", "mse"])
        refused(*fast, "--loss", "ms_ssim", "--image-size", 16, names=["--image-size 16", "24"])
        scales = ["--loss", "msg_gan", "--image-size", 48, "--patch-size", 16]
        refused(*fast, *scales, names=["5 image scales", "[48, 24, 12, 6]", "smaller patches"])
        refused(*fast, "--limit-images", 3, names=["3 training images", "--batch-size"])
        refused(*fast, "--mask-ratio", 0.99, names=["--mask-ratio 0.99", "16 patches"])
        refused(*fast, "--amp", "fp16", names=["fp16", "GPU"])
        refused(*fast, "--out", "/dev/null/run", names=["/dev/null/run"])
        refused(*fast, "--resume", root / "none.pt", names=["none.pt", "does not exist"])
        assert not (root / "run").exists()  # nothing was begun
        here = os.getcwd()
        os.chdir(root)
        try:
            refused(names=["data/imagenet", "--data shapes", "--demo"])  # plain `python train.py`
        finally:
            os.chdir(here)


def test_unreadable_files_are_replaced_named_once_counted_and_limited():
    with scratch() as root:
        write_folder(root / "train", count=20)
        write_folder(root / "val", count=4)
        good = root / "train" / "a" / "0.png"
        good.write_bytes(good.read_bytes()[:200])  # truncated
        (root / "train" / "b" / "1.png").write_text("not an image")
        flags = [*FAST, "--data", root, "--out", root / "run", "--epochs", 2]
        status, errors = command(*flags)
        assert status == 0
        for name in ("a/0.png", "b/1.png"):
            assert errors.count(f"replaced by another: {root}/train/{name}") == 1, errors
        assert [row["bad_images"] for row in log_of(root / "run")] == [2, 2]
        (root / "train" / "b" / "1.png").write_bytes((root / "train" / "b" / "2.png").read_bytes())
        assert command(*flags, "--epochs", 3)[0] == 0  # repaired: it counts no longer
        assert log_of(root / "run")[2]["bad_images"] == 1
        for i in range(5, 16):  # 11 more: 13 of 40 are over the limit of 10
            (root / "train" / "a" / f"{i}.png").write_text("not an image")
        status, errors = command(*flags, "--resume", "off")
        assert status == 2 and "images are unreadable" in errors.splitlines()[-1], errors


def test_pictures_show_every_pixel_enlarged_by_a_whole_factor():
    images = torch.zeros(2, 3, 50, 50)
    images[1, 0, 10, 20] = 1  # one red pixel in the second row of pictures
    with scratch() as folder:
        data.save_picture(folder / "p.png", {"black": images * 0, "one pixel": images})
        pixels = np.asarray(Image.open(folder / "p.png")).astype(int)
    red = np.argwhere((pixels[:, :, 0] == 255) & (pixels[:, :, 1] == 0))
    assert len(red) == 16 and (red.max(0) - red.min(0)).tolist() == [3, 3]  # 4 x 4: zoom 200 / 50


def test_wide_pictures_are_halved_by_averaging_and_maps_keep_their_blocks():
    images = torch.zeros(1, 3, 224, 224)
    images[:, :, :, ::2] = 1  # stripes of one pixel: grey at half the size
    maps = torch.eye(14).expand(1, 3, 14, 14)
    with scratch() as folder:
        path = folder / "p.png"
        data.save_picture(path, {"image": images} | {str(n): maps for n in range(13)})
        pixels = np.asarray(Image.open(path)).astype(int)
    top = len(pixels) - 112
    assert pixels.shape[1] == 14 * 118 - 6
    assert set(pixels[top:, :112].flatten()) <= {127, 128}
    expected = np.kron(np.eye(14), np.ones((8, 8))) * 255
    assert (pixels[top:, 118:230, 0] == expected).all()


def test_curves_pass_through_their_values():
    rows = [{"epoch": 1, "a": 3.0}, {"epoch": 2, "a": 1.0, "b": 5.0}, {"epoch": 3, "a": 2.0}]
    with scratch() as folder:
        path = folder / "c.png"
        data.save_curves(path, rows, {"A": {"a": ""}, "none": {"c": ""}, "B": {"b": ""}})
        picture = Image.open(path).convert("RGB")
    assert picture.size == (900, 190)  # two panels have values: one row of three places
    colour = np.array([0x1F, 0x5F, 0xA8])
    blue = np.abs(np.asarray(picture).astype(int) - colour).sum(axis=2) < 30
    columns = [np.flatnonzero(blue[:, x]).mean() for x in (52, 167, 281)]  # the three epochs
    close(columns[0], 30.0, 2.0)  # the largest value: the top
    close(columns[1], 162.0, 2.0)  # the smallest: the bottom
    close(columns[2], 96.0, 2.0)  # half way
    assert blue[:, 600:].sum() == 0 and blue[:, 352:582].any()


# ---- Runs ----------------------------------------------------------------------------------------


def test_norm_pix_pictures_put_back_true_statistics():
    # A network that predicts each patch's normalised target perfectly shows the very image.
    run, args = tiny_run("--norm-pix-loss")
    images, noise, _ = tiny_batch(1)
    target = losses.patchify(model.imagenet_normalize(images), 8)
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    perfect = model.imagenet_denormalize(model.unpatchify(target, 8))
    run.mae.forward = lambda *_: ([perfect], torch.ones(1, 16))
    close(train.reconstruct(run, images, noise, args)[0], images, 1e-5)


def test_pictures_show_the_whole_reconstruction_where_all_of_it_was_trained():
    images, noise, _ = tiny_batch(2)
    images = (255 * images).byte()
    for flags, whole in ((["--loss", "mse"], False), (["--loss", "ms_ssim"], True)):
        with scratch() as root, mock.patch.object(data, "save_picture") as save:
            run, args = tiny_run(*flags, "--epochs", "1", "--out", str(root))
            progress = train.new_progress() | {"seconds": 1.0}
            train.finish_epoch(run, progress, 0.0, (images, noise, 0), args)
        columns = save.call_args[0][1]
        assert ("reconstruction" in columns) == whole and "pasted" in columns, list(columns)


def test_a_run_says_where_it_begins_how_it_goes_on_and_that_it_ends_below_mean_fill():
    flags = ["--limit-images", 8, "--epochs", 1, "--lr", 1e-9, "--out"]
    with scratch() as root, mock.patch.object(train, "say") as say:
        for more in (["--steps", 1], []):
            assert command(*FAST, *flags, root, *more)[0] == 0
    lines = [call.args[0] for call in say.call_args_list]
    expected = [
        "from the start: 8 training images of 32 x 32 px, 4 per step, 2 steps per epoch",
        "to continue, raise --steps",
    ]
    expected += [
        "from step 1: 8 training images",
        "try more than 2 steps, or another --lr than 1e-09",
    ]
    places = [next(i for i, line in enumerate(lines) if words in line) for words in expected]
    assert places == sorted(places), lines


def test_the_demo_says_in_words_what_it_reached():
    for psnr, words in ((19.0, "4.9 dB above the mean colour"), (13.5, "0.6 dB below the mean")):
        with scratch() as root, mock.patch.object(train, "say") as say:
            row = {"epoch": 5, "psnr": psnr, "psnr_mean_fill": 14.1, "ssim_pasted": 0.5}
            train.write_row(row, root)
            assert log_of(root) == [row]
            printed = f"epoch 5  psnr {psnr:.4g}  psnr_mean_fill 14.1"
            assert [call.args[0] for call in say.call_args_list] == [printed]
            train.explain_demo(root)
        text = say.call_args[0][0]
        assert words in text and "epoch_0005.png" in text, text


def test_validation_measures_hidden_pixels_alone():
    run, args = tiny_run()
    images = torch.full((2, 3, 32, 32), 102, dtype=torch.uint8)  # .4
    mask = torch.zeros(2, 16)
    mask[:, :4] = 1  # the first row of patches is hidden
    off = torch.full((2, 3, 32, 32), 0.9)
    off[:, :, :8] = 0.6  # .2 off where hidden: 13.979 dB
    run.mae.forward = lambda *_: ([off], mask)
    result = train.validate(run, images, torch.rand(2, 16), args)
    close(result["psnr"], -20 * math.log10(0.2), 1e-3)
    close(result["psnr_mean_fill"], 100.0, 1e-3)  # the visible mean is right: the ceiling


def test_a_run_logs_each_epoch_once_and_even_epochs_have_feature_terms():
    with scratch() as out:
        flags = [*FAST, "--loss", "ls_gan_p", "--limit-images", 8, "--out", out]
        assert command(*flags, "--epochs", 4, "--steps", 5, "--picture-every", 1)[0] == 0
        assert command(*flags, "--epochs", 4, "--save-every", 4)[0] == 0
        rows = log_of(out)
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
        assert [row["step"] for row in rows] == [2, 4, 6, 8]
        assert [row["eq3_on"] for row in rows] == [False, True, False, True]
        assert ["style" in row for row in rows] == [False, True, False, True]
        assert all(math.isfinite(row["psnr"]) for row in rows)
        fields = {"lr", "pixel", "adversarial", "d_accuracy_real", "images_per_second"}
        assert fields <= rows[0].keys()
        pictures = sorted(p.name for p in (out / "pictures").iterdir())
        drawn = [f"epoch_000{n}.png" for n in (1, 2, 4)]
        assert pictures == ["curves.png", *drawn, "stopped.png"]


def test_a_run_notes_its_steps_and_what_was_started():
    """steps.jsonl has a line a minute, arguments.jsonl one a start; logs end where it goes on."""
    with scratch() as out, mock.patch.object(train, "NOTE_SECONDS", 1e-9):
        flags = [*FAST, "--limit-images", 16, "--out", out, "--lr", 1e-3, "--warmup-epochs", 0]
        assert command(*flags, "--epochs", 2, "--save-steps", 4, "--steps", 6)[0] == 0
        rows = data.read_log(out / "steps.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        close(rows[0]["lr"], 1e-3, 1e-9)
        assert rows[3]["epoch"] == 1 and rows[4]["epoch"] == 2 and rows[0]["pixel"] > 0
        assert rows[0]["images_per_second"] > 0 and rows[5]["left"] == "0 s"
        assert (out / "pictures" / "stopped.png").exists()
        weights = torch.load(out / "checkpoint.pt", weights_only=True)
        assert command(*flags, "--epochs", 2)[0] == 0
        assert [row["step"] for row in data.read_log(out / "steps.jsonl")] == list(range(1, 9))
        first, second = data.read_log(out / "arguments.jsonl")
        assert first["arguments"]["steps"] == 6 and second["arguments"]["steps"] is None
        assert first["torch"] == torch.__version__ and first["device"] == "cpu"
        own = ["--epochs", 3, "--steps", 9, "--resume", out / "checkpoint.pt"]
        assert command(*flags, *own)[0] == 0 and not (out / "checkpoint.old.pt").exists()
        # What another run leaves behind is kept, and its lines are not.
        kept = (out / "checkpoint.pt").read_bytes()
        assert command(*flags, "--epochs", 1, "--resume", "off")[0] == 0
        assert (out / "checkpoint.old.pt").read_bytes() == kept
        assert [row["step"] for row in data.read_log(out / "steps.jsonl")] == [1, 2, 3, 4]
        assert len(log_of(out)) == 1 and weights["progress"]["step"] == 6
        assert len(data.read_log(out / "log.old.jsonl")) == 2
        assert len(data.read_log(out / "steps.old.jsonl")) == 9
        # The old one goes on: it stays, and its log is not continued by the other's lines.
        own = ["--epochs", 3, "--resume", out / "checkpoint.old.pt"]
        assert command(*flags, *own)[0] == 0
        assert (out / "checkpoint.old.pt").read_bytes() == kept
        assert (out / "checkpoint.old2.pt").exists()
        assert [row["epoch"] for row in log_of(out)] == [3]
        # Logs without a checkpoint, of a run that was killed early, are kept as well.
        (out / "checkpoint.pt").unlink()
        assert command(*flags, "--epochs", 1)[0] == 0
        assert [row["epoch"] for row in log_of(out)] == [1]
        assert [row["epoch"] for row in data.read_log(out / "log.old3.jsonl")] == [3]
        for name in ("log.jsonl", "steps.jsonl"):  # empty ones tell nothing
            (out / name).write_text("")
        (out / "checkpoint.pt").unlink()
        assert "kept" not in command_output(*flags, "--epochs", 1)
        left = command_output(*flags, "--epochs", 1, "--resume", out / "checkpoint.old.pt")
        assert f"{out}/checkpoint.old.pt has all its 1 epochs; raise --epochs\n" in left
    for given, said in (
        ({}, "the same command continues"),
        ({"steps": 3}, "to continue, raise --steps or leave it off"),
        ({"steps": 4, "resume": "off"}, "to continue, add --resume auto"),
    ):
        args = SimpleNamespace(**{"epochs": 2, "steps": None, "resume": "auto"} | given)
        assert train.ending({"epoch": 1, "step": 3}, args) == f"stopped at step 3; {said}"
    for name, epochs, expected in ((None, 60, [1, 2, 5, 10, 20, 50, 60]), (25, 60, [25, 50, 60])):
        args = SimpleNamespace(picture_every=name, epochs=epochs)
        assert [n for n in range(1, 61) if train.picture_is_due(n, args)] == expected
    for seconds, said in ((30, "15 s"), (1200, "10 min"), (36000, "5.0 h")):
        progress = {"step": 5, "seconds": seconds, "epoch_step": 10}
        args = SimpleNamespace(epochs=5, steps=10)
        assert train.time_left(progress, 20, args) == said, said


def test_every_row_stopped_in_mid_epoch_continues_bit_for_bit():
    for loss in losses.LOSSES:
        with scratch() as root:
            # Of two epochs of two steps; eq. 3 is on in both of the second, path lengths in one.
            flags = [*FAST, "--loss", loss, "--limit-images", 8, "--epochs", 2, "--path-every", 3]
            flags += loss_network_flags()
            assert command(*flags, "--out", root / "once")[0] == 0
            assert command(*flags, "--out", root / "twice", "--steps", 3)[0] == 0
            assert command(*flags, "--out", root / "twice")[0] == 0
            same_weights(root / "once", root / "twice")


def test_a_run_within_an_epoch_keeps_its_batch_and_steps_count_from_the_start():
    with scratch() as out:
        flags = [*FAST, "--limit-images", 16, "--epochs", 2, "--out", out]
        assert command(*flags, "--steps", 3)[0] == 0  # of 4
        names = ["4 images per step (now 8)", "epoch's end"]
        refused(*flags, "--batch-size", 8, names=names)
        refused(*flags, "--limit-images", 12, names=["--limit-images 16 (now 12)"])
        assert command(*flags, "--steps", 3)[0] == 0  # it has its 3 steps: nothing to do
        kept = kept_in(out)
        assert kept["progress"]["step"] == 3
        assert command(*flags, "--steps", 4, "--weight-decay", 0.1)[0] == 0  # to the epoch's end
        assert command(*flags, "--batch-size", 8)[0] == 0  # a new epoch may have another batch
        kept = kept_in(out)
        assert kept["progress"]["step"] == 4 + 2
        assert kept["opt_g"]["param_groups"][0]["weight_decay"] == 0.05  # what the flags said last


def test_a_save_that_falls_on_an_epochs_last_step_is_made_after_its_measurements():
    saved = []

    def record(path, run, progress, args):
        saved.append((progress["step"], progress["epoch"]))

    with scratch() as root, mock.patch.object(train, "save_checkpoint", record):
        flags = [*FAST, "--limit-images", 16, "--epochs", 3, "--out", root, "--save-steps", 4]
        assert command(*flags, "--save-every", 3)[0] == 0  # 4 steps per epoch
    assert saved == [(4, 2), (8, 3), (12, 4)]  # `progress` stands at the next epoch by then


def test_more_processes_than_validation_images_and_unreadable_ones():
    with scratch() as folder:
        write_folder(folder, count=20)
        source = data.scan_folder(str(folder))
        common = dict(image_size=32, num_patches=16, seed=0, augment=False, limit=3)
        dataset = data.PretrainSet(source, **common)
        parts = [train.read_validation_part(dataset, rank, 5) for rank in range(5)]
        assert [len(p[0]) for p in parts] == [1, 1, 1, 0, 0]
        Path(source.files[dataset.indices[1]]).write_text("not an image")
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            images, _, unreadable = train.read_validation_part(dataset, 0, 1)
        assert unreadable == 1 and errors.getvalue().count("replaced by another") == 1
        assert torch.equal(images[1], images[2])  # the next image stands in
        for i in (0, 2):
            Path(source.files[dataset.indices[i]]).write_text("not an image")
        black = SimpleNamespace(main=lambda _: train.read_validation_part(dataset, 0, 1))
        status, errors = command(script=black)
        assert status == 2 and "3 of 3 images are unreadable" in errors


def pixel_loss_not_finite_in(calls, then=lambda: None):
    """Patch of `losses.pixel_loss`: nan, after `then()`, in those calls of it, counted from 1."""
    real, number = losses.pixel_loss, itertools.count(1)

    def broken(*args, **options):
        value = real(*args, **options)
        if next(number) not in calls:
            return value
        then()
        return value * math.nan

    return mock.patch.object(losses, "pixel_loss", broken)


def test_nonfinite_losses_skip_updates_then_stop_with_the_checkpoint_untouched():
    with scratch() as out, pixel_loss_not_finite_in(range(4, 14)):  # 3 good steps, 10 bad ones
        flags = [*FAST, "--limit-images", 64, "--out", out, "--save-steps", 1, "--epochs", 1]
        refused(*flags, names=["10 non-finite losses in a row"])
        kept = kept_in(out)
        assert kept["progress"]["step"] == 3
        assert all(v.isfinite().all() for v in kept["mae"].values())


def test_fp16_whose_gradients_always_overflow_ends_after_30_skipped_updates():
    real = losses.pixel_loss

    def overflowing(*args, **options):  # the loss is finite, its gradient is not
        value = real(*args, **options)
        value.register_hook(lambda gradient: gradient * math.inf)
        return value

    def scaler(device, dtype):
        return torch.amp.GradScaler("cpu", init_scale=2.0**16)

    with scratch() as out, mock.patch.object(train, "scaler", scaler):
        flags = [*FAST, "--limit-images", 160, "--out", out, "--epochs", 1]
        with mock.patch.object(losses, "pixel_loss", overflowing):
            refused(*flags, names=["30 updates in a row", "scale_g", "--amp off"])
        assert command(*flags)[0] == 0
        assert log_of(out)[0]["scale_g"] == 2.0**16


def test_a_batch_that_is_not_finite_leaves_a_probes_statistics_alone():
    torch.manual_seed(0)
    layer = model.BatchStandardize(3)
    layer(torch.randn(8, 3))
    before = [x.clone() for x in layer.buffers()]
    for bad in (math.nan, math.inf):
        x = torch.randn(8, 3)
        x[2, 1] = bad
        layer(x)
        assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    layer(torch.randn(8, 3))
    assert not torch.equal(before[0], layer.running_mean)
    with scratch() as out:  # a checkpoint looks at what is not trained, too
        run, args = probe_run("--task", "linear")
        run.network.standardize.running_var[0] = math.inf
        saving = SimpleNamespace(
            main=lambda _: train.save_checkpoint(out / "c.pt", run, train.new_progress(), args)
        )
        status, errors = command(script=saving)
        assert status == 2 and "non-finite weights" in errors and not (out / "c.pt").exists()


def test_ctrl_c_that_ends_the_reader_of_the_output_too_still_saves():
    flags = [*FAST, "--limit-images", 8, "--epochs", 2]
    with scratch() as out, signal_in_step(train, 2):
        with mock.patch.object(os, "write", side_effect=BrokenPipeError):
            with mock.patch.object(train.tqdm, "write", side_effect=BrokenPipeError):
                assert command(*flags, "--out", out)[0] == 128 + signal.SIGTERM
        assert kept_in(out)["progress"]["step"] == 3


def test_a_folder_belongs_to_one_live_run_and_is_taken_over_from_a_dead_one():
    with scratch() as out:
        flags = [*FAST, "--limit-images", 4, "--out", out, "--epochs", 1]
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        lock = out / "lock.json"
        lock.write_text(json.dumps({"host": socket.gethostname(), "process": other.pid}))
        refused(*flags, names=["in use by process", str(other.pid), "--out", "delete"])
        other.communicate(b"\n")
        said = []
        with mock.patch.object(train, "say", said.append):
            assert command(*flags)[0] == 0
        assert any("taken over" in line and str(other.pid) in line for line in said)
        # On another host: by when the lock was last renewed.
        lock.write_text(json.dumps({"host": "elsewhere", "process": 1}))
        refused(*flags, "--epochs", 2, names=["process 1 on elsewhere"])
        os.utime(lock, (time.time() - 601,) * 2)
        assert command(*flags, "--epochs", 2)[0] == 0
        for torn in ("{", "{}", "[]"):
            lock.write_text(torn)
            with mock.patch.object(atexit, "register") as at_exit:
                assert command(*flags, "--epochs", 3, "--resume", "off")[0] == 0
        os.utime(lock, (0, 0))
        assert list(train.renewing([1, 2], out)) == [1, 2]  # a measurement's batches
        assert time.time() - lock.stat().st_mtime < 5
        # Of two that start at once, the second finds the lock as it makes its own.
        with mock.patch.object(Path, "exists", lambda path: False):
            refused(*flags, "--epochs", 4, names=["was taken by another run"])
        # A run that ends takes away its own lock alone.
        release = next(call.args[0] for call in at_exit.call_args_list if len(call.args) == 1)
        mine = lock.read_text()
        lock.write_text(json.dumps({"host": "elsewhere", "process": 1}))
        release()
        assert lock.exists()
        lock.write_text(mine)
        release()
        assert not lock.exists()


def test_tasks_of_srun_without_torchrun_are_refused():
    with mock.patch.dict(os.environ, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}):
        refused(*FAST, names=["srun", "2 times", "torchrun"])
    with mock.patch.dict(os.environ, {"SLURM_NTASKS": "2"}), scratch() as out:  # within sbatch
        assert command(*FAST, "--limit-images", 4, "--epochs", 1, "--out", out)[0] == 0


def test_a_run_goes_on_with_its_own_data_alone_however_that_is_spelt():
    with scratch() as root:
        for name in ("a", "b"):
            write_folder(root / name, count=8)
        flags = [*FAST, "--epochs", 2, "--val-images", 4, "--batch-size", 4, "--out", root / "run"]
        assert command(*flags, "--data", root / "a", "--steps", 1)[0] == 0
        refused(*flags, "--data", root / "b", names=["--data", "(now ", "--out"])
        refused(*flags, "--data", root / "a", "--limit-images", 4, names=["--limit-images None"])
        assert command(*flags, "--data", f"{root}/b/../a/")[0] == 0


def test_a_stop_signal_in_a_step_whose_loss_is_not_finite_still_saves():
    with scratch() as out, pixel_loss_not_finite_in([3], lambda: os.kill(os.getpid(), 15)):
        status, _ = command(*FAST, "--limit-images", 64, "--out", out, "--epochs", 1)
        progress = kept_in(out)["progress"]
    assert status == 128 + signal.SIGTERM
    assert (progress["step"], progress["counted"], progress["nonfinite"]) == (3, 2, 1)


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint_as_it_was():
    with scratch() as out:
        flags = [*FAST, "--limit-images", 4, "--out", out]
        assert command(*flags, "--epochs", 1)[0] == 0
        before = (out / "checkpoint.pt").read_bytes()
        # Of the log: what is kept of it when a run goes on, and the first line of a new one.
        for name, *more in (("checkpoint",), ("log",), ("log", "--resume", "off")):
            (out / f"{name}.tmp").symlink_to("/dev/full")
            written = "checkpoint.pt" if name == "checkpoint" else f"{out}"
            names = ["cannot write", written, "space"] + ["MB are free"] * (written[-3:] == ".pt")
            refused(*flags, "--epochs", 2, *more, names=names)
            last = out / ("checkpoint.old.pt" if more else "checkpoint.pt")
            assert last.read_bytes() == before
            assert not (out / "checkpoint.tmp").is_symlink()
            (out / f"{name}.tmp").unlink(missing_ok=True)


def test_a_run_that_goes_on_with_other_flags_says_which():
    with scratch() as root:
        flags = [*FAST, "--limit-images", 4, "--out", root / "run", "--epochs", 2]
        assert command(*flags, "--steps", 1)[0] == 0
        said = []
        with mock.patch.object(train, "say", said.append):
            assert command(*flags, "--lr", 0.25, "--steps", 1, "--resume", "auto")[0] == 0
            for _ in range(2):  # the second time nothing has changed
                assert command(*flags, "--lr", 0.25)[0] == 0
        told = [line for line in said if "was trained with" in line]
        assert len(told) == 2 and all("checkpoint.pt" in line for line in told), said
        assert "--lr" in told[0] and "(now 0.25)" in told[0] and "--steps" not in told[0]
        assert "--steps 1 (now None)" in told[1] and "--data" not in told[1]


def test_unfit_checkpoints_are_refused():
    with scratch() as root:
        flags = [*FAST, "--limit-images", 4, "--out", root / "run", "--epochs", 1]
        assert command(*flags)[0] == 0
        before = (root / "run" / "checkpoint.pt").read_bytes()
        refused(*flags, "--loss", "ls_gan", names=["--loss mse (now ls_gan)", "--out"])
        refused(
            *flags, "--model", "small", names=["with --model nano (now small)"]
        )  # the cause first
        refused(*flags, "--image-size", 64, names=["--image-size 32 (now 64)"])
        content = kept_in(root / "run")
        torch.save({k: v for k, v in content.items() if k != "opt_g"}, root / "part.pt")
        refused(*flags, "--resume", root / "part.pt", names=["part.pt lacks opt_g"])
        for name, content in {"text.pt": b"hello", "short.pt": before[:1000]}.items():
            (root / name).write_bytes(content)
            refused(*flags, "--resume", root / name, names=[name, "not a checkpoint"])
        assert (root / "run" / "checkpoint.pt").read_bytes() == before  # nothing was lost


def launch(*flags, **environment):
    """Start train.py, or this file, in another process."""
    return subprocess.Popen(
        [sys.executable, *map(str, flags)],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, workers included
    )


def in_two_processes(body, *args):
    """Start body(*args) as ranks 0 and 1 of one group -> a function that waits for both to succeed.

    They are copies of this process, which need not import torch anew: that takes seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)

    def run(rank):
        os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with contextlib.redirect_stdout(io.StringIO()):
            body(*args)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()

    def wait():
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]

    return wait


def commands_in_turn(*jobs):
    """In one process group, each job's (script, flags): a body for `in_two_processes`."""
    device = train.start_processes()
    with mock.patch.object(train, "start_processes", lambda: device):
        with mock.patch.object(train, "stop_processes"):
            for script, flags in jobs:
                assert not script.main([str(flag) for flag in flags])
    train.stop_processes()


def worker_of(launcher, *, after=0):
    """Process id of the train.py that a torchrun has started later than the process `after`."""
    while launcher.poll() is None:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                is_train = b"train.py" in (folder / "cmdline").read_bytes()
                if parent == launcher.pid and is_train and int(folder.name) != after:
                    return int(folder.name)
        time.sleep(0.01)
    raise AssertionError(launcher.stdout.read())


def test_a_run_killed_and_one_told_to_stop_are_restarted_and_end_like_one_never_stopped():
    with scratch() as folder:
        flags = ["train.py", *FAST, "--workers", 2]
        # The row with the most state: ADA's p, the running mean of path lengths.
        flags += ["--loss", "stylegan2_ada_p", "--ada-images", 500, "--ada-target=-0.9"]
        flags += ["--d-lr", 2.5e-3]  # D is soon sure of itself, so that p moves
        flags += ["--limit-images", 80, "--epochs", 2, "--save-steps", 7]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        broken = launch(*torchrun, "--max-restarts=2", *flags, "--out", folder / "twice")
        checkpoint = folder / "twice" / "checkpoint.pt"

        def step_beyond(step):
            while broken.poll() is None:
                if checkpoint.exists():
                    progress = kept_in(checkpoint.parent)["progress"]
                    if progress["step"] > step:
                        return progress
                time.sleep(0.01)
            raise AssertionError(broken.stdout.read())

        killed_at = step_beyond(0)
        first = worker_of(broken)
        os.kill(first, signal.SIGKILL)
        assert killed_at["epoch_step"] % 20 != 0, killed_at  # in mid-epoch
        # Its successor is told to stop: twice, and its loader's workers as well, as torchrun does.
        stopped_at = step_beyond(killed_at["step"])
        second = worker_of(broken, after=first)
        for _ in range(2):
            os.killpg(second, signal.SIGTERM)
            time.sleep(0.02)
        worker_of(broken, after=second)  # that was the end of it
        stopped_at = kept_in(checkpoint.parent)["progress"]
        printed, _ = broken.communicate()
        assert broken.returncode == 0, printed
        assert f"exitcode: {-signal.SIGKILL})" in printed, printed
        assert f"exitcode: {128 + signal.SIGTERM})" in printed, printed
        assert f"stopped at step {stopped_at['step']};" in printed, printed
        assert command(*flags[1:], "--out", folder / "once")[0] == 0
        same_weights(folder / "once", folder / "twice")
        rows = log_of(folder / "twice")
        assert [row["epoch"] for row in rows] == [1, 2]
        assert rows[1]["ada_p"] > 0  # so that its state mattered


def row_gradients(loss, arch, part, accum):
    """For `part` (a slice) of a batch: gradients of G and D in two steps; ADA's and path's state.

    Every regulariser acts in both steps. Plain SGD between them: Adam's first step is the sign of
    the gradient, which magnifies rounding.
    """
    flags = ["--r1-gamma", "0.1", "--r1-every", "1", "--path-every", "1", "--ada-images", "100"]
    run, args = tiny_run("--loss", loss, "--arch", arch, "--model", "nano", *flags)
    images, noise, seeds = (x[part] for x in tiny_batch(16))
    batches = zip(*(x.chunk(accum) for x in ((images * 255).byte(), noise, seeds)), strict=True)
    batches, results = [(*batch, []) for batch in batches], []
    run.opt_g = torch.optim.SGD(run.mae.parameters(), lr=1e-3)
    if run.disc is not None:
        run.opt_d = torch.optim.SGD(run.disc.parameters(), lr=1e-3)
    if run.ada is not None:
        run.ada.p = 0.5
    progress, active = train.new_progress(), losses.LOSSES[loss]["phi"] is not None
    for _ in range(2):  # in the second, DistributedDataParallel has rearranged its buckets
        terms = train.step_gradients(run, batches, active, progress, args)
        results += [gradients(n).clone() for n in (run.mae, run.disc) if n is not None]
        means, _ = train.agree(run, terms, batches, 0, progress, None)
        train.update(run, apply=True)
    state = [progress["path_mean"]] + [torch.tensor(means[name]) for name in sorted(means)]
    return results, state


def gloo_gradients(folder):
    """One process of the next test: this rank's half of the batch, for every row."""
    train.start_processes()
    rank, results = int(os.environ["RANK"]), []
    for loss, arch in ROWS:  # accumulated, too, where no statistic spans the batch
        accum = 1 if loss == "stylegan2_ada_p" else 2
        results.append(row_gradients(loss, arch, slice(rank, None, 2), accum))
    torch.save(results, f"{folder}/rank{rank}.pt")
    train.stop_processes()


def test_two_processes_give_the_gradients_of_one_for_every_row_in_two_steps():
    with scratch() as folder:
        in_two_processes(gloo_gradients, folder)()
        parts = [torch.load(f"{folder}/rank{r}.pt", weights_only=True) for r in range(2)]
    for row, first, second in zip(ROWS, *parts, strict=True):
        whole = row_gradients(*row, slice(None), 1)
        for k, tolerance in ((0, 2e-4), (1, 1e-5)):  # gradients; state
            for expected, a, b in zip(whole[k], first[k], second[k], strict=True):
                assert torch.equal(a, b), row  # the processes agree
                close(a, expected, tolerance * max(k, expected.abs().max().item()))


# ---- Weights in and out --------------------------------------------------------------------------


def as_hugging_face(weights, newer):
    """Weights of a plain `MAE` under the names of transformers' ViTMAE, of version 4 or newer."""
    inside = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    inside |= {"attn.proj": "attention.o_proj" if newer else "attention.output.dense"}
    inside |= {"mlp.fc1": "mlp.fc1" if newer else "intermediate.dense"}
    inside |= {"mlp.fc2": "mlp.fc2" if newer else "output.dense"}
    outside = {"pos_embed": "vit.embeddings.position_embeddings", "norm": "vit.layernorm"}
    outside |= {"cls_token": "vit.embeddings.cls_token"}
    outside |= {"patch_embed.proj": "vit.embeddings.patch_embeddings.projection"}
    encoder, theirs = "vit.layers" if newer else "vit.encoder.layer", {}
    for name, value in weights.items():
        stem, _, kind = (
            name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
        )
        end = f".{kind}" if kind else ""
        if "blocks." not in stem:
            theirs[outside.get(stem, f"decoder.{stem}") + end] = value
            continue
        part, number, layer = stem.split(".", 2)
        prefix = f"{encoder if part == 'blocks' else 'decoder.decoder_layers'}.{number}."
        if layer == "attn.qkv":
            for what, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                own = f"attention.{what[0]}_proj" if newer else f"attention.attention.{what}"
                theirs[prefix + own + end] = third
        else:
            theirs[prefix + inside[layer] + end] = value
    return theirs


def test_gradients_have_the_strides_of_their_parameters():
    # Where they have not, DDP warns on every start, and copies.
    run, args = tiny_run("--loss", "stylegan2_ada_p")
    images, *rest = tiny_batch(2)  # path lengths: of one
    batch = ((images * 255).byte(), *rest, [])
    train.step_gradients(run, [batch], True, train.new_progress(), args)  # path lengths, too
    for part in (run.mae, run.disc):
        assert all(p.grad.stride() == p.stride() for p in part.parameters() if p.requires_grad)


def test_networks_on_images_say_what_they_want_and_take_lists_of_scales():
    image = torch.rand(2, 3, 32, 32)
    ada = model.AdaAugment(fixed_p=1.0)
    discs = [model.build_discriminator(kind, 32, 1, 8, 16) for kind in ("conv", "msg", "stylegan2")]
    for network in (*discs, ada):
        raises_value_error(network, image, says="a list of images by scale")
    torch.manual_seed(4)
    drawn = ada([image])[0]
    torch.manual_seed(4)
    seeds = torch.randint(2**62, (2,))
    assert torch.equal(drawn, ada([image], *ada.sample(seeds, 32))[0]) and (drawn != image).any()
    torch.manual_seed(0)
    for phi in (model.VGGFeatures(), model.DVAEEncoder(width=8)):
        for p in phi.parameters():
            torch.nn.init.normal_(p, std=0.1)
        alone, listed = phi(image), phi([image, image[:, :, ::2, ::2]])
        assert all(map(torch.equal, alone, listed)) and len(alone) == 4


def test_weights_are_read_by_the_names_of_other_projects():
    torch.manual_seed(0)
    mae = model.build_mae("tiny", 32, 8)
    ours = mae.state_dict()
    theirs, newer = (as_hugging_face(ours, newer) for newer in (False, True))
    assert "vit.encoder.layer.5.output.dense.weight" in theirs
    assert "decoder.decoder_layers.0.attention.output.dense.bias" in theirs
    for names in (theirs, newer, ours):
        back, notes = model.from_others(names)
        assert model.misfits(mae, back) == "" and notes == []
        assert all(torch.equal(back[k], v) for k, v in ours.items())
    encoder = {k.removeprefix("vit."): v for k, v in theirs.items() if k.startswith("vit.")}
    back, _ = model.from_others(encoder)  # transformers' ViTMAEModel
    assert len(back) == 78 and torch.equal(back["norm.bias"], ours["norm.bias"])
    timm = {"head.weight": torch.zeros(5, 192), "fc_norm.weight": torch.ones(192), **ours}
    back, notes = model.from_others(timm)
    assert notes == ["left out head.weight"]
    assert "unexpected: fc_norm.weight" in model.misfits(mae, back)


def test_an_encoder_under_a_prefix_or_without_its_norm_is_taken_and_that_is_said():
    torch.manual_seed(0)
    mae = model.build_mae("tiny", 32, 8)
    ours = mae.state_dict()
    for prefix in ("module.", "model.", "encoder.", "backbone.", "model.backbone."):
        for names in (ours, as_hugging_face(ours, False)):
            wrapped = {prefix + k: v for k, v in names.items()} | {"criterion.w": torch.ones(1)}
            with scratch() as root:
                torch.save({"state_dict": wrapped, "epoch": 3}, root / "x.pt")  # as Lightning
                back, notes = model.read_weights(root / "x.pt")
            assert model.misfits(mae, back) == "" and torch.equal(
                back["norm.bias"], ours["norm.bias"]
            )
            assert notes == [f"names begin with {prefix}", "left out criterion.w"]
    two = {p + k: v for p in ("student.", "teacher.") for k, v in ours.items()}
    raises_value_error(model.from_others, two, says="2 encoders, under student., teacher.")
    # As fine-tuned MAEs are published: the mean of the tokens is normalised, by another norm.
    tuned = {k: v for k, v in ours.items() if k.startswith(model.ENCODER) and "norm." not in k[:5]}
    tuned |= {"fc_norm.weight": torch.full((192,), 3.0), "fc_norm.bias": torch.ones(192)}
    tuned |= {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    back, notes = model.from_others(tuned)
    assert (back["norm.weight"] == 1).all() and (back["norm.bias"] == 0).all()
    assert back.keys() == {k for k in ours if k.startswith(model.ENCODER)}
    assert "its norm is new" in notes[0] and "fc_norm.weight" in notes[1] and "head" in notes[1]


def test_a_photograph_is_read_as_its_upright_centre():
    columns = np.arange(60, dtype=np.uint8)[None, :, None].repeat(20, 0).repeat(3, 2)
    with scratch() as root:
        exif = Image.Exif()
        exif[data.EXIF_ORIENTATION] = 3  # upside down: the right comes first
        Image.fromarray(columns).save(root / "photo.png", exif=exif)
        found = data.read_photograph(root / "photo.png", 20)
    assert found.shape == (1, 3, 20, 20) and found.dtype == torch.float32
    close(found[0, 0, 7] * 255, torch.arange(39.0, 19, -1), 1e-4)


def test_networks_are_built_from_files_alone_with_the_sizes_of_their_weights():
    torch.manual_seed(3)
    images = torch.rand(2, 3, 32, 32)
    noise = torch.rand(2, 16)
    for arch, scales in (("mae", 1), ("msg_mae", 4)):
        mae = model.build_mae("nano", 32, 8, arch, scales)
        with scratch() as root:
            torch.save({"model": mae.state_dict()}, root / "x.pth")
            loaded, encoder = model.load_mae(root / "x.pth"), model.load_encoder(root / "x.pth")
            torch.save(encoder.state_dict(), root / "encoder.pth")
            raises_value_error(model.load_mae, root / "encoder.pth", says="an encoder alone")
        assert type(loaded) is type(mae) and not loaded.training and not encoder.training
        assert all(map(torch.equal, loaded(images, 0.75, noise)[0], mae(images, 0.75, noise)[0]))
        close(encoder(images), mae.encode(images)[0], 1e-6)
    raises_value_error(model.build_mae, "vit_b", says="'vit_b'; there are nano, tiny")
    assert model.build_mae("nano", 42, 14)(torch.rand(1, 3, 42, 42))[0][0].shape == (1, 3, 42, 42)
    with torch.device("meta"):  # ViT-H/14 as in timm, where positions are learnt
        huge = model.build_encoder("huge", 224, 14)
    assert (
        sum(p.numel() for p in huge.parameters()) == 630_764_800 - 257 * 1280
    )  # timm, whose positions are learnt


def test_other_weights_start_a_run_with_their_decoder_and_the_rest_is_new():
    torch.manual_seed(1)
    theirs = as_hugging_face(model.build_mae("tiny", 32, 8).state_dict(), newer=False)
    ours, _ = model.from_others(theirs)
    with scratch() as root:
        torch.save(theirs, root / "hf.pt")
        for flags in ([], ["--image-size", "48"], ["--loss", "msg_gan"]):
            run, args = tiny_run(*flags, "--init", str(root / "hf.pt"))
            train.initialise(run, args)
            assert torch.equal(run.mae.blocks[5].mlp.fc2.weight, ours["blocks.5.mlp.fc2.weight"])
            assert torch.equal(run.mae.decoder_pred.weight, ours["decoder_pred.weight"])
        # Of a network with parts of its own, its encoder alone.
        own = ours | {"projector.weight": torch.ones(2), "mask_token": torch.ones(1, 1, 192)}
        content = {"mae": own, "arguments": {}, "script": "another.py"}
        weights, notes = model.named_as_ours(content, "x", "y")
        assert set(weights) == {k for k in ours if not k.startswith(("decoder", "mask"))}
        assert notes == ["left out decoder_blocks, decoder_embed, decoder_norm and 4 more"]


def test_files_of_other_weights_are_refused_by_the_names_that_differ():
    with scratch() as root:
        save_autoencoder(root / "checkpoint.pt")
        ours, fast = kept_in(root)["mae"], [*FAST, "--model", "tiny", "--out", root / "run"]
        files = {
            "half": {k: v for k, v in ours.items() if not k.startswith("decoder_norm")},
            "more": ours | {"surplus": torch.zeros(1)},
            "list": [1, 2],
            # Numbers for names, and a scalar where a vector belongs.
            "odd": {1: torch.zeros(2), "fc.bias": torch.tensor(1.0)},
        }
        for name, content in files.items():
            torch.save(content, root / f"{name}.pt")
        for name, words in {
            "half": "missing: decoder_norm.weight",
            "more": "unexpected: surplus",
            "list": "not a file of ViT-MAE",
            "odd": "there is: 1, fc.bias",
            "no": "does not exist",
        }.items():
            refused(*fast, "--init", root / f"{name}.pt", names=[f"{name}.pt", words])
        save_autoencoder(root / "checkpoint.pt", "--model", "nano")  # of another size
        other = [*fast, "--init", root / "checkpoint.pt"]
        names = ["--model nano --patch-size 8", "this run of --model tiny --patch-size 8"]
        refused(*other, names=names)
        assert len(command(*other)[1]) < 1000
        odd = root / "odd.pt"
        dvae, vgg = (flag.split("=")[1] for flag in loss_network_flags())
        for loss, kind, other, misfit in (
            ("dvae_p", "dVAE", vgg, "blocks.input.w"),
            ("vgg_p", "VGG-16", dvae, "features.0"),
        ):
            flag = f"--{loss.removesuffix('_p')}-weights"
            refused(*fast, "--loss", loss, flag, odd, names=["odd.pt", kind])
            refused(*fast, "--loss", loss, flag, other, names=[kind, misfit])
        refused(*fast, "--loss", "dvae_p", names=["dvae_p", "--dvae-weights", "encoder.pkl"])


# ---- Fine-tuning ---------------------------------------------------------------------------------

PROBE = ["--batch-size", "4", "--workers", "0", "--data", "shapes", "--val-images", "9"]
RANDOM = ["--checkpoint", "none", "--model", "tiny", "--image-size", "32", "--patch-size", "8"]


def probe_run(*flags, classes=3):
    """A finetune.py run without data: (run, args)."""
    return opened_run([*RANDOM, "--out", "unused", *flags], classes)


def opened_run(flags, classes=3):
    """What finetune.py trains on a checkpoint: (run, args)."""
    weights, args = finetune.open_checkpoint(finetune.parse_args([str(f) for f in flags]))
    args.classes = list(range(classes))
    return finetune.build_classifier_run(args, weights, torch.device("cpu")), args


def labelled_batch(B=4, classes=3):
    """What a loader of `LabelledSet` gives: (images uint8 (B, 3, 32, 32), labels, seeds, bad)."""
    images = (tiny_batch(B)[0] * 255).byte()
    return images, torch.arange(B) % classes, torch.arange(B), []


def test_drop_path_drops_whole_branches_and_keeps_the_mean():
    x = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    dropped = model.drop_path(x, 0.25)
    assert all(len(row.unique()) == 1 for row in dropped)
    assert dropped.unique().tolist() == [0.0, torch.tensor(1 / 0.75).item()]
    close(dropped.mean(), 1.0, 0.03)  # standard error of the mean: .009
    run, _ = probe_run("--drop-path", 0.5)
    rates = [block.drop for block in run.network.encoder.blocks]
    close(rates, [0, 0.1, 0.2, 0.3, 0.4, 0.5], 1e-9)
    images = tiny_batch()[0]
    assert not torch.equal(run.network(images), run.network(images))
    run.network.eval()
    assert torch.equal(run.network(images), run.network(images))


def cubic(t, a=-0.75):
    """Keys' kernel of cubic convolution."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def test_resized_positions_equal_a_slow_cubic_convolution():
    positions = torch.randn(1, 1 + 16, 2)
    assert torch.equal(model.resize_positions(positions, 4), positions)
    resized = model.resize_positions(positions, 6)
    assert torch.equal(resized[:, 0], positions[:, 0])  # CLS has no place
    grid = positions[0, 1:].view(4, 4, 2)
    for i in range(6):
        for j in range(6):
            y, x = (i + 0.5) * 4 / 6 - 0.5, (j + 0.5) * 4 / 6 - 0.5
            value = 0
            for u in range(math.floor(y) - 1, math.floor(y) + 3):
                for v in range(math.floor(x) - 1, math.floor(x) + 3):
                    at = grid[min(max(u, 0), 3), min(max(v, 0), 3)]
                    value = value + cubic(y - u) * cubic(x - v) * at
            close(resized[0, 1 + 6 * i + j], value, 1e-5)


def test_a_learnt_position_of_cls_is_kept():
    encoder = model.ViT(image_size=16, patch_size=8, width=8, depth=1, heads=2)
    images = torch.rand(2, 3, 16, 16)
    weights = {k: v.clone() for k, v in encoder.state_dict().items()}
    weights["pos_embed"] = torch.randn(1, 5, 8)
    x = encoder.patch_embed(model.imagenet_normalize(images))
    x = torch.cat([weights["cls_token"].expand(2, -1, -1), x], 1) + weights["pos_embed"]
    expected = encoder.norm(encoder.blocks[0](x))
    encoder.load_state_dict(model.encoder_weights(weights, 2, "file"))
    close(encoder(images), expected, 1e-5)


def test_standardizing_equals_batch_norm_without_weights():
    ours = model.BatchStandardize(5)
    reference = torch.nn.BatchNorm1d(5, affine=False, eps=1e-6)
    for _ in range(3):
        x = torch.randn(7, 5) * 3 + 10
        close(ours(x), reference(x), 1e-5)
    close(ours.running_mean, reference.running_mean, 1e-5)
    close(ours.running_var, reference.running_var, 1e-5)
    x = torch.randn(2, 5)
    close(ours.eval()(x), reference.eval()(x), 1e-5)


def test_a_probe_trains_its_head_alone():
    run, args = probe_run("--task", "linear", "--lr", "0.1")
    run.network.train()
    assert not run.network.encoder.training and run.network.standardize.training
    before = {k: v.clone() for k, v in run.network.state_dict().items()}
    features = run.network.features(tiny_batch()[0])
    assert not features.requires_grad
    train.set_rate(run.opt, 0.1)
    finetune.step_gradients(run, [labelled_batch()], train.new_progress(), args)
    assert all(p.grad is None for p in run.network.encoder.parameters())
    finetune.update(run, apply=True)
    changed = {k for k, v in run.network.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {"standardize.running_mean", "standardize.running_var"}
    assert changed == statistics | {"head.weight", "head.bias"}
    flags = ["--task", "linear", "--data", "shapes", "--batch-size", 1]
    tune_refused(*RANDOM, *flags, names=["--batch-size 1", "normalisation"])


def test_a_run_may_go_on_with_mixup_and_cutmix_turned_on():
    with scratch() as folder:
        flags = [*RANDOM, *PROBE, "--task", "finetune", "--limit-images", 16, "--out", folder]
        off = ["--mixup", 0, "--cutmix", 0]
        assert tune(*flags, *off, "--epochs", 1)[0] == 0
        assert tune(*flags, "--epochs", 2) == (0, "")


def test_pooling_takes_cls_or_the_mean_patch():
    images = tiny_batch()[0]
    for pool in ("cls", "mean"):
        network = probe_run("--pool", pool)[0].network.eval()
        tokens = network.encoder(images)
        expected = tokens[:, 0] if pool == "cls" else sum(tokens[:, i] for i in range(1, 17)) / 16
        close(network.features(images), expected, 1e-5)


def test_label_smoothing_equals_hand_value():
    # softmax(ln 2, 0, 0) = (1/2, 1/4, 1/4); target .9 + .1/3, .1/3, .1/3
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    expected = (0.9 + 0.1 / 3) * math.log(2) + 2 * 0.1 / 3 * math.log(4)
    close(finetune.classification_loss(logits, torch.tensor([0]), 0.1), expected, 1e-6)
    halves = torch.tensor([[0.5, 0.5, 0.0]])  # probabilities are smoothed alike
    expected = (0.45 + 0.1 / 3) * (math.log(2) + math.log(4)) + 0.1 / 3 * math.log(4)
    close(finetune.classification_loss(logits, halves, 0.1), expected, 1e-6)


def test_mixed_targets_have_the_share_of_their_pixels():
    # Sample i is painted in the colour i, so that its pixels tell which images it is made of.
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32).clone()
    for flags in (["--cutmix", 0], ["--mixup", 0], []):
        run, _ = probe_run("--task", "finetune", *flags, classes=4)
        for seed in range(5):
            torch.manual_seed(seed)
            mixed, targets = run.mix(images, torch.arange(4))
            close(targets.sum(1), torch.ones(4), 1e-6)
            close(mixed.mean((1, 2, 3)), targets @ torch.arange(4.0), 1e-4)
            blended = len(mixed[1, 0].unique()) == 1  # one colour: mixup; two: a pasted box
            assert not flags or blended == (flags[0] == "--cutmix") or targets.max() > 0.999
    assert probe_run("--task", "linear")[0].mix is None


def test_layer_decay_halves_the_rate_from_layer_to_layer():
    run, args = probe_run("--layer-decay", 0.5, "--lr", 1.0, "--warmup-epochs", 0)
    train.set_rate(run.opt, args.lr)
    found = {}
    for group in run.opt.param_groups:
        for p in group["params"]:
            assert p not in found
            found[p] = (group["lr"], group["weight_decay"])
    for name, p in run.network.named_parameters():
        if name.startswith(("head", "encoder.norm")):
            rate = 1.0
        elif "blocks" in name:
            rate = 0.5 ** (6 - int(name.split(".")[2]))  # block 5, the last: 1/2
        else:
            rate = 0.5**7
        decay = 0.05 if "weight" in name and "norm" not in name else 0.0
        assert found.pop(p) == (rate, decay), name
    assert not found
    assert len(probe_run("--layer-decay", 1)[0].opt.param_groups) == 2


def test_rand_augment_draws_magnitudes_around_nine_tenths_for_half_of_the_operations():
    drawn = []

    def record(num_ops, magnitude, **_):
        drawn.append(magnitude)
        return lambda image: image

    torch.manual_seed(0)
    with mock.patch.object(data.v2, "RandAugment", record):
        for _ in range(2000):
            data.rand_augment(None, magnitude=6)
    assert abs(len(drawn) / 2000 - 1) < 0.1  # two operations, each half of the time
    assert abs(np.mean(drawn) - 18) < 0.2 and abs(np.std(drawn) - 1.5) < 0.15  # in 30 steps
    image = Image.new("RGB", (8, 8), "red")
    assert data.rand_augment(image, magnitude=0) is image


def test_subsets_are_balanced_seeded_and_refused_where_a_class_is_too_small():
    targets = [0] * 100 + [1] * 50 + [2] * 4
    tenth = data.choose_images(targets, seed=0, fraction=0.1)
    assert np.bincount([targets[i] for i in tenth]).tolist() == [10, 5, 1]  # .4 is at least one
    shots = data.choose_images(targets, seed=0, shots=3)
    assert np.bincount([targets[i] for i in shots]).tolist() == [3, 3, 3]
    assert len(set(shots.tolist())) == 9
    assert torch.equal(shots, data.choose_images(targets, seed=0, shots=3))
    assert not torch.equal(shots, data.choose_images(targets, seed=1, shots=3))
    five = functools.partial(data.choose_images, targets, seed=0, shots=5)
    raises_value_error(five, says="class number 2 has 4 images, not 5")


def test_labelled_samples_are_functions_of_seed_epoch_and_index_and_centre_crops():
    source = data.Shapes("train", 64)
    dataset = data.LabelledSet(source, [5, 17, 3], image_size=32, seed=0, magnitude=9)
    a, b = dataset[1, 1], dataset[1, 1]
    assert torch.equal(a[0], b[0]) and a[1].item() == source.targets[17] == 7
    assert not torch.equal(a[0], dataset[2, 1][0])
    # Measured: the central 7/8 of 64 px, or all of 32 px.
    for size, kept in ((64, 56), (32, 32)):
        source = data.Shapes("val", size)
        measured = data.LabelledSet(source, [4], image_size=32, seed=0, augment=False)
        image, label, _, bad = measured[0, 0]
        low, cubic = (size - kept) / 2, Image.Resampling.BICUBIC
        expected = source[4][0].resize((32, 32), cubic, [low, low, low + kept, low + kept])
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))
        assert label.item() == 4 and not bad


def test_top_1_and_top_5_equal_hand_counts():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]] * 5)
    labels = torch.tensor([0, 4, 5, -1, 0])  # first, fifth, sixth, not counted, first
    counts = {k: int(v) for k, v in finetune.count_correct(scores, labels).items()}
    assert counts == {"top1": 2, "top5": 3, "images": 4}
    assert finetune.as_row(counts, 6) == {"top1": 50.0, "top5": 75.0, "val_images": 4}
    assert "top5" not in finetune.as_row(counts, 5)  # it could not be wrong
    few = finetune.count_correct(scores[:, :3], torch.tensor([2, 1, 0, 0, 0]))
    assert (int(few["top1"]), int(few["top5"])) == (3, 5)


def test_knn_votes_equal_a_slow_loop():
    torch.manual_seed(0)
    queries, bank = (F.normalize(torch.randn(n, 4), dim=1) for n in (3, 20))
    labels = torch.randint(0, 3, (20,))
    scores = finetune.knn_scores(queries, bank, labels, classes=3, k=5, temperature=0.1)
    for q in range(3):
        nearest = sorted(range(20), key=lambda i: -float(queries[q] @ bank[i]))[:5]
        votes, most = [0.0] * 3, float(queries[q] @ bank[nearest[0]])
        for i in nearest:
            votes[labels[i]] += math.exp((float(queries[q] @ bank[i]) - most) / 0.1)
        votes = torch.tensor(votes)
        close(scores[q][votes > 0], votes[votes > 0], 1e-5)
        assert (scores[q][votes == 0] == -math.inf).all()
    few = finetune.knn_scores(queries, bank[:2], labels[:2], classes=3, k=5, temperature=0.1)
    assert few.shape == (3, 3)  # fewer images than k: all of them vote
    # The nearest alone votes, however small the temperature; other classes are no guesses at all.
    one = finetune.knn_scores(queries, bank, labels, classes=3, k=1, temperature=1e-4)
    nearest = labels[(queries @ bank.T).argmax(dim=1)]
    right = finetune.count_correct(one, nearest)
    wrong = finetune.count_correct(one, (nearest + 1) % 3)
    assert [int(right[k]) for k in ("top1", "top5")] == [3, 3]
    assert [int(wrong[k]) for k in ("top1", "top5")] == [0, 0]


def test_whitened_features_have_unit_covariance_whatever_their_scales():
    torch.manual_seed(0)
    mix = torch.tensor([[4.0, 1, 0], [0, 1, 0.5], [0, 0, 0.3]])
    bank, queries = torch.randn(50, 3) @ mix + 5, torch.randn(4, 3) @ mix + 5
    white, others = finetune.whiten(bank, queries)
    mean = white.mean(dim=0)
    close((white - mean).T @ (white - mean) / 49, torch.eye(3), 1e-3)
    close(mean, torch.zeros(3), 1e-4)
    # Distances between whitened vectors are Mahalanobis distances of the others.
    gap, inverse = (queries[0] - queries[1]).double(), torch.linalg.inv(torch.cov(bank.double().T))
    close((others[0] - others[1]).square().sum(), (gap @ inverse @ gap).float(), 1e-2)


def features_like_a_vits(n, classes=10, width=192):
    """(float32 (n, width), labels (n,)): correlated, of variances from .01 to 100, far from 0."""
    torch.manual_seed(0)
    labels, turn = torch.randint(0, classes, (n,)), torch.linalg.qr(torch.randn(width, width)).Q
    x = torch.randn(n, width) + 0.2 * torch.randn(classes, width)[labels]
    x = x * torch.logspace(0, -3, width) @ turn * torch.logspace(-0.5, 1.5, width)
    return x + 5 * torch.randn(width), labels


def test_logistic_regression_ends_where_its_gradient_is_zero():
    x, labels = features_like_a_vits(1000)
    penalties = [1.0, 1e-2, 1e-4, 1e-6]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        heads = finetune.fit_logistic(x, labels, classes=10, penalties=penalties)
    assert out.getvalue() == ""  # it says so if it stops early
    raw = x.double().numpy()
    own, truth = (raw - raw.mean(0)) / np.sqrt(raw.var(0) + 1e-6), np.eye(10)[labels]
    for penalty, (weight, bias) in zip(penalties, heads, strict=True):
        assert weight.dtype == torch.float64
        logits = raw @ weight.numpy().T + bias.numpy()  # of features as they are
        odds = np.exp(logits - logits.max(1, keepdims=True))
        error = (odds / odds.sum(1, keepdims=True) - truth) / len(raw)
        to_weight = error.T @ own + penalty * weight.numpy() * np.sqrt(raw.var(0) + 1e-6)
        to_bias = error.sum(0)
        assert np.abs(to_weight).max() < 1e-6 and np.abs(to_bias).max() < 1e-6, penalty
        # The objective bends by at least `penalty` along W: this bounds what is left to gain.
        assert (to_weight**2).sum() / 2 / penalty < 1e-5, penalty
    again = finetune.fit_logistic(x, labels, classes=10, penalties=penalties)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(heads, again, strict=True))
    [alone] = finetune.fit_logistic(x, labels, classes=10, penalties=penalties[2:3])
    close(alone[0], heads[2][0], 1e-3)  # where it starts does not matter
    with mock.patch.object(finetune, "ITERATIONS", 5), contextlib.redirect_stdout(out):
        finetune.fit_logistic(x, labels, classes=10, penalties=[1e-4])
    assert out.getvalue().count("\n") == 1 and "minimum in 5 iterations" in out.getvalue()
    assert "penalty 0.0001" in out.getvalue()


def test_logistic_regression_does_not_depend_on_the_scales_of_features():
    x, labels = features_like_a_vits(10, classes=2, width=4)  # so few: each deviation tells
    a, b = (
        finetune.logistic_scores({"cls": f(x)}, {"cls": f(x)}, labels, classes=2, seed=0)[0]
        for f in (lambda x: x, lambda x: 100 * x.double() - 7)
    )
    close(a, b, 1e-2)  # but for the 1e-6 that is added to variances
    [(weight, bias)] = finetune.fit_logistic(x, labels, classes=2, penalties=[0.1])
    standard = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    assert_close(standard.square().mean(dim=0), torch.ones(4))
    [(plain, shift)] = finetune.fit_logistic(standard, labels, classes=2, penalties=[0.1])
    close(F.linear(x.double(), weight, bias), F.linear(standard.double(), plain, shift), 1e-2)


def test_folds_are_disjoint_cover_all_and_share_out_each_class():
    labels = torch.tensor([0] * 23 + [1] * 2 + [2] * 7 + [4] * 11)[torch.randperm(43)]
    folds = finetune.folds_of(labels, seed=0)
    assert len(folds) == 5 and sorted(torch.cat(folds).tolist()) == list(range(43))
    for fold in folds:
        assert len(fold) in (8, 9)
        counts = labels[fold].bincount(minlength=5)
        assert counts[0] in (4, 5) and counts[1] < 2 and counts[2] in (1, 2)
    same, other = (finetune.folds_of(labels, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(folds, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(folds, other, strict=True))
    # An image alone in its class is never held out; fewer images than folds make fewer.
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        folds = finetune.folds_of(torch.tensor([3, 1, 3, 0, 3]), seed=0)
    assert sorted(fold.tolist() for fold in folds) == [[0], [2], [4]]
    assert "single training image: 2;" in out.getvalue()
    flags = [*RANDOM, *PROBE, "--task", "logistic"]
    with scratch() as root:
        names = ["no class has two training images (10 in all)"]
        tune_refused(*flags, "--shots", 1, "--out", root, names=names)
        with mock.patch.object(finetune, "PENALTIES", [0.1, 0.01]):
            assert tune(*flags, "--shots", 2, "--out", root)[0] == 0


def test_logistic_regression_takes_the_penalty_that_suits_held_out_images():
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    x = torch.randn(400, 200)  # one coordinate tells something, 199 are noise to be held down
    x[:, 0] += 2 * labels
    queries, truth = torch.randn(2000, 200), torch.arange(2000) % 2
    queries[:, 0] += 2 * truth
    about, scores = {}, None

    def choose(penalties):
        nonlocal about, scores
        out, given = io.StringIO(), ({"cls": queries}, {"cls": x}, 2 * labels)  # 1, 3: absent
        with mock.patch.object(finetune, "PENALTIES", penalties), contextlib.redirect_stdout(out):
            scores, about = finetune.logistic_scores(*given, classes=4, seed=0)
        return out.getvalue()

    assert choose([10.0, 1.0, 0.1, 0.01, 1e-5]) == ""
    assert (scores[:, 1::2] == -math.inf).all() and scores[:, ::2].isfinite().all()
    right = {}  # fold by fold, penalty by penalty, each fit from its start
    for penalty in (10.0, 1.0, 0.1, 0.01, 1e-5):
        hits = 0
        for fold in finetune.folds_of(labels, seed=0):
            rest = sorted(set(range(400)) - set(fold.tolist()))
            [head] = finetune.fit_logistic(x[rest], labels[rest], classes=2, penalties=[penalty])
            hits += int((F.linear(x[fold].double(), *head).argmax(1) == labels[fold]).sum())
        right[penalty] = hits
    best = max(right, key=lambda penalty: (right[penalty], penalty))
    assert about == {"pool": "cls", "penalty": best, "held_out_top1": right[best] / 4}, right
    chosen = (scores[:, ::2].argmax(dim=1) == truth).float().mean()
    [loose] = finetune.fit_logistic(x, labels, classes=2, penalties=[1e-5])
    assert chosen > (F.linear(queries.double(), *loose).argmax(dim=1) == truth).float().mean()
    [head] = finetune.fit_logistic(x, labels, classes=2, penalties=[best])  # to all images
    close(scores[:, ::2].float(), F.linear(queries.double(), *head).float(), 1e-3)
    # The end of the grid is named; among equals the strongest is taken.
    said = choose([best, best / 1e3])
    assert said.count("\n") == 1 and f"penalty {best:g}, an end of " in said, said
    x, queries = (10 * v[:, :1] + 1e3 * c[:, None] for v, c in ((x, labels), (queries, truth)))
    choose([1.0, 0.1, 0.01])
    assert about == {"pool": "cls", "penalty": 1.0, "held_out_top1": 100}


def write_results(folder, **logs):
    """FOLDER/TASK/log.jsonl, or FOLDER/log.jsonl for `own`, whose last row is `logs[task]`."""
    for task, row in logs.items():
        log = folder / task / "log.jsonl" if task != "own" else folder / "log.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps({"top1": -1.0, "psnr": -1.0}) + "\n" + json.dumps(row) + "\n")


@mock.patch.object(finetune, "PENALTIES", [1.0, 0.1])
def test_logistic_regression_takes_the_token_that_suits_held_out_images():
    labels = torch.arange(200) % 2
    noise = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    for better in ("cls", "mean"):

        def extract(run, dataset, args, better=better):
            told = noise + 4 * labels[:, None]  # one token tells the class, the other nothing
            parts = [told if pool == better else noise for pool in finetune.pools_of(args)]
            return torch.cat(parts, dim=1), labels, torch.arange(200)

        rows = {}
        for pool in ("cls", "mean", "auto"):
            args = SimpleNamespace(task="logistic", pool=pool, classes=["a", "b"], seed=0)
            with mock.patch.object(finetune, "extract", extract):
                rows[pool] = finetune.measure_features(None, None, None, args)
        assert rows["auto"] == rows[better] and rows["auto"]["pool"] == better
        assert rows["auto"]["held_out_top1"] == 100
        assert rows["auto"]["penalty"] == 1  # all name every image
        assert max(row["held_out_top1"] for row in rows.values() if row["pool"] != better) < 80
    flags = [*RANDOM, *PROBE, "--task", "logistic", "--limit-images", 30]
    with scratch() as root:  # both tokens come from one pass
        assert tune(*flags, "--pool", "auto", "--out", root)[0] == 0
        [row] = log_of(root)
        assert tune(*flags, "--pool", row["pool"], "--out", root)[0] == 0
        assert log_of(root) == [row, row | {"pool": row["pool"]}]  # results are never lost
        assert row["task"] == "logistic" and row["data"] == "shapes" and row["chance"] == 10
        assert tune(*flags, "--task", "knn", "--k", 7, "--out", root)[0] == 0
        *_, last = log_of(root)
        assert len(log_of(root)) == 3 and last["k"] == 7 and last["whiten"] is False
    tune_refused(*flags, "--task", "knn", "--pool", "auto", names=["--pool auto", "logistic"])
    tune_refused("--demo", "--task", "finetune", names=["--demo", "leave --task finetune off"])


def test_every_kind_of_autoencoder_and_published_files_load_as_they_were():
    images = tiny_batch()[0]
    with scratch() as folder:
        path = folder / "c.pt"
        for arch, scales in (("mae", 1), ("msg_mae", 4)):
            mae = model.build_mae("tiny", 32, 8, arch, scales)
            sizes = {"model": "tiny", "image_size": 32, "patch_size": 8}
            state = mae.state_dict()
            encoder = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask"))}
            space = argparse.Namespace(lr=1)  # as MAE's own checkpoints hold
            files = [{"mae": state, "arguments": sizes, "script": "train.py"}]
            files += [{"model": encoder}, {"model": state, "args": space}] if scales == 1 else []
            for content in files:
                torch.save(content, path)
                run, args = opened_run(["--checkpoint", path, "--task", "knn"])
                assert (args.model, args.image_size, args.patch_size) == ("tiny", 32, 8)
                assert torch.equal(run.network.encoder(images), mae.encode(images)[0])
        run, _ = opened_run(["--checkpoint", path, "--image-size", 48])
        assert run.network(torch.rand(2, 3, 48, 48)).shape == (2, 3)


def test_encoders_load_whole_or_not_at_all_and_bad_flags_end_in_one_line():
    def spoil(change):
        weights = model.build_mae("tiny", 32, 8).state_dict()
        change(weights)
        sizes = {"model": "tiny", "image_size": 32, "patch_size": 8}
        torch.save({"mae": weights, "arguments": sizes, "script": "train.py"}, path)

    def rejected(*flags, names):
        tune_refused("--out", path.parent / "run", *PROBE, *flags, names=names)

    with scratch() as folder:
        path = folder / "spoilt.pt"
        given = ["--checkpoint", path]
        spoil(lambda w: w.pop("blocks.5.norm1.bias"))
        rejected(*given, names=["missing: blocks.5.norm1.bias", "nothing was loaded"])
        spoil(lambda w: w.update({"fc_norm.weight": torch.ones(3), "extra": torch.ones(1)}))
        rejected(*given, names=["unexpected: fc_norm.weight, extra"])
        spoil(lambda w: w.update({"norm.bias": torch.ones(3)}))
        rejected(*given, names=["of another shape: norm.bias [3] for [192]"])
        spoil(lambda w: w.update({"pos_embed": torch.ones(1, 8, 192)}))
        rejected(*given, names=["positions", "7"])
        spoil(lambda w: [w.update({"generator_" + k: w.pop(k)}) for k in list(w)])
        rejected(*given, names=["missing: cls_token", "unexpected: ", "generator_cls_token"])
        torch.save({"model": {"weight": torch.ones(1)}}, path)
        rejected(*given, names=["missing: cls_token", "weight"])
        torch.save(torch.ones(3), path)
        rejected(*given, names=["spoilt.pt is not a checkpoint", "Tensor"])
        torch.save({"epoch": 3}, path)
        rejected(*given, names=["spoilt.pt is not a checkpoint"])
        path.write_bytes(b"hello")
        rejected(*given, names=["spoilt.pt is not a checkpoint"])
        spoil(lambda w: None)
        rejected(*given, "--model", "small", names=["--model small", "has tiny"])
        rejected(*given, "--patch-size", 4, names=["--patch-size 4", "has 8"])
        rejected(*given, "--image-size", 44, names=["image size 44", "patch size 8"])
        rejected(*given, "--eval", names=["not a checkpoint of finetune.py"])
        rejected(names=["--checkpoint is missing", "none"])
        rejected(*RANDOM, "--shots", 1, "--fraction", 0.1, names=["--fraction", "--shots"])
        rejected(*RANDOM, "--fraction", 1.5, names=["--fraction 1.5"])
        assert tune(*RANDOM, "--seed", 2**63)[0] == 2
        rejected(*RANDOM, "--limit-images", 3, names=["3 training images", "--batch-size"])
        rejected(*RANDOM, "--drop-path", 1, names=["--drop-path 1", "below 1"])
        rejected("--checkpoint", folder / "no.pt", names=["no.pt does not exist"])
        assert not (folder / "run").exists()
        one = [*RANDOM, *PROBE, "--task", "knn", "--whiten", "--limit-images", 1]
        tune_refused(*one, "--out", folder / "one", names=["--whiten needs two training images"])


def test_classes_that_differ_between_train_and_val_are_refused_by_name():
    with scratch() as root:
        write_folder(root / "train", classes=("ant", "bee", "cat"))
        write_folder(root / "val", classes=("ant", "bee", "dog"), count=2)
        flags = [*RANDOM, "--task", "knn", "--workers", 0, "--out", root / "out"]
        tune_refused(*flags, "--data", root, names=["cat only in train", "dog only in val"])
        write_folder(root / "flat", classes=("",), count=20)
        tune_refused(*flags, "--data", root / "flat", names=["no classes"])


def test_unreadable_validation_images_are_left_out_and_named():
    with scratch() as root:
        write_folder(root / "train", count=6)
        write_folder(root / "val", count=6)
        (root / "val" / "b" / "3.png").write_text("not an image")
        flags = [*RANDOM, "--data", root, "--workers", 0, "--batch-size", 4, "--epochs", 2]
        for task in ("linear", "knn", "logistic"):
            out = root / task
            status, errors = tune(*flags, "--task", task, "--out", out)
            assert status == 0 and errors.count("left out: ") == 1 and "b/3.png" in errors, errors
            assert all(row["val_images"] == 11 for row in log_of(out))


def test_fine_tuning_stopped_in_mid_epoch_continues_bit_for_bit_and_eval_agrees():
    figures = ("top1", "val_loss")
    for task in ("linear", "finetune"):
        with scratch() as root:
            flags = [*RANDOM, *PROBE, "--task", task, "--limit-images", 16, "--epochs", 2]
            flags += ["--lr", 1e-3, "--out"]
            assert tune(*flags, root / "once")[0] == 0
            assert tune(*flags, root / "twice", "--steps", 6)[0] == 0  # of 8
            names = ["--pool cls (now mean)"]
            tune_refused(*flags, root / "twice", "--pool", "mean", names=names)
            assert tune(*flags, root / "twice")[0] == 0
            same_weights(root / "once", root / "twice")
            once, twice = log_of(root / "once"), log_of(root / "twice")
            # A run that goes on remembers its best.
            last = root / "twice" / "checkpoint.pt"
            state = torch.load(last, weights_only=True)
            state["progress"]["best"] = 99.0
            torch.save(state, last)
            assert tune(*flags, root / "twice", "--epochs", 3)[0] == 0
            assert torch.load(last, weights_only=True)["progress"]["best"] == 99.0
            # From the best one on: it is kept, and the new run has a best one of its own.
            best = root / "twice" / "best.pt"
            kept = best.read_bytes()
            given = [*flags, root / "twice", "--resume", best, "--epochs", 4, "--lr", 1e-9]
            assert tune(*given)[0] == 0 and best.exists()
            assert (root / "twice" / "best.old.pt").read_bytes() == kept != best.read_bytes()
            assert torch.load(best, weights_only=True)["progress"]["epoch"] > 1
            for a, b in zip(once, twice, strict=True):
                assert all(a[name] == b[name] for name in ("loss", *figures)), (a, b)
            best, output = max(once, key=lambda row: row["top1"]), io.StringIO()
            with contextlib.redirect_stdout(output):
                measured = ["--checkpoint", root / "once" / "best.pt", *PROBE]
                finetune.main(["--eval", *(str(flag) for flag in measured)])
            for name in figures:
                assert f"{name} {best[name]:.4g}" in output.getvalue(), (best, output.getvalue())


def test_a_run_that_ends_while_it_is_measured_has_saved_and_measures_when_it_goes_on():
    measure, kill = finetune.evaluate_classifier, iter([None, 9, 15])  # the first epoch is measured
    flags = [*RANDOM, *PROBE, "--task", "linear", "--limit-images", 8, "--epochs", 3, "--lr", 1e-3]

    def interrupted(run, loader, known, args):
        how = next(kill, None)
        if how:
            kept = kept_in(args.out)["progress"]
            assert kept["epoch_step"] == kept["epoch"] == 2
        if how == 9:
            raise RuntimeError("as if killed")
        if how:
            os.kill(os.getpid(), how)
        return measure(run, loader, known, args)

    with scratch() as root:
        assert tune(*flags, "--out", root / "once")[0] == 0
        with mock.patch.object(finetune, "evaluate_classifier", interrupted):
            try:
                tune(*flags, "--out", root / "twice")
            except RuntimeError:
                pass
            assert [row["epoch"] for row in log_of(root / "twice")] == [1]
            assert tune(*flags, "--out", root / "twice")[0] == 128 + signal.SIGTERM
        assert tune(*flags, "--out", root / "twice")[0] == 0
        once, twice = log_of(root / "once"), log_of(root / "twice")
        for a, b in zip(once, twice, strict=True):
            assert all(a[k] == b[k] for k in ("epoch", "lr", "loss", "top1", "val_loss")), (a, b)
        same_weights(root / "once", root / "twice")


@contextlib.contextmanager
def signal_in_step(script, number, before=False):
    """SIGTERM comes within a script's step, when or `before` its processes share their signals."""
    name = "step_gradients" if before else "update"
    function, steps = getattr(script, name), iter(range(1, 9))
    bar, epochs = train.progress_bar, iter("123")

    def signalled(*args, **named):
        result = function(*args, **named)
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def counted(*args):
        next(epochs)  # ends a loop without end
        return bar(*args)

    with mock.patch.object(script, name, signalled):
        with mock.patch.object(train, "progress_bar", counted):
            yield


def test_a_stop_signal_after_the_last_step_of_an_epoch_is_heeded_once_it_is_measured():
    probe = [*RANDOM, *PROBE, "--task", "linear", "--limit-images", 8, "--lr", 1e-3]
    for script, flags in ((train, [*FAST, "--limit-images", 8]), (finetune, probe)):
        # Of two epochs of two steps: the last step of the first, then that of the second.
        for step, status, place in ((2, 128 + signal.SIGTERM, (2, 1)), (4, 0, (3, 0))):
            with scratch() as out, signal_in_step(script, step):
                assert command(*flags, "--epochs", 2, "--out", out, script=script)[0] == status
                progress = kept_in(out)["progress"]
                assert (progress["epoch"], progress["epoch_step"]) == place
                assert len(log_of(out)) == place[0] - 1
    # Told before they share their signals, fine-tuning ends unmeasured: that may take minutes.
    with scratch() as out:
        own = [*probe, "--epochs", 2, "--out", out]
        with signal_in_step(finetune, 2, before=True):
            assert tune(*own)[0] == 128 + signal.SIGTERM
        progress = kept_in(out)["progress"]
        assert (progress["epoch"], progress["epoch_step"]) == (1, 2) and log_of(out) == []
        assert tune(*own)[0] == 0 and [row["epoch"] for row in log_of(out)] == [1, 2]


def test_a_probe_and_fine_tuning_learn_colours():
    with scratch() as folder:
        for part in ("train", "val"):
            for name in ("red", "green", "blue"):
                (folder / part / name).mkdir(parents=True)
                for i in range(8):
                    Image.new("RGB", (32, 32), name).save(folder / part / name / f"{i}.png")
        flags = [*RANDOM, "--data", folder, "--workers", 0, "--batch-size", 8, "--epochs", 6]
        flags += ["--mixup", 0, "--cutmix", 0, "--rand-augment", 0, "--lr", 3e-3, "--model", "nano"]
        for task in CLASSIFY:
            out = folder / task
            assert tune(*flags, "--task", task, "--out", out)[0] == 0
            row = log_of(out)[-1]
            assert row["top1"] == 100, (task, row)
            assert "top5" not in row
            if task in ("linear", "finetune"):  # photographs without labels, to any depth
                (folder / "photos" / "sub").mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (50, 40), "green").save(folder / "photos" / "sub" / "a.png")
                Image.new("RGB", (40, 50), "blue").save(folder / "photos" / "b.png")
                (folder / "photos" / "c.png").write_text("torn")
                given = ["--checkpoint", out / "best.pt", "--workers", 0, "--predict"]
                status, errors = tune(*given, folder / "photos")
                assert status == 0 and "left out: " in errors and "c.png" in errors
                rows = data.read_log(out / "predictions.jsonl")
                assert [row["file"].split("photos/")[1] for row in rows] == ["b.png", "sub/a.png"]
                assert [row["classes"][0] for row in rows] == ["blue", "green"]
                with mock.patch.multiple(train, rank=lambda: 0, world_size=lambda: 2):
                    assert tune(*given, folder / "photos")[0] == 0  # every other one
                assert data.read_log(out / "predictions.jsonl") == rows
                for row in rows:
                    assert set(row["classes"]) == {"red", "green", "blue"}
                    close(sum(row["probabilities"]), 1, 1e-3)
                    assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
                tune_refused(*given, folder / "none.png", names=["none.png does not exist; give"])


CLASSIFY = ("linear", "finetune", "knn", "logistic")


@mock.patch.object(finetune, "PENALTIES", [1.0, 0.01])  # a third of the time
def test_two_processes_measure_what_one_does():
    learn = [*RANDOM, "--data", "shapes", "--workers", 0, "--val-images", 9, "--limit-images", 21]
    learn += ["--epochs", 1, "--lr", 1e-4, "--drop-path", 0, "--k", 5, "--model", "nano"]
    learn += ["--mixup", 0, "--cutmix", 0]  # these act on the batch of a process
    with scratch() as root:
        jobs = {task: [*learn, "--task", task] for task in CLASSIFY}
        two = [[*job, "--out", root / f"{t}2", "--batch-size", 2] for t, job in jobs.items()]
        wait = in_two_processes(commands_in_turn, *((finetune, flags) for flags in two))
        for task, job in jobs.items():
            assert tune(*job, "--out", root / f"{task}1", "--batch-size", 4)[0] == 0
        wait()
        for task in CLASSIFY:
            [one], [two] = (log_of(root / f"{task}{n}") for n in "12")
            assert one["val_images"] == two["val_images"] == 9
            assert (one["top1"], one["top5"]) == (two["top1"], two["top5"]), (one, two)
            close(one.get("val_loss", 0), two.get("val_loss", 0), 1e-4)


def test_images_that_training_held_out_are_those_that_are_measured():
    with scratch() as root:
        write_folder(root / "photos", count=20)  # 40 images, 8 of them held out
        flags = [*FAST, "--data", root / "photos", "--out", root / "run", "--epochs", 1]
        assert command(*flags, "--seed", 1, "--val-images", 8)[0] == 0
        flags = ["--task", "knn", "--data", root / "photos", "--workers", 0, "--batch-size", 4]
        flags += ["--checkpoint", root / "run" / "checkpoint.pt", "--out", root / "knn"]
        tune_refused(*flags, "--seed", 2, names=["give --seed 1", "photos/val"])
        spelt = [*flags, "--data", f"{root}/./photos/"]
        tune_refused(*spelt, "--seed", 2, names=["give --seed 1"])
        said = io.StringIO()
        with mock.patch.object(finetune, "say", said.write):
            assert tune(*flags, "--seed", 1)[0] == 0
        assert "8 images measure top-1: each is 12.5 points" in said.getvalue()
        # What --init brings along has been seen, too.
        more = ["--init", root / "run" / "checkpoint.pt", "--out", root / "more", "--epochs", 1]
        refused(*FAST, "--data", root / "photos", "--seed", 2, *more, names=["give --seed 1"])
        assert command(*FAST, "--limit-images", 4, "--seed", 2, *more)[0] == 0
        # Nor is it forgotten where the run goes on without it.
        more = ["--out", root / "more", "--epochs", 2, "--limit-images", 4]
        assert command(*FAST, *more, "--seed", 2)[0] == 0
        seen = torch.load(root / "more" / "checkpoint.pt", weights_only=True)["arguments"]["seen"]
        assert seen == [[str((root / "photos").resolve()), 1], ["shapes", 2]]
        flags += ["--checkpoint", root / "more" / "checkpoint.pt"]
        tune_refused(*flags, "--seed", 2, names=["give --seed 1"])
        # Another folder has its own choice, and a folder with val/ none.
        write_folder(root / "other", count=20)
        assert tune(*flags, "--seed", 2, "--data", root / "other")[0] == 0
        for part in ("train", "val"):
            write_folder(root / "photos" / part)
        assert tune(*flags, "--seed", 2)[0] == 0


# ---- On a GPU, where there is one ----------------------------------------------------------------


def check_device(device, rows):
    """What holds on any device: gradients, fp16's scaler, a run that stops and goes on."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    probe = train.feature_probe

    def probe_of_cpu(seed, features):  # a GPU's generator draws other numbers
        return [x.to(device) for x in probe(seed, [f.cpu() for f in features])]

    for loss, arch in rows:
        flags, vectors = ["--loss", loss, "--arch", arch, "--ada-p", "0.5"], []
        images, noise, seeds = tiny_batch()
        batch = [((images * 255).byte(), noise, seeds)]
        in_half = loss in ("msg_gan_p", "stylegan2_ada_p")
        places = [(torch.device("cpu"), False), (device, False), (device, True)][: 2 + in_half]
        for where, half in places:
            args = train.parse_args([*FAST, "--out", "unused", *loss_network_flags(), *flags])
            args.amp = "off"
            run = train.build_run(args, where)
            if half:  # --amp fp16, which the command line gives to GPUs alone
                run.dtype = torch.float16
                run.autocast = functools.partial(torch.autocast, where.type, dtype=run.dtype)
                run.scaler_g = run.scaler_d = torch.amp.GradScaler(where.type, init_scale=2.0**9)
            progress, eq3_on = train.new_progress(), train.eq3_is_on(2, args)
            with mock.patch.object(train, "feature_probe", probe_of_cpu):
                train.step_gradients(run, batch, eq3_on, progress, args)
            networks = [n for n in (run.mae, run.disc) if n is not None]
            parameters = [p for n in networks for p in n.parameters() if p.grad is not None]
            vectors.append(torch.cat([p.grad.flatten().cpu() for p in parameters]))
        cpu, here, *scaled = vectors
        assert (here - cpu).norm() < 1e-4 * cpu.norm(), (loss, arch)
        for halved in scaled:
            assert (halved / 2**9 - cpu).norm() < 0.1 * cpu.norm(), (loss, arch)

    for loss in ("msg_gan_p", "stylegan2_ada_p"):
        with scratch() as root:
            flags = [*FAST, "--loss", loss, "--limit-images", 8, "--epochs", 2, "--amp", "off"]
            assert command(*flags, "--out", root / "once")[0] == 0
            assert command(*flags, "--out", root / "twice", "--steps", 3)[0] == 0
            assert command(*flags, "--out", root / "twice")[0] == 0
            once, twice = (kept_in(root / name)["mae"] for name in ("once", "twice"))
            for name, value in once.items():
                close(value.cpu(), twice[name].cpu(), 0 if device.type == "cpu" else 1e-4)


def check_gpu():
    """`check_device` on the GPU that this process finds, for a process of its own."""
    del os.environ["CUDA_VISIBLE_DEVICES"]
    if VISIBLE_GPUS is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE_GPUS
    if not torch.cuda.is_available():
        print("left out: no GPU is visible")
        return
    check_device(torch.device("cuda", 0), ROWS)
    print(f"checked on {torch.cuda.get_device_name()}")


def test_a_gpu_gives_the_gradients_of_the_cpu_scales_fp16_and_goes_on_where_it_stopped():
    # The same body, so that it works where there is a GPU; but fewer rows.
    check_device(torch.device("cpu"), [("stylegan2_ada_p", "msg_mae")])
    devices = ("nvidia[0-9]*", "dxg", "kfd")  # of Linux, WSL and ROCm
    if sys.platform == "linux" and not any(list(Path("/dev").glob(name)) for name in devices):
        print(f"{'':9}on a GPU: left out: there is none")
        return
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    if VISIBLE_GPUS is not None:
        environment["CUDA_VISIBLE_DEVICES"] = VISIBLE_GPUS
    process = subprocess.run(
        [sys.executable, __file__, "--gpu"], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    print(f"{'':9}on a GPU: {process.stdout.strip()}")


# ---- README --------------------------------------------------------------------------------------


def test_every_name_in_the_readmes_map_of_the_paper_exists():
    text = Path(__file__).with_name("README.md").read_text()
    rows = text.split("\nPaper | Here\n")[1].split("\n\n")[0].splitlines()
    missing, count, here = [], 0, Path(__file__).parent
    for row in rows:
        module = None  # `file.py` `name`, `Class.method`, ...: names are of the file before them
        for name in re.findall("`([^`]+)`", row.rpartition(" | ")[2]):
            if name.startswith("extras/") and not (here / "extras").is_dir():
                break  # the eight files stand alone
            if name.endswith(".py"):
                module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
            elif re.fullmatch(r"[A-Za-z_][\w.]*", name) and name not in losses.LOSSES:
                count += 1
                try:
                    functools.reduce(getattr, name.split("."), module)
                except AttributeError:
                    missing.append(f"{module and module.__name__}: {name}")
    assert count > 40 and not missing, (count, missing)


# ---- Runner --------------------------------------------------------------------------------------


TESTS = {}  # what `main` runs


def find_tests(names):
    """-> {name: test}: those of this file, then those of extras/ where it is there.

    names: "core" leaves extras out; other words must be in a test's name.
    """
    tests = {k: v for k, v in globals().items() if k.startswith("test_")}
    if "core" not in names and Path(__file__).with_name("extras").is_dir():
        from extras import test_extras

        tests |= {k: v for k, v in vars(test_extras).items() if k.startswith("test_")}
    words = [name for name in names if name != "core"]
    return {k: v for k, v in tests.items() if not words or any(word in k for word in words)}


def run_test(name):
    """Run one test -> (name, seconds, "passed" or the traceback)."""
    began = time.perf_counter()
    try:
        TESTS[name]()
        outcome = "passed"
    except Exception:
        outcome = "FAILED\n" + traceback.format_exc()
    return name, time.perf_counter() - began, outcome


def main():
    TESTS.update(find_tests(sys.argv[1:]))
    failed, cores = 0, len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    pool = None
    if cores > 1:  # tests share several processes, which start as copies of this one
        fork = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(min(cores, 4), mp_context=fork)
    for name, seconds, outcome in (pool.map if pool else map)(run_test, TESTS):
        failed += outcome != "passed"
        print(f"{seconds:6.1f} s  {name}: {outcome}", flush=True)
    if pool:
        pool.shutdown()
    print(f"{len(TESTS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.modules["test_smoke"] = sys.modules[__name__]  # extras' tests import this very module
    if sys.argv[1:2] == ["--gpu"]:
        check_gpu()
    else:
        sys.exit(main())
