"""Tests: `python test_smoke.py` (or pytest). CPU, offline, minutes; exit status 1 on failure.

Each test is one claim. Expected values come from hand calculation or from a slow, independent
computation, never from the code under test.
"""

import argparse
import atexit
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
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

SIBLINGS = list(train.SIBLING_TERMS)
ROWS = [(loss, "auto") for loss in losses.LOSSES if loss not in SIBLINGS]  # and the ablations
ROWS += [("msg_gan_p", "mae"), ("stylegan2_ada_p", "mae"), ("mse", "msg_mae")]
EVERY_ROW = [*ROWS, *((loss, "auto") for loss in SIBLINGS)]
TINY = ["--model", "tiny", "--image-size", "32", "--patch-size", "8", "--data", "shapes"]
TINY += ["--d-channels", "8", "--d-max", "32"]
RECONSTRUCT = ["--task", "reconstruct", "--data", "shapes", "--workers", "0"]
FAST = [*TINY, "--batch-size", "4", "--val-images", "4", "--workers", "0", "--lr", "1e-3"]


torch.set_num_threads(1)  # on so small networks a second thread costs more than it brings
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
    """Flags that name stand-in files for published weights: of loss networks, and a teacher."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg = model.VGGFeatures()
        for name, network in (("dvae", model.DVAEEncoder()), ("vgg", vgg)):
            for p in network.parameters():
                torch.nn.init.normal_(p, std=1.4 * (p[0].numel() or 1) ** -0.5 if p.ndim > 1 else 0)
            torch.save(network.state_dict(), f"{folder.name}/{name}.pth")
        torch.save(model.build_mae("nano", 32, 8).state_dict(), f"{folder.name}/mae.pth")
    flags = [f"--{n}-weights={folder.name}/{n}.pth" for n in ("dvae", "vgg")]
    return [*flags, f"--teacher={folder.name}/mae.pth"]


def tiny_run(*flags):
    """A training run without data: (run, args), small enough for a test."""
    args = train.parse_args([*TINY, "--out", "unused", *loss_network_flags(), *flags])
    return train.build_run(args, torch.device("cpu")), args


def save_autoencoder(path, *flags):
    """Write random weights as a checkpoint of train.py."""
    run, args = tiny_run(*flags)
    content = {"mae": run.mae.state_dict(), "arguments": vars(args), "script": "train.py"}
    torch.save(content, path)


def tiny_batch(B=4, seed=0, views=1):
    """(images (B, 3, 32, 32) in [0, 1], noise (B, 16), seeds (B,)); views=2: (B, 2, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(B, *[views] * (views > 1), 3, 32, 32, generator=generator)
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
    parts = ("mae", "disc", "classifier", "detector", "segmenter")
    a, b = (
        {(part, k): v for part in parts for k, v in kept.get(part, {}).items()}
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


def ap_of(truth, found, *, crowd=(), area=None, masks=False):
    """`losses.coco_ap` of one image and class; truth: [box]; found: [(score, box)], xyxy."""

    def pack(boxes):
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        drawn = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(drawn, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        return {"labels": torch.ones(len(boxes)), "boxes": boxes, "masks": drawn}

    objects = pack(truth) | {"crowd": torch.zeros(len(truth), dtype=torch.bool)}
    objects["crowd"][list(crowd)] = True
    objects["area"] = objects["masks"].sum((1, 2)).float() if area is None else torch.tensor(area)
    detections = pack([box for _, box in found]) | {"scores": torch.tensor([s for s, _ in found])}
    return losses.coco_ap([losses.match_detections(detections, objects, masks=masks)])


A, B = [0, 0, 10, 10], [20, 0, 30, 10]  # two objects
FAR = [40, 40, 50, 50]  # where there is none


def test_average_precision_has_its_hand_values():
    for truth, found, expected in (
        ([A], [(0.9, A)], 1.0),
        ([A], [(0.9, [0, 0, 8, 10])], 0.7),  # IoU .8 passes .5, .55, ..., .8
        ([A], [(0.9, [0, 0, 6, 10])], 0.3),
        ([A], [(0.9, [0, 0, 5, 10])], 0.1),
        ([A], [(0.9, FAR), (0.8, A)], 0.5),  # precision 1/2 at every recall
        ([A], [(0.9, A), (0.8, A), (0.7, FAR)], 1.0),  # what is wrong below costs nothing
        ([A, B], [(0.9, A)], 51 / 101),  # recalls 0 to .50
        ([A, B], [(0.9, A), (0.8, FAR), (0.7, B)], (51 + 50 * 2 / 3) / 101),
        ([A, B], [(0.9, A), (0.8, A), (0.7, B)], (51 + 50 * 2 / 3) / 101),  # a duplicate is wrong
        ([A], [], 0.0),
        ([], [(0.9, FAR)], -1.0),
    ):
        close(ap_of(truth, found)["ap"], expected, 1e-12)
        close(ap_of(truth, found, masks=True)["ap"], expected, 1e-12)  # rectangles


def test_average_precision_lets_crowds_and_other_sizes_count_neither_way():
    assert ap_of([A], [(0.9, A)], crowd=[0])["ap"] == -1
    crowded = [(0.9, [20, 0, 24, 4]), (0.8, [25, 5, 29, 9]), (0.7, A)]  # two wholly in the crowd
    for masks in (False, True):
        assert ap_of([A, B], crowded, crowd=[1], masks=masks)["ap"] == 1
    large = [0, 0, 50, 50]  # 2500 pixels: medium
    scores = ap_of([large, B], [(0.9, large), (0.8, FAR)])
    assert (scores["ap_medium"], scores["ap_small"], scores["ap_large"]) == (1, 0, -1)
    # Sizes are of the listed area, whatever that of the box.
    assert ap_of([A], [(0.9, A)], area=[1e4])["ap_large"] == 1


def test_average_precision_pools_images_by_score_and_averages_classes():
    one = {"labels": torch.tensor([1]), "boxes": torch.tensor([A]), "scores": torch.tensor([0.5])}
    truth = {"labels": torch.tensor([1]), "boxes": torch.tensor([A]), "area": torch.tensor([100.0])}
    truth["crowd"] = torch.tensor([False])
    wrong = one | {"boxes": torch.tensor([FAR]), "scores": torch.tensor([0.9])}
    pair = [losses.match_detections(one, truth), losses.match_detections(wrong, truth)]
    close(losses.coco_ap(pair)["ap"], 51 / 101 / 2, 1e-12)  # the better score is the wrong one
    other = {k: v + 1 if k == "labels" else v for k, v in truth.items()}
    missed = losses.match_detections(wrong, other)  # class 2 was never found
    close(losses.coco_ap([pair[0], missed])["ap"], (1 / 2 + 0) / 2, 1e-12)


def test_segmentation_scores_have_their_hand_values():
    target, prediction = torch.tensor([0, 0, 1, 1, 2, 255]), torch.tensor([0, 1, 1, 1, 0, 2])
    matrix = losses.confusion_matrix(prediction, target, 4)  # class 3 is nowhere
    scores = losses.segmentation_scores(matrix)
    close(scores["pixel_accuracy"], 0.6, 1e-12)
    close(scores["miou"], (1 / 3 + 2 / 3 + 0) / 3, 1e-12)
    close(scores["miou_all"], (1 / 3 + 2 / 3 + 0 + 0) / 4, 1e-12)
    assert matrix.sum() == 5 and matrix[0, 1] == 1  # truth 0, called 1


def slow_hsic(K, L):
    """The U-statistic that defines HSIC, over all quadruples of different images (Song et al. 2012,
    eq. 5: the kernel of its order-four statistic, one term for each ordered quadruple)."""
    total, count = 0.0, 0
    for i, j, q, r in itertools.permutations(range(len(K)), 4):
        total += (K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])).item()
        count += 1
    return total / count


def test_hsic_equals_the_mean_over_quadruples_of_images():
    generator = torch.Generator().manual_seed(0)
    for n in (4, 7):
        x, y = (torch.randn(n, c, generator=generator).double() for c in (3, 5))
        K, L = x @ x.T, y @ y.T  # not centred, with their diagonals
        close(losses.hsic(K, L), slow_hsic(K, L), 1e-12)
        close(
            losses.hsic(torch.stack([K, K]), torch.stack([L, K])),
            [slow_hsic(K, L), slow_hsic(K, K)],
            1e-12,
        )
        close(losses.cka_sums(x + 7, y)[0], n * slow_hsic(K, L), 1e-12)  # shifts change nothing


def test_cka_is_1_of_features_turned_shifted_and_scaled_and_0_of_unrelated_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, 300, generator=generator)  # five batches of 64, 300 channels
    turn = torch.linalg.qr(torch.randn(300, 300, generator=generator))[0]
    same = losses.cka(losses.cka_sums(x, 3 * x @ turn + 2).sum(dim=0))
    close(same, 1, 1e-5)
    sums = losses.cka_sums(*torch.randn(2, 50, 64, 300, generator=generator))
    assert sums.shape == (50, 3) and sums.dtype == torch.float64
    close(losses.cka(sums.sum(dim=0)), 0, 0.01)

    def biased(x, y):  # the plain formula
        x, y = x - x.mean(dim=0), y - y.mean(dim=0)
        return (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())

    assert biased(*torch.randn(2, 64, 300, generator=generator)) > 0.75
    assert not losses.cka(torch.zeros(3)).isfinite() and not losses.cka(-torch.ones(3)).isfinite()


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


def set_sums(features, logits=None, parts=1):
    """`inception_sums` of all images, added up over batches of 7; splits are contiguous."""
    n, total = len(features), None
    logits = torch.zeros(n, 4) if logits is None else logits
    for index in torch.arange(n).split(7):
        sums = losses.inception_sums(features[index], logits[index], index * parts // n, parts)
        total = {k: v + total[k] for k, v in sums.items()} if total else sums
    return total


def test_frechet_distance_of_gaussians_equals_the_closed_form():
    # Along the axes of one rotation, deviations 1, 2, 3 against 2, 2, 5: 1 + 0 + 4, means: 9.
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    cov_x = rotation @ torch.diag(torch.tensor([1.0, 4, 9]).double()) @ rotation.T
    cov_y = rotation @ torch.diag(torch.tensor([4.0, 4, 25]).double()) @ rotation.T
    means = torch.zeros(3).double(), torch.tensor([1.0, 2, 2]).double()
    close(losses.frechet_distance(means[0], cov_x, means[1], cov_y), 14.0, 1e-9)
    # Covariances that do not commute: the root's trace from the product's own eigenvalues.
    torch.manual_seed(0)
    x, y = torch.randn(2, 40, 6, dtype=torch.float64)
    x, y = x @ (torch.eye(6) + torch.ones(6, 6) / 3).double(), y * torch.arange(1, 7)
    root = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace()
    sums = [losses.mean_and_covariance(set_sums(part)) for part in (x, y)]
    close(losses.frechet_distance(*sums[0], *sums[1]), expected - 2 * root, 1e-9)


def test_frechet_distance_of_few_images_equals_the_nuclear_norm():
    # With fewer images than features: Tr (S1 S2)^1/2 = |X1 X2^T|_* / sqrt((n1 - 1) (n2 - 1)).
    x, y = torch.randn(20, 50).double(), torch.randn(15, 50).double() * 2 + 1
    centred = [part - part.mean(0) for part in (x, y)]
    norm = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / math.sqrt(19 * 14)
    traces = sum(part.square().sum() / (len(part) - 1) for part in centred)
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * norm
    sums = [losses.mean_and_covariance(set_sums(part)) for part in (x, y)]
    close(losses.frechet_distance(*sums[0], *sums[1]) / expected, 1.0, 1e-9)
    close(losses.frechet_distance(*sums[0], *sums[0]), 0.0, 1e-9)


def test_inception_score_is_1_for_uniform_and_the_number_of_classes_for_sure_predictions():
    features = torch.zeros(20, 2)
    close(losses.inception_score(set_sums(features, torch.zeros(20, 5), 10)), (1.0, 0.0), 1e-9)
    sure = torch.full((20, 5), -1e4).scatter(1, (torch.arange(20) % 5)[:, None], 1e4)
    close(losses.inception_score(set_sums(features, sure, 1)), (5.0, 0.0), 1e-6)
    # Two parts, one sure and one without a clue: scores 5 and 1.
    half = torch.cat([sure[:10], torch.zeros(10, 5)])
    close(losses.inception_score(set_sums(features, half, 2)), (3.0, 2.0), 1e-6)
    # exp of the mean KL divergence, the slow way.
    logits = torch.randn(20, 5).double()
    p = logits.softmax(1)
    kl = sum((row * (row / p.mean(0)).log()).sum() for row in p) / 20
    close(losses.inception_score(set_sums(features, logits, 1))[0], kl.exp(), 1e-9)


def test_cls_attention_equals_a_slow_softmax():
    torch.manual_seed(0)
    mae = model.build_mae("tiny", 32, 8)
    images = tiny_batch(2)[0]
    seen = []
    hook = mae.blocks[-1].attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mae.encode(images)
    hook.remove()
    maps = mae.cls_attention(images)
    assert maps.shape == (2, 3, 4, 4)
    q, k, _ = F.linear(seen[0], mae.blocks[-1].attn.qkv.weight).chunk(3, dim=2)  # biases start at 0
    for b in range(2):
        for head in range(3):
            part = slice(64 * head, 64 * head + 64)
            scores = [(q[b, 0, part] @ key).item() / 8 for key in k[b, :, part]]
            expected = torch.tensor(scores).softmax(0)[1:]  # CLS's own weight is left out
            close(maps[b, head], expected.view(4, 4), 1e-6)


def stand_in(classes=1008):
    """Inception weights of the right shapes whose features differ from image to image."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(num_classes=classes, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return network.state_dict()


def test_inception_pools_as_the_published_network_and_otherwise_is_torchvisions():
    from torchvision.models import inception_v3

    weights = stand_in(1000)
    network = inception_v3(num_classes=1000, aux_logits=False, init_weights=False)
    network.load_state_dict(weights)
    images = torch.rand(1, 3, 299, 299)
    with torch.no_grad():
        features, logits = model.InceptionFeatures(weights)(images)
        close(logits, network.eval()(2 * images - 1), 1e-5)
        assert features.shape == (1, 2048)

    # torchvision's file: no batch counters, and the auxiliary classifier is in it.
    bare = {k: v for k, v in weights.items() if "num_batches" not in k}
    assert not model.InceptionFeatures(bare | {"AuxLogits.fc.bias": torch.zeros(1)}).published

    published = model.InceptionFeatures(stand_in(1008)).train()
    assert published.published
    assert not published.network.training
    with torch.no_grad():
        x = torch.rand(1, 192, 5, 5)
        block = published.network.Mixed_5b
        total, count = torch.zeros(192, 5, 5), torch.zeros(5, 5)
        for i, j in [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
            to = (slice(max(0, -i), 5 - max(0, i)), slice(max(0, -j), 5 - max(0, j)))
            of = (slice(max(0, i), 5 + min(0, i)), slice(max(0, j), 5 + min(0, j)))
            total[(slice(None), *to)] += x[(0, slice(None), *of)]
            count[to] += 1
        average = (total / count)[None]
        close(block(x)[:, -32:], block.branch_pool.bn(block.branch_pool.conv(average)).relu(), 1e-4)
        x = torch.rand(1, 2048, 4, 4)
        block = published.network.Mixed_7c
        most = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-9.0), 3, stride=1)
        close(block(x)[:, -192:], block.branch_pool.bn(block.branch_pool.conv(most)).relu(), 1e-4)
        changed = [m for m in published.network.modules() if len(m._forward_pre_hooks)]
        assert len(changed) == 18  # nine blocks and their pooling branches


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


def test_blur_has_the_values_and_gradients_of_both_orders_of_a_plain_convolution():
    torch.manual_seed(0)
    taps = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel = torch.outer(taps, taps).expand(2, 1, 4, 4)

    def both_orders(y, x):  # the second is that of R1: of a squared gradient
        first = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0]
        return y, first, torch.autograd.grad(first.square().sum(), x)[0]

    for stride, padding in ((1, 2), (2, 1)):
        blur = model.Blur(stride, padding).double()
        for h, w in ((4, 6), (5, 4), (7, 5)):  # an odd side leaves a row or column over
            x = torch.randn(2, 2, h, w, dtype=torch.float64, requires_grad=True)
            plain = F.conv2d(x, kernel, None, stride, padding, groups=2)
            assert_close(both_orders(blur(x), x), both_orders(plain, x))
            assert torch.autograd.gradcheck(blur, x[:1])
            assert torch.autograd.gradgradcheck(lambda x, blur=blur: blur(x).square(), x[:1])


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
    assert active(100 * x).item() == 256.0  # 600 clamped
    assert halved(100 * x).item() == 128.0  # 300 clamped: the limit follows the gain
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


def slow_blur(x, padding):
    """[1, 3, 3, 1] / 8 along both axes, as sixteen shifted sums."""
    x, taps = F.pad(x, [padding] * 4), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
    h, w, four = x.shape[2] - 3, x.shape[3] - 3, range(4)
    return sum(taps[i] * taps[j] * x[:, :, i : i + h, j : j + w] for i in four for j in four)


def test_residual_block_equals_its_steps_done_slowly():
    torch.manual_seed(0)
    block = model.ResidualBlock(6, 8)
    conv1, conv2, skip = block.main[0], block.main[2], block.skip[1]
    torch.nn.init.normal_(conv1.bias)
    torch.nn.init.normal_(conv2.bias)

    def act(x):
        return math.sqrt(2) * torch.where(x > 0, x, 0.2 * x)

    for side in (8, 9):  # an odd side rounds down
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


def toy_features(z):
    """(B, 2, 3) -> two maps of different size, nonlinear in z."""
    x = torch.sin(z).flatten(1)  # (B, 6)
    wide = torch.einsum("bi,bj->bij", x, x).view(-1, 4, 3, 3)
    return [wide, (x[:, :4] * z.flatten(1)[:, 2:]).view(-1, 1, 2, 2)]


def test_path_length_penalty_equals_brute_force_per_sample():
    torch.manual_seed(0)
    z = torch.randn(3, 2, 3, requires_grad=True)
    noise = [torch.randn_like(f) for f in toy_features(z)]
    lengths = []
    for b in range(3):  # one sample at a time, g = sum_j J_j^T eps_j / sqrt(J N_j)
        jac = torch.autograd.functional.jacobian(lambda z: tuple(toy_features(z)), z[b : b + 1])
        g = sum(
            torch.einsum("oi,o->i", j.reshape(n, 6), e[b].flatten()) / math.sqrt(2 * n)
            for j, e, n in zip(jac, noise, (36, 4), strict=True)
        )
        lengths.append(math.sqrt(g.square().sum().item() / 2))  # mean over L = 2
    expected = sum((a / 0.7 - 1) ** 2 for a in lengths) / 3
    got = losses.path_lengths(toy_features(z), z, noise)
    assert_close(got, torch.tensor(lengths), rtol=1e-4, atol=0)
    assert_close(losses.path_length_penalty(got, 0.7).item(), expected, rtol=1e-4, atol=0)


def test_path_length_gradient_equals_closed_form_and_is_finite_at_zero():
    # phi = W z, L = 1: a = |W' eps| / sqrt(N), da/dW = eps (W' eps)' / (N a)
    torch.manual_seed(0)
    z, eps = torch.randn(1, 1, 3, requires_grad=True), torch.randn(1, 5, 1, 1)
    for scale in (1.0, 0.0):
        weight = (scale * torch.randn(5, 3)).requires_grad_()
        phi = (z.view(1, 3) @ weight.T).view(1, 5, 1, 1)
        losses.path_length_penalty(losses.path_lengths([phi], z, [eps]), 0.5).backward()
        pull = weight.detach().T @ eps.view(5)  # (3,)
        a = math.sqrt(pull.square().sum().item() / 5 + 1e-8)
        expected = 2 * (a / 0.5 - 1) / 0.5 * torch.outer(eps.view(5), pull) / (5 * a)
        assert_close(weight.grad, expected)


def test_path_length_reaches_the_decoder_through_both_discriminators():
    torch.manual_seed(0)
    for network in NETWORKS:
        disc, decoder = network(16, 2, 4, 8), torch.nn.Linear(6, 3 * 8 * 8)
        disc.requires_grad_(False)
        z = torch.randn(4, 1, 6, requires_grad=True)
        coarse = decoder(z).sigmoid().view(4, 3, 8, 8)
        _, features = disc([F.interpolate(coarse, scale_factor=2.0), coarse])
        noise = [torch.randn_like(f) for f in features]
        losses.path_length_penalty(losses.path_lengths(features, z, noise), 0.01).backward()
        assert decoder.weight.grad.isfinite().all() and decoder.weight.grad.norm() > 0
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
            export = ["--export", root / "x.pt"]
            for task in (["--task", "knn"], ["--eval"], ["--task", "reconstruct"], export):
                tune_refused("--checkpoint", bad, "--data", "shapes", *task, names=["evil.pt"])
        assert command(*fast, "--limit-images", 4)[0] == 0
        own = root / "run" / "checkpoint.pt"
        given = [*RECONSTRUCT, "--checkpoint", own, "--inception-weights", bad]
        tune_refused(*given, names=["evil.pt", "Inception"])
        assert not touched.exists()
        pickle.loads(pickle.dumps(Evil(touched)))
        assert touched.exists()  # it would have been


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
    fixed = mock.Mock(side_effect=lambda features, z, probe: lengths + 0 * z.sum())
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

    images, *rest = tiny_batch()
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
        if loss in SIBLINGS:
            continue  # see `test_every_sibling_lowers_its_terms`
        # Twenty steps show whether gradients work, not how the two players balance.
        run, args = tiny_run("--loss", loss, "--lr", "1e-3", "--adversarial-weight", "0.1")
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
    for loss, weight in (("ls_gan", 1.0), ("ls_gan_p", 1.0), ("msg_gan", 0.1), ("msg_gan_p", 0.1)):
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
        refused(*twice, "--limit-images", 2, names=["3 training images (now 2)"])
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
        assert status == 0 and errors.count("replaced: ") == 1 and "b/1.png" in errors, errors
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
        train_part, val_part = data.open_sources(str(root / "imagenet"), image_size=32, seed=0)
        assert (len(train_part), len(val_part), train_part.classes) == (24, 6, ["a", "b"])
        assert train_part.targets == [0] * 12 + [1] * 12

        # Class folders alone: 8 are held out, the same ones for the same seed, none in both.
        parts = data.open_sources(str(root / "imagenet" / "train"), image_size=32, seed=0)
        again = data.open_sources(str(root / "imagenet" / "train"), image_size=32, seed=0)
        assert [len(p) for p in parts] == [16, 8] and parts[1].files == again[1].files
        assert not set(parts[0].files) & set(parts[1].files)

        assert len(parts[0].classes) == 2
        other = data.open_sources(str(root / "imagenet" / "train"), image_size=32, seed=1)
        assert other[1].files != parts[1].files  # another seed holds out others
        write_folder(root / "flat", classes=("",), count=20)
        flat = data.open_sources(str(root / "flat"), image_size=32, seed=0)
        assert [len(p) for p in flat] == [12, 8]


def test_bad_input_ends_in_one_line_with_status_2():
    with scratch() as root:
        fast = [*FAST, "--out", root / "run"]
        (root / "empty").mkdir()
        write_folder(root / "hole")
        (root / "hole" / "nothing").mkdir()
        write_folder(root / "mixed")
        Image.new("RGB", (32, 32)).save(root / "mixed" / "stray.png")
        write_folder(root / "few", count=3)
        refused(*fast, "--data", root / "missing", names=["missing", "--data shapes"])
        refused(*fast, "--data", root / "empty", names=["empty", "no images"])
        refused(*fast, "--data", root / "hole", names=["hole/nothing", "no images"])
        write_folder(root / "high" / "classes")
        refused(*fast, "--data", root / "high", names=["Then give --data", "high/classes"])
        refused(*fast, "--data", root / "mixed", names=["stray.png", "mixed"])
        refused(*fast, "--data", root / "few", names=["6 images", "hold out"])
        refused(*fast, "--patch-size", 6, names=["patch size 6", "power of two"])
        refused(*fast, "--image-size", 44, names=["image size 44", "patch size 8"])
        refused(*fast, "--patch-size", 64, names=["image size 32", "patch size 64"])
        refused(*fast, "--crop-min", 1.5, names=["--crop-min 1.5"])
        refused(*fast, "--ada-p", 1.5, names=["--ada-p 1.5"])
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
            assert errors.count(f"replaced: {root}/train/{name}") == 1, errors
        assert [row["bad_images"] for row in log_of(root / "run")] == [2, 2]
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


def test_heat_goes_from_the_darkest_to_the_brightest_colour_of_each_map():
    maps = torch.tensor([[[0.0, 1.0], [0.5, 0.25]], [[7.0, 7.0], [7.0, 9.0]]])
    colours = (data.heat(maps) * 255).round()
    anchors = torch.tensor(data.HEAT_COLOURS).float()
    close(colours[0, :, 0, 0], anchors[0], 0)
    close(colours[0, :, 0, 1], anchors[-1], 0)
    close(colours[0, :, 1, 0], anchors[2], 0)  # half way is the middle one of five
    close(colours[1, :, 0, 0], anchors[0], 0)
    close(colours[1, :, 1, 1], anchors[-1], 0)


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


# ---- Objects and class maps ----------------------------------------------------------------------


def slow_polygon(polygon, height, width):
    """COCO's rule in plain Python, one step of the outline at a time."""
    corners = [int(5 * value + 0.5) for value in polygon]
    corners = list(zip(corners[::2], corners[1::2], strict=True))
    points = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        wide, steps = abs(x1 - x0) >= abs(y1 - y0), max(abs(x1 - x0), abs(y1 - y0))
        back = x0 > x1 if wide else y0 > y1
        (ax, ay), (bx, by) = ((x1, y1), (x0, y0)) if back else ((x0, y0), (x1, y1))
        for n in range(steps + 1):
            n = steps - n if back else n
            if wide:
                slope = (by - ay) / steps if steps else 0
                points.append((ax + n, int(ay + slope * n + 0.5)))
            else:
                points.append((int(ax + (bx - ax) / steps * n + 0.5), ay + n))
    mask = np.zeros((height, width), bool)
    for (u0, v0), (u1, v1) in itertools.pairwise(points):
        column, row = (min(u0, u1) + 0.5) / 5 - 0.5, math.ceil((min(v0, v1) + 0.5) / 5 - 0.5)
        if u0 != u1 and column == int(column) and 0 <= column < width:
            # All that follows changes sides, in later columns, too: outlines close and undo it.
            flat = mask.T.reshape(-1).copy()
            flat[int(column) * height + min(max(row, 0), height) :] ^= True
            mask = flat.reshape(width, height).T
    return mask


def test_polygons_cover_the_pixels_that_coco_gives_them():
    box = data.polygons_to_mask([[2, 2, 6, 2, 6, 5, 2, 5]], 8, 9)
    expected = np.zeros((8, 9), bool)
    expected[2:5, 2:6] = True  # 12 pixels, where PIL fills 20
    assert (box == expected).all()
    assert data.polygons_to_mask([[2.5, 2.5, 6.5, 2.5, 6.5, 5.5, 2.5, 5.5]], 8, 9).sum() == 12
    both = data.polygons_to_mask([[0, 0, 3, 0, 3, 3, 0, 3], [2, 2, 6, 2, 6, 5, 2, 5]], 8, 9)
    assert both.sum() == 9 + 12 - 1  # parts unite where they meet
    rng = np.random.default_rng(0)
    for _ in range(40):  # partly outside of the image
        polygon = rng.uniform(-4, 16, 2 * rng.integers(3, 8)).round(2).tolist()
        assert (data.polygons_to_mask([polygon], 11, 13) == slow_polygon(polygon, 11, 13)).all()


def test_run_lengths_are_compressed_as_coco_does_and_come_back():
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)  # by columns: 0 0, 1 1, 1 0
    assert data.mask_to_rle(mask) == {"size": [2, 3], "counts": "231"}
    # Runs 0, 4, 2, 1: the fourth is 1 - 4 = -3, 29 in five bits; 29 + 48 is M.
    assert data.mask_to_rle(np.array([[1, 1, 1, 1, 0, 0, 1]], bool))["counts"] == "042M"
    assert data.mask_to_rle(np.zeros((40, 1), bool))["counts"] == "X1"  # 40 = 8 + 32 * 1
    rng = np.random.default_rng(0)
    for share in (0, 0.003, 0.1, 0.5, 1):
        mask = rng.random((31, 47)) < share
        packed = data.mask_to_rle(mask)
        assert (data.rle_to_mask(packed["counts"], 31, 47) == mask).all()
        runs = [0] * int(mask[0, 0]) + [len(list(g)) for _, g in itertools.groupby(mask.T.ravel())]
        assert (data.rle_to_mask(runs, 31, 47) == mask).all()
        message = refusal(data.rle_to_mask, packed["counts"], 31, 46)
        assert "1457 pixels, not 31 x 46" in message


def refusal(function, *args, **options):
    """The message of the ValueError that a call must raise; it must have one line."""
    try:
        function(*args, **options)
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("no ValueError")


def coco_content():
    """A tiny instances file: image 9 has a square and a crowd, image 4 nothing."""
    square = {"id": 0, "image_id": 9, "category_id": 7, "bbox": [1, 2, 3, 4], "area": 11.5}
    square |= {"iscrowd": 0, "segmentation": [[1, 2, 4, 2, 4, 6, 1, 6]]}
    crowd = {"id": 1, "image_id": 9, "category_id": 90, "bbox": [0, 0, 1, 8], "area": 8}
    crowd |= {"iscrowd": 1, "segmentation": {"size": [8, 12], "counts": [0, 8, 88]}}
    return {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "width": 12, "height": 8}
            for number in (9, 4)
        ],
        "categories": [{"id": 90, "name": "kite"}, {"id": 7, "name": "train"}],
        "annotations": [square, crowd],
    }


def write_coco(root, content=None):
    """Both splits of a data set in COCO's layout."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir(exist_ok=True)
        for number in (9, 4):
            Image.new("RGB", (12, 8), (number, 0, 0)).save(root / f"{split}2017" / f"{number}.jpg")
        text = content if isinstance(content, str) else json.dumps(content or coco_content())
        (root / "annotations" / f"instances_{split}2017.json").write_text(text)


def write_ade(root, size=(12, 8), top=3):
    """Both splits of a data set in ADE20K's layout, of three named classes."""
    for split in ("training", "validation"):
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            folder = root / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                picture = Image.new("RGB", (12, 8), (90, 90, 90))
                if kind == "annotations":
                    picture = Image.new("L", size, 0)
                    picture.putpixel((1, 0), top)
                picture.save(folder / f"{number}.{suffix}")
    (root / "objectInfo.txt").write_text("Idx\tRatio\tName\n1\t.5\twall\n2\t.3\tsky\n3\t.2\ttree\n")


def test_coco_scenes_read_what_the_files_say():
    with scratch() as root:
        write_coco(root)
        scenes = data.CocoScenes(root, "train")
        image, target = scenes[1]
        empty = scenes[0][1]
    assert (scenes.image_ids, scenes.category_ids, scenes.classes) == (
        [4, 9],
        [7, 90],
        ["train", "kite"],
    )
    assert image.size == (12, 8) and target["labels"].tolist() == [1, 2]
    assert target["boxes"].tolist() == [[1, 2, 4, 6], [0, 0, 1, 8]]
    assert target["crowd"].tolist() == [False, True] and target["area"].tolist() == [11.5, 8]
    expected = torch.zeros(2, 8, 12, dtype=torch.bool)
    expected[0, 2:6, 1:4] = expected[1, :, 0] = True
    assert torch.equal(target["masks"], expected)
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 8, 12)


def test_coco_scenes_refuse_what_does_not_fit_in_one_line():
    def changed(key, **values):
        content = coco_content()
        content[key][-1] |= values
        return content

    torn = json.dumps(coco_content())[:-30]
    mask = {"size": [8, 11], "counts": [88]}
    for content, words in (
        (torn, "torn or not COCO's"),
        ("[]", "torn or not COCO's"),
        ('{"images": []}', "torn or not COCO's"),
        (changed("annotations", image_id=5), "annotation 1 is of image 5, which is not listed"),
        (changed("annotations", category_id=8), "annotation 1 is of category 8"),
        (changed("annotations", bbox=[1, 2]), "annotation 1 has a box of 2 numbers"),
        (changed("annotations", segmentation=mask), "mask of [8, 11], its image [8, 12]"),
        (changed("images", file_name="none.jpg"), "not there, such as"),
    ):
        with scratch() as root:
            write_coco(root, content)
            message = refusal(data.open_scenes, str(root), "detect", image_size=8)
            assert words in message and str(root / "annotations") in message, message
    with scratch() as root:
        write_coco(root)
        Image.new("RGB", (12, 9)).save(root / "val2017" / "4.jpg")
        message = refusal(data.open_scenes, str(root), "detect", image_size=8)
        assert "4.jpg has (12, 9) pixels" in message
        assert "is ADE20K's layout" not in refusal(data.CocoScenes, root / "train2017", "val")


def test_ade_scenes_read_their_files_and_refuse_what_does_not_fit():
    with scratch() as root:
        write_ade(root)
        scenes = data.AdeScenes(root, "validation")
        image, target = scenes[2]
        assert scenes.classes == ["wall", "sky", "tree"] and image.size == (12, 8)
        assert target.shape == (8, 12) and target.dtype == torch.uint8
        assert target[0, 1] == 2 and (target == 255).sum() == 95  # 3 is class 2, 0 is ignored
        for changes, words in (
            ({"top": 4}, "0.png has label 4, beyond the 3 classes"),
            ({"size": (8, 12)}, "0.png has (8, 12) pixels (width, height), its image (12, 8)"),
        ):
            write_ade(root, **changes)
            assert words in refusal(data.open_scenes, str(root), "segment", image_size=8)
        (root / "annotations" / "training" / "1.png").unlink()
        assert "1 maps are missing, such as" in refusal(data.AdeScenes, root, "training")
        (root / "objectInfo.txt").unlink()
        assert len(data.AdeScenes(root, "validation").classes) == 150


def test_each_task_recognises_the_other_tasks_layout():
    with scratch() as root:
        write_coco(root / "coco")
        write_ade(root / "ade")
        words = refusal(data.open_scenes, str(root / "ade"), "detect", image_size=8)
        assert "this is ADE20K's layout, of segmentation" in words
        words = refusal(data.open_scenes, str(root / "coco"), "segment", image_size=8)
        assert "this is COCO's layout, of detection" in words
        assert "does not exist" in refusal(data.open_scenes, "none", "detect", image_size=8)


def test_shapes_give_the_visible_part_of_each_object():
    shapes = data.Shapes("val", 32)
    back, hidden, front = (
        data.DrawnObject(kind, x, 0.5, radius, 0, "plain", 0, 0.1, 0, ())
        for kind, x, radius in ((2, 0.4, 0.3), (5, 0.6, 0.05), (0, 0.6, 0.2))
    )
    with mock.patch.object(shapes, "scene", lambda index: [back, hidden, front]):
        target, kinds = shapes.detection(0), shapes.segmentation(0)
    expected = torch.zeros(32, 32, dtype=torch.uint8)
    for row, column in itertools.product(range(32), repeat=2):
        x, y = (column + 0.5) / 32, (row + 0.5) / 32
        if max(abs(x - 0.4), abs(y - 0.5)) <= 0.3 * 0.7071:  # the square of class 2
            expected[row, column] = 3
        if math.hypot(x - 0.6, y - 0.5) <= 0.2:  # the disc before it, and before the cross
            expected[row, column] = 1
    assert torch.equal(kinds, expected)
    assert target["labels"].tolist() == [3, 1]
    assert torch.equal(target["masks"], torch.stack([expected == 3, expected == 1]))
    assert target["area"].tolist() == [(expected == 3).sum(), (expected == 1).sum()]
    # The disc: 12.8 to 25.6 by 9.6 to 22.4 px, so the centres 13.5 to 25.5 by 10.5 to 21.5.
    assert target["boxes"][1].tolist() == [13, 10, 26, 22]


def dense_set(task, count=6, **options):
    """A `DenseSet` of shapes 48 px wide, at 32 px."""
    scenes = data.ShapeScenes(data.Shapes("train", 48), task)
    return data.DenseSet(scenes, range(count), image_size=32, seed=3, task=task, **options)


def test_dense_samples_depend_on_seed_epoch_and_index_alone():
    for task in ("detect", "segment"):
        dataset = dense_set(task)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = [dataset[(1, index)] for index in range(6)]
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        for index in (4, 0, 2):  # in any order
            assert_close(dense_set(task)[(1, index)], first[index], rtol=0, atol=0)
        assert not torch.equal(dataset[(2, 0)][0], first[0][0])
        images, targets, _, bad = data.collate(first)
        assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8 and not bad
        shape = targets.shape if task == "segment" else len(targets)
        assert shape == ((6, 32, 32) if task == "segment" else 6)


def test_maps_stay_on_their_image_in_random_views():
    rows, columns = torch.arange(60)[:, None], torch.arange(90)
    truth = ((rows // 15 + columns // 15) % 2).byte()  # a chessboard, its colours its classes
    image = (truth * 255).expand(3, -1, -1).contiguous()
    views = set()
    for ratio in (0.35, 0.5, 0.8, 1.3, 2.6):
        for seed in range(8):
            torch.manual_seed(seed)
            view, maps = data.random_view(image, truth[None], size=64, ratio=ratio, fill=255)
            inside = maps[0] != 255
            white, clear = view[0] > 127, (view[0] - 127.5).abs() > 10  # no tie of two fields
            assert (white == (maps[0] == 1))[inside & clear].all(), ratio
            assert (view[:, ~inside].T == torch.tensor(data.MEAN_COLOUR)).all()
            height, width = inside.any(1).sum().item(), inside.any(0).sum().item()
            assert inside[:height, :width].all()  # the rest is at the right and the bottom
            expected = [min(64, round(60 * ratio)), min(64, round(90 * ratio))]
            assert [height, width] == expected
            views.add(maps.numpy().tobytes())
    assert len(views) > 20  # of 40: mirrored only, where nothing is cut off


def test_boxes_end_where_the_last_pixel_of_their_mask_ends():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[1, 1:4, 2:7] = True
    masks[2, 0, 0] = masks[2, 5, 7] = True
    assert data.mask_boxes(masks).tolist() == [[3, 2, 4, 3], [2, 1, 7, 4], [0, 0, 8, 6]]
    target = data.objects_in(torch.stack([masks[0] * 0, masks[1]]), torch.tensor([4, 5]))
    assert target["labels"].tolist() == [5] and target["boxes"].tolist() == [[2, 1, 7, 4]]


def test_training_leaves_out_crowds_and_evaluation_keeps_them():
    with scratch() as root:
        write_coco(root)
        scenes = data.CocoScenes(root, "train")
        common = dict(image_size=16, seed=0, task="detect")
        trained = data.DenseSet(scenes, [0, 1], scales=(1.0, 1.0), **common)
        measured = data.DenseSet(scenes, [1], augment=False, **common)
        _, target, _, _ = trained[(1, 1)]
        assert target["labels"].tolist() == [1] and target["masks"].shape == (1, 16, 16)
        nothing = trained[(1, 0)][1]
        assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 16, 16)
        image, target, _, _ = measured[(0, 0)]
    assert target["crowd"].tolist() == [False, True] and target["index"] == 1
    assert target["letterbox"] == data.Letterbox(8, 12, 11, 16)  # 8 * 16 / 12 = 10.7
    assert (image[:, 11:].permute(1, 2, 0) == torch.tensor(data.MEAN_COLOUR)).all()


def test_an_unreadable_scene_is_replaced_in_training_and_not_measured():
    for task, write, Scenes, splits, name in (
        ("detect", write_coco, data.CocoScenes, ("train", "val"), "train2017/4.jpg"),
        ("segment", write_ade, data.AdeScenes, ("training",), "annotations/training/0.png"),
    ):
        with scratch() as root:
            write(root)
            scenes = Scenes(root, splits[0])
            (root / name).write_bytes(b"torn")
            common = dict(image_size=16, seed=0, task=task)
            trained = data.DenseSet(scenes, [0, 1], **common)
            (image, target, _, bad), other = trained[(1, 0)], trained[(1, 1)]
            assert [index for index, _ in bad] == [0] and not other[3]
            assert target is not None and image.shape == (3, 16, 16)
            measured = data.DenseSet(scenes, [0, 1], augment=False, **common)
            assert measured[(0, 0)][1] is None and measured[(0, 1)][1]["index"] == 1
            alone = data.DenseSet(scenes, [0], **common)[(1, 0)]  # the run is about to end
            assert len(alone[3]) == 1 and not alone[0].any()
            data.collate([alone, other])


def test_boxes_come_back_from_a_letterbox_and_stay_in_the_image():
    generator = torch.Generator().manual_seed(0)
    for height, width, size in ((427, 640, 224), (31, 1000, 64), (640, 426, 512), (50, 50, 64)):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, 0, 0] = 255
        square, place = data.letterbox(image, size)
        assert square.shape == (3, size, size)
        corners = torch.rand(20, 2, 2, generator=generator) * torch.tensor([width, height])
        boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
        inside = boxes.clone()
        inside[:, ::2] *= place.columns / width
        inside[:, 1::2] *= place.rows / height
        close(data.boxes_to_image(inside, place), boxes, 1e-3)
        beyond = data.boxes_to_image(torch.tensor([[-5.0, -5.0, size + 5.0, size + 5.0]]), place)
        close(beyond, [[0, 0, width, height]], 1e-3)
        assert data.maps_to_image(torch.rand(2, size, size), place).shape == (2, height, width)


def test_maps_come_back_from_a_letterbox_where_they_were():
    place = data.Letterbox(20, 40, 8, 16)  # of a 16 px square
    x = (torch.arange(16) + 0.5) * 40 / 16  # of each column's centre, in the image's pixels
    back = data.maps_to_image(x.expand(1, 16, 16), place)[0]
    close(back[:, 2:-2], (torch.arange(40) + 0.5).expand(20, 40)[:, 2:-2], 1e-4)


# ---- Runs ----------------------------------------------------------------------------------------


def test_norm_pix_pictures_put_back_true_statistics():
    # A network that predicts each patch's normalised target perfectly shows the very image.
    run, args = tiny_run("--norm-pix-loss")
    images, noise, _ = tiny_batch(1)
    target = losses.patchify(model.imagenet_normalize(images), 8)
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    perfect = model.imagenet_denormalize(model.unpatchify(target, 8))
    run.mae.reconstruct = lambda *_: ([perfect], torch.ones(1, 16))
    close(train.reconstruct(run, images, noise, args)[0], images, 1e-5)


def test_pictures_show_the_whole_reconstruction_where_all_of_it_was_trained():
    images, noise, _ = tiny_batch(2)
    images = (255 * images).byte()
    for flags, whole in ((["--loss", "mse"], False), (["--loss", "ms_ssim"], True)):
        run, args = tiny_run(*flags)
        with mock.patch.object(data, "save_picture") as save:
            train.draw_reconstructions("x.png", run, images, noise, args)
        columns = save.call_args[0][1]
        assert ("reconstruction" in columns) == whole and "pasted" in columns, list(columns)


def test_a_run_says_where_it_begins_how_it_goes_on_and_that_it_ends_below_mean_fill():
    flags = ["--limit-images", 8, "--epochs", 1, "--lr", 1e-9, "--out"]
    with scratch() as root, mock.patch.object(train, "say") as say:
        for more in (["--steps", 1], []):
            assert command(*FAST, *flags, root, *more)[0] == 0
    lines = [call.args[0] for call in say.call_args_list]
    expected = ["from the start: 8 training images, 4 per step", "to continue, raise --steps"]
    expected += [
        "from step 1: 8 training images",
        "try more than 2 steps, or another --lr than 1e-09",
    ]
    places = [next(i for i, line in enumerate(lines) if words in line) for words in expected]
    assert places == sorted(places), lines


def test_the_demo_says_in_words_what_it_reached():
    for psnr, words in ((19.0, "4.9 dB above the mean colour"), (13.5, "0.6 dB below the mean")):
        with scratch() as root, mock.patch.object(train, "say") as say:
            train.write_row({"epoch": 5, "psnr": psnr, "psnr_mean_fill": 14.1}, root)
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
    run.mae.reconstruct = lambda *_: ([off], mask)
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
        assert pictures == ["curves.png", *(f"epoch_000{n}.png" for n in (1, 2, 4))]


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


def test_benchmark_averages_steps_with_lazy_regularisers_in():
    # A clock in which a step takes 1 s, 5 s where its place in a round of 4 is the path length's,
    # and 100 s twice by accident, one of them a warm-up: (5 + 1 + 1 + 1) / 4.
    now, steps = [0.0], []

    def step(run, batches, active, progress, args):
        steps.append(progress["step"])
        assert run.ada.p == 0.5 and active
        now[0] += 100 if len(steps) in (1, 9) else 5 if progress["step"] == 0 else 1
        return {}

    clock, printed = SimpleNamespace(perf_counter=lambda: now[0]), io.StringIO()
    fake = dict(step_gradients=step, update=lambda run, apply: None, time=clock)
    with mock.patch.multiple(train, **fake), contextlib.redirect_stdout(printed):
        train.main([*FAST, "--loss", "stylegan2_ada_p", "--benchmark", "11"])
    assert steps == [0, 0, *range(4), *range(4), *range(4)]  # 2 to warm up, 11 made whole rounds
    row = json.loads(printed.getvalue())
    assert row["seconds_per_step"] == 2.0 and row["images_per_second"] == 2.0


def test_checkpoints_are_measured_and_drawn_side_by_side():
    with scratch() as root:
        for loss in ("mse", "msg_gan_p"):
            flags = [*FAST, "--loss", loss, "--limit-images", 8, "--out", root / loss]
            assert command(*flags, "--epochs", 3, "--eval-every", 2)[0] == 0
            assert ["psnr_full" in row for row in log_of(root / loss)] == [False, True, True]
        mse, msg = (root / loss / "checkpoint.pt" for loss in ("mse", "msg_gan_p"))
        given = [*RECONSTRUCT, "--val-images", 2, "--checkpoint", mse]
        assert tune(*given, msg, "--inception-weights", "none", "--out", root / "both")[0] == 0
        both = json.loads((root / "both" / "eval.json").read_text())
        assert both["images"] == 2 and list(both["results"]) == ["mse", "msg_gan_p"]
        for row in both["results"].values():
            assert row["psnr_pasted"] > row["psnr"] and "fid_full" not in row
        names = ["attention.png", "attention_mse.png", "attention_msg_gan_p.png"]
        names += ["curves_mse.png", "curves_msg_gan_p.png", "reconstruction.png"]
        assert sorted(p.name for p in (root / "both" / "pictures").iterdir()) == sorted(names)
        # One alone, with IS and FID.
        torch.save(stand_in(), root / "inception.pth")
        given += ["--inception-weights", root / "inception.pth", "--out", root / "alone"]
        assert tune(*given)[0] == 0
        alone = json.loads((root / "alone" / "eval.json").read_text())
        assert list(alone["results"]) == ["real", "mse"] and "not the file" in alone["inception"]
        row = alone["results"]["mse"]
        assert row["psnr_full"] == both["results"]["mse"]["psnr_full"] and row["fid_full"] > 0


def test_what_cannot_be_measured_is_refused():
    with scratch() as root:
        small, large = root / "small.pt", root / "large.pt"
        save_autoencoder(small)
        save_autoencoder(large, "--image-size", "64")
        tune_refused(*RECONSTRUCT, names=["--checkpoint is missing"])
        tune_refused(*RECONSTRUCT, "--checkpoint", "none", names=["random weights"])
        given = [*RECONSTRUCT, "--out", root / "out", "--checkpoint", small]
        tune_refused(*given, large, names=["image-size 64", "apart"])
        tune_refused(*given, "--image-size", 64, names=["--image-size 32, not 64"])
        given += ["--inception-weights"]
        tune_refused(*given, small, names=["Inception weights", "6726825d"])
        torch.save({"fc.bias": torch.zeros(1008)}, root / "part.pth")
        tune_refused(*given, root / "part.pth", names=["missing: Conv2d_1a", "more"])
        tune_refused(*given, root / "no.pth", names=["no.pth", "not exist"])


CKA = ["--task", "cka", "--data", "shapes", "--workers", "0"]


def test_cka_compares_any_checkpoints_and_random_weights_block_by_block():
    with scratch() as root:
        for loss in ("mse", "msg_gan_p"):
            (root / loss).mkdir()
            save_autoencoder(root / loss / "checkpoint.pt", "--loss", loss, "--seed", "1")
        mse, msg = (root / loss / "checkpoint.pt" for loss in ("mse", "msg_gan_p"))
        weights = torch.load(mse, weights_only=True)["mae"]
        torch.save({"model": weights}, root / "published.pth")
        given = [*CKA, "--val-images", 14, "--batch-size", 6]  # 6, 6, and 2: too few
        files = ["none", mse, msg, root / "published.pth"]
        assert tune(*given, "--checkpoint", *files, "--out", root / "out")[0] == 0
        found = json.loads((root / "out" / "cka.json").read_text())
        names = ["mse", "msg_gan_p", "published", "random weights"]
        assert list(found["cka"]) == names and found["images"] == 12
        assert found["cka"]["published"] == found["cka"]["mse"]
        assert found["cka"]["random weights"] != found["cka"]["mse"]
        values = torch.tensor(found["cka"]["mse"])
        assert values.shape == (9, 6) and found["ratios"] == [n / 10 for n in range(1, 10)]
        assert (values[0] > values[-1]).all()  # .1 and .9 hidden
        assert (root / "out" / "pictures" / "cka.png").exists()
        # By hand: the third block where .7 is hidden.
        encoder = model.build_encoder("tiny", 32, 8, 0.0)
        model.load_whole(encoder, model.encoder_weights(weights, 4, ""), "")
        source = data.open_sources("shapes", image_size=32, seed=0)[1]
        dataset = data.PretrainSet(
            source, augment=False, limit=14, image_size=32, num_patches=16, seed=0
        )
        images, noise, *_ = data.collate([dataset[0, i] for i in range(12)])
        visible = noise.argsort(dim=1)[:, :4]  # int(16 * .3)
        tokens = [encoder.encode(images / 255, ids, [3])[1][0] for ids in (visible, None)]
        mean = [*given, "--pool", "mean", "--checkpoint", mse, "--out", root / "mean"]
        assert tune(*mean)[0] == 0
        of_means = torch.tensor(json.loads((root / "mean" / "cka.json").read_text())["cka"]["mse"])
        for part, measured in ((slice(0, 1), values), (slice(1, None), of_means)):
            x, y = (t[:, part].mean(dim=1).detach().double() for t in tokens)
            hsic = [
                sum(
                    slow_hsic(a[n : n + 6] @ a[n : n + 6].T, b[n : n + 6] @ b[n : n + 6].T)
                    for n in (0, 6)
                )
                for a, b in ((x, y), (x, x), (y, y))
            ]
            close(measured[6, 2], hsic[0] / (hsic[1] * hsic[2]) ** 0.5, 1e-4)


def test_cka_sums_of_two_processes_are_those_of_their_parts_and_bad_images_are_left_out():
    with scratch() as root:
        write_folder(root / "train", count=2)
        write_folder(root / "val", count=10)
        flags = [*CKA, *RANDOM, "--data", root, "--batch-size", 5, "--seed", 3]
        (root / "val" / "b" / "3.png").write_text("not an image")
        parts, real = [], train.of_all_processes

        def gather(thing):  # one process after the other; the last one sees all
            if isinstance(thing, tuple):
                parts.append(thing)
                return parts
            return real(thing)

        for rank in range(2):
            place = dict(rank=lambda n=rank: n, world_size=lambda: 2, is_main=lambda n=rank: n == 1)
            with mock.patch.multiple(train, of_all_processes=gather, **place):
                with mock.patch.object(finetune, "is_main", place["is_main"]):
                    assert tune(*flags, "--out", root / "two")[0] == 0
        found = json.loads((root / "two" / "cka.json").read_text())
        assert found["images"] == 19 and [count for _, count in parts] in ([10, 9], [9, 10])
        total = parts[0][0]["random weights"] + parts[1][0]["random weights"]
        close(found["cka"]["random weights"], losses.cka(total), 0)
        status, errors = tune(*flags, "--out", root / "one")
        assert status == 0 and errors.count("left out: ") == 1 and "b/3.png" in errors, errors
        one = json.loads((root / "one" / "cka.json").read_text())
        assert one["images"] == 19 and one["unreadable"] == 1 and one["seed"] == 3


def test_cka_refuses_what_it_cannot_compare_in_one_line():
    with scratch() as root:
        small, large = root / "small.pt", root / "large.pt"
        save_autoencoder(small)
        save_autoencoder(large, "--image-size", "64")
        given = [*CKA, "--val-images", 8, "--out", root / "out", "--checkpoint"]
        tune_refused(*given, small, large, names=["large.pt", "(64, 8)", "(32, 8)", "apart"])
        tune_refused(*given, small, "--batch-size", 3, names=["--batch-size 3", "4"])
        tune_refused(*given, small, "--val-images", 3, names=["3 images", "too few"])
        tune_refused(*given, small, "--patch-size", 4, names=["--patch-size 4", "has 8"])
        few = ["--model", "nano", "--image-size", 32, "--patch-size", 16]
        tune_refused(*given, "none", *few, names=["none of 4 patches"])
        tune_refused(*given, root / "no.pt", "none", names=["no.pt does not exist"])
        tune_refused(*given, small, "--eval", names=["--eval", "--task cka"])
        tune_refused("--task", "knn", "--checkpoint", small, large, names=["reconstruct and cka"])
        assert not (root / "out").exists()
    parsed = [
        finetune.parse_args(["--task", task, "--checkpoint", "none"]) for task in ("cka", "knn")
    ]
    assert [args.batch_size for args in parsed] == [256, 32]


def test_an_evaluation_takes_the_images_that_training_held_out():
    with scratch() as root:
        write_folder(root / "photos", count=20)  # 40 images, 8 of them held out
        given = [*RECONSTRUCT, "--data", root / "photos", "--inception-weights", "none"]
        for seed in (1, 2):
            flags = [*FAST, "--data", root / "photos", "--out", root / str(seed), "--epochs", 1]
            assert command(*flags, "--seed", seed, "--val-images", 8)[0] == 0
        one, two = (root / str(seed) / "checkpoint.pt" for seed in (1, 2))
        assert tune(*given, "--checkpoint", one)[0] == 0
        found = json.loads((root / "1" / "reconstruct" / "eval.json").read_text())
        [log] = log_of(root / "1")
        assert found["images"] == 8 and found["seed"] == 1
        close(found["results"]["mse"]["psnr_full"], log["psnr_full"], 1e-3)
        tune_refused(*given, "--checkpoint", one, two, names=["different images", "val"])
        for task in ("knn", "cka"):  # tasks that take --seed: the images held out must be the same
            flags = ["--task", task, "--data", root / "photos", "--workers", 0, "--batch-size", 4]
            flags += ["--checkpoint", one, "--out", root / task]
            tune_refused(*flags, "--seed", 2, names=["give --seed 1", "photos/val"])
            assert tune(*flags, "--seed", 1)[0] == 0
        with open(root / "1" / "log.jsonl", "a") as log:
            log.write('{"epoch": 2, "ps')  # a full disk
        assert tune(*given, "--checkpoint", one)[0] == 0


def test_unreadable_images_are_left_out_of_an_evaluation():
    with scratch() as root:
        write_folder(root / "train", count=4)
        write_folder(root / "val", count=4)
        flags = [*FAST, "--data", root, "--out", root / "run"]
        assert command(*flags, "--epochs", 1)[0] == 0
        (root / "val" / "a" / "2.png").write_text("not an image")
        given = [*RECONSTRUCT, "--checkpoint", root / "run" / "checkpoint.pt", "--data", root]
        status, errors = tune(*given, "--inception-weights", "none", "--out", root / "out")
        result = json.loads((root / "out" / "eval.json").read_text())
        assert status == 0 and "left out" in errors and "a/2.png" in errors
        assert (result["images"], result["unreadable"]) == (7, 1)


def test_a_benchmark_of_all_rows_prints_each_relative_to_mse():
    def run(command, **options):  # the row's own process; here within this one
        assert command[:2] == [sys.executable, train.__file__]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = train.main(command[2:])
        return SimpleNamespace(returncode=status, stdout=printed.getvalue())

    few = {name: losses.LOSSES[name] for name in ("mse", "ls_gan")}
    output, flags = io.StringIO(), [*TINY, "--benchmark", "1", "--batch-size", "2"]
    patched = mock.patch.multiple(train, LOSSES=few, subprocess=mock.Mock(run=run))
    with patched, contextlib.redirect_stdout(output):
        assert train.main([*flags, "--loss", "all"]) == 0
    rows = [line.split() for line in output.getvalue().splitlines()[1:]]
    assert [row[0] for row in rows] == ["mse", "ls_gan"] and float(rows[0][1]) == 1
    close(float(rows[1][1]), float(rows[1][2]) / float(rows[0][2]), 0.1 * float(rows[1][1]))
    refused(*TINY, "--loss", "all", names=["--loss all", "--benchmark"])


def test_a_run_within_an_epoch_keeps_its_batch_and_steps_count_from_the_start():
    with scratch() as out:
        flags = [*FAST, "--limit-images", 16, "--epochs", 2, "--out", out]
        assert command(*flags, "--steps", 3)[0] == 0  # of 4
        names = ["4 images per step (now 8)", "epoch's end"]
        refused(*flags, "--batch-size", 8, names=names)
        refused(*flags, "--limit-images", 12, names=["16 training images (now 12)"])
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
        assert unreadable == 1 and errors.getvalue().count("replaced: ") == 1
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
            refused(*flags, "--epochs", 2, *more, names=["cannot write", written, "space"])
            assert (out / "checkpoint.pt").read_bytes() == before
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
        refused(*flags, "--model", "small", names=["--model tiny (now small)"])
        refused(*flags, "--image-size", 64, names=["--image-size 32 (now 64)"])
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


def launch_pair(*flags):
    """`launch` as two processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free.getsockname()[1])
    return [launch(*flags, RANK=rank, LOCAL_RANK=rank, **place) for rank in range(2)]


def finish(processes):
    """Wait for processes, which must all succeed -> what each printed."""
    printed = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), printed
    return printed


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
        flags = ["train.py", *TINY, "--batch-size", 4, "--val-images", 4, "--workers", 2]
        # The row with the most state: ADA's p, the running mean of path lengths.
        flags += ["--loss", "stylegan2_ada_p", "--ada-images", 500, "--limit-images", 80]
        flags += ["--epochs", 2, "--save-steps", 7]
        whole = launch(*flags, "--out", folder / "once")
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
        _, printed = finish([whole, broken])
        assert f"exitcode: {-signal.SIGKILL})" in printed, printed
        assert f"exitcode: {128 + signal.SIGTERM})" in printed, printed
        assert f"stopped at step {stopped_at['step']};" in printed, printed
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
    run, args = tiny_run("--loss", loss, "--arch", arch, *flags)
    views = losses.LOSSES[loss]["views"]
    images, noise, seeds = (x[part] for x in tiny_batch(16, views=views))
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
    for loss, arch in EVERY_ROW:  # accumulated, too, where no statistic spans the batch
        accum = 1 if loss in ("stylegan2_ada_p", "c_mae") else 2
        results.append(row_gradients(loss, arch, slice(rank, None, 2), accum))
    torch.save(results, f"{folder}/rank{rank}.pt")
    train.stop_processes()


def test_two_processes_give_the_gradients_of_one_for_every_row_in_two_steps():
    with scratch() as folder:
        finish(launch_pair(__file__, "--gloo", folder))
        parts = [torch.load(f"{folder}/rank{r}.pt", weights_only=True) for r in range(2)]
    for row, first, second in zip(EVERY_ROW, *parts, strict=True):
        whole = row_gradients(*row, slice(None), 1)
        for k, tolerance in ((0, 2e-4), (1, 1e-5)):  # gradients; state
            for expected, a, b in zip(whole[k], first[k], second[k], strict=True):
                assert torch.equal(a, b), row  # the processes agree
                close(a, expected, tolerance * max(k, expected.abs().max().item()))


# ---- Siblings ------------------------------------------------------------------------------------


def sibling_terms(loss, *flags):
    """(run, args, batch, terms) of a sibling's batch, gradients in place."""
    run, args = tiny_run("--loss", loss, *flags)
    batch = tiny_batch(views=losses.LOSSES[loss]["views"])
    terms = train.backward_sibling(run, *batch[:2], 1, 1.0, args)
    return run, args, batch, terms


def normal(x):
    """Each row without its mean and deviation."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def hidden_patches(noise, hidden=12):
    """{(image, patch)} of the patches with the largest noise."""
    return {(b, n) for b, row in enumerate(noise.tolist()) for n in np.argsort(row)[-hidden:]}


def patch_of(images, n, side=4, p=8):
    y, x = divmod(n, side)
    return model.imagenet_normalize(images)[:, y * p : y * p + p, x * p : x * p + p]


def test_block_masks_hide_as_many_patches_as_they_should_in_rectangles():
    torch.manual_seed(0)
    for side, wanted in ((14, 120), (8, 39), (4, 10)):
        masks = torch.stack([data.block_mask(side, 120 / 196) for _ in range(300)])
        assert masks.shape == (300, side**2) and set(masks.unique().tolist()) == {0, 1}
        assert (masks.sum(dim=1) == wanted).all(), side
        grid = masks.view(-1, side, side)
        # In rectangles: a hidden patch's neighbour is hidden far more often than by chance, 61 %.
        beside = (grid[:, :, 1:] * grid[:, :, :-1]).sum() / grid[:, :, :-1].sum()
        assert side < 14 or beside > 0.85, beside
        coverage = grid.mean(dim=0)  # anywhere, but corners, which few rectangles reach, less often
        assert coverage.min() > 0.05 and coverage[0, 0] < coverage[side // 2, side // 2]
        close(coverage, coverage.T, 0.2)  # upright rectangles as often as flat ones
    common = dict(image_size=32, num_patches=196, seed=0, blocks=120 / 196)
    dataset = data.PretrainSet(data.Shapes("train", 32), **common)
    noise = dataset[1, 0][1]
    assert torch.equal(noise, dataset[1, 0][1]) and (noise >= 1).sum() == 120
    _, _, mask = model.random_masking(noise[None], 0.75)
    assert mask.sum() == 147 and (mask[0] >= (noise >= 1)).all()  # blocks, and 27 others


def test_two_views_are_two_colourings_of_one_crop():
    source = data.Shapes("train", 32)
    common = dict(image_size=32, num_patches=16, seed=0)
    coloured = data.PretrainSet(source, views=2, **common)
    plain = data.PretrainSet(source, views=2, jitter=0, **common)
    whole = data.PretrainSet(source, views=2, augment=False, **common)
    single = data.PretrainSet(source, jitter=0, **common)
    differ, grey, alike = 0, 0, []
    for key in itertools.product((1, 2), range(30)):
        views, noise, *_ = coloured[key]
        assert views.shape == (2, 3, 32, 32) and views.dtype == torch.uint8
        assert torch.equal(views, coloured[key][0])  # a function of seed, epoch and index
        crop = single[key][0]
        for same in (plain[key], whole[key]):  # without colours both views are the image
            assert torch.equal(same[0][0], same[0][1]) and torch.equal(same[1], noise)
        assert torch.equal(plain[key][0][0], crop)
        # Colours keep edges where they are: a view varies along with its crop, not with another.
        flat = [x.float().mean(dim=0).flatten() for x in (crop, *views)]
        alike += torch.corrcoef(torch.stack(flat))[0, 1:].tolist()
        differ += not torch.equal(*views)
        grey += sum(torch.equal(view[0], view[1]) for view in views)
    assert np.median(alike) > 0.95 and np.mean(alike) > 0.9, alike
    assert differ >= 55 and 12 <= grey <= 40, (differ, grey)  # of 60; of 120 at chance 1/5


def test_hidden_patches_weigh_by_how_many_of_their_neighbours_are_hidden():
    mask = torch.zeros(1, 5, 5)
    mask[0, 0, 0] = 1
    mask[0, 2:, 2:] = 1
    weights = losses.mask_density(mask.flatten(1)).view(5, 5)
    close(weights[0, 0], 10 / 9, 1e-6)  # a corner alone
    close(weights[3, 3], 2, 1e-6)  # within a block
    close(weights[4, 4], 1 + 4 / 9, 1e-6)  # beyond the image nothing is hidden
    close(weights[2, 2], 1 + 4 / 9, 1e-6)


def test_cross_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours = model.CrossAttention(24, 3, 40)
    theirs = torch.nn.MultiheadAttention(24, 3, kdim=40, vdim=40, batch_first=True)
    k, v = ours.kv.weight.chunk(2)
    pairs = {"q_proj_weight": ours.q.weight, "k_proj_weight": k, "v_proj_weight": v}
    pairs |= {"out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias}
    for layer in (ours.q, ours.kv, ours.proj):
        torch.nn.init.normal_(layer.bias)
    pairs["in_proj_bias"] = torch.cat([ours.q.bias, ours.kv.bias])
    theirs.load_state_dict({name: value.detach() for name, value in pairs.items()})
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 40)
    close(ours(x, context), theirs(x, context, context, need_weights=False)[0].detach(), 1e-5)


def test_feature_mae_and_boot_mae_compare_what_they_should():
    for loss in ("feature_mae", "boot_mae"):
        run, args, (images, noise, _), terms = sibling_terms(loss)
        with torch.no_grad():
            seen = run.mae(images, 0.75, noise)
        features, target, mask = seen[-3:]
        assert {(b, n) for b, n in mask.nonzero().tolist()} == hidden_patches(noise)
        assert target.shape == (4, 16, 128 if loss == "feature_mae" else 192)
        # The target: a plain ViT of the teacher's weights, the whole image, no final norm.
        size = "nano" if loss == "feature_mae" else "tiny"
        shape = {k: model.MAE_SIZES[size][k] for k in ("width", "depth", "heads")}
        vit = model.ViT(image_size=32, patch_size=8, **shape)
        vit.load_state_dict(run.mae.teacher.state_dict(), strict=False)
        vit.norm = torch.nn.Identity()
        close(target, vit(images)[:, 1:].detach(), 1e-5)
        weight = losses.mask_density(mask) if loss == "boot_mae" else torch.ones(4, 16)
        total, pixel = 0, 0
        for b, n in hidden_patches(noise):
            error = (normal(features[b, n]) - normal(target[b, n])).square().mean()
            total += weight[b, n] * error / 48
            if loss == "boot_mae":
                error = (patch_of(seen[0][b], n) - patch_of(images[b], n)).square().mean()
                pixel += weight[b, n] * error / 48
        ramp = 4 / args.epochs if loss == "boot_mae" else 1  # of the first epoch
        close(terms["features"], ramp * total, 1e-5)
        if loss == "boot_mae":
            close(terms["pixel"], pixel, 1e-5)
            for epoch, part in ((1, 0.04), (20, 0.8), (25, 1), (100, 1)):
                args.epochs = 100
                weighed = train.boot_mae_terms(run, images, noise, epoch, args)["features"]
                close(weighed, part * total, 1e-5)
        assert all(p.grad is None for p in run.mae.teacher.parameters())


def test_boot_mae_paints_from_an_early_level_and_guesses_features_from_the_last():
    run, _, (images, noise, _), _ = sibling_terms("boot_mae")
    ids_keep, ids_restore, _ = model.random_masking(noise, 0.75)
    x, levels = run.mae.encode(images, ids_keep, [0, 1, 6])
    assert [len(d.blocks) for d in (run.mae.regressor, run.mae.predictor)] == [2, 2]
    image, features, _, _ = run.mae(images, 0.75, noise)
    patches = run.mae.regressor(x, ids_restore, levels[1])
    close(image, model.imagenet_denormalize(model.unpatchify(patches, 8)), 1e-6)
    close(features, run.mae.predictor(x, ids_restore, levels[2]), 1e-6)
    [again], mask = run.mae.reconstruct(images, 0.75, noise)
    assert torch.equal(again, image) and mask.sum() == 48


def test_r_mae_sees_the_halves_that_it_should_and_compares_what_it_should():
    visible = {"complement": 12, "independent": 12, "whole": 16}
    for second, count in visible.items():
        run, args, (images, noise, _), terms = sibling_terms("r_mae", "--second", second)
        images = images.clone().requires_grad_()
        first, other, counted = run.mae(images, 0.75, noise)
        hidden = torch.zeros(4, 16)
        for b, n in hidden_patches(noise):
            hidden[b, n] = 1
        seen = []  # by what each view's painting depends on
        for painting in (first, other):
            (grad,) = torch.autograd.grad(painting.sum(), images, retain_graph=True)
            seen.append(losses.patchify(grad, 8).abs().amax(dim=2) > 0)
        assert torch.equal(seen[0], hidden == 0) and (seen[1].sum(dim=1) == count).all()
        assert second != "complement" or torch.equal(seen[1], hidden == 1)
        assert torch.equal(counted.bool(), (hidden == 1) & seen[1])
        if second == "complement":  # MAE itself, on the complementary noise
            [expected], _ = model.MAE.forward(run.mae, images, 0.25, -noise)
            close(other, expected, 1e-5)
        [expected], _ = run.mae.reconstruct(images, 0.75, noise)
        assert torch.equal(expected, first)
        agreement = pixel = 0
        places = counted.nonzero().tolist()
        for b, n in places:
            mine, theirs, true = (patch_of(x[b], n) for x in (first, other, images))
            agreement += (mine - theirs).square().mean() / len(places)
            pixel += (theirs - true).square().mean() / len(places)
        close(terms["disagreement"], agreement.detach(), 1e-5)
        close(terms["pixel"], pixel.detach(), 1e-5)


def test_independent_views_hide_independently_at_every_patch():
    torch.manual_seed(0)
    mae = model.build_sibling("r_mae", "nano", 20, 4, second="independent")
    mae.decode = lambda inputs: inputs  # only the masks matter here
    mae.decoder_inputs = lambda *_: [None]
    noise = torch.rand(20000, 25)  # 6 of 25 visible to the first, 19 to the second
    hidden, counted = model.random_masking(noise, 0.75)[2], mae(None, 0.75, noise)[2]
    close(counted.mean(dim=0), torch.full((25,), 0.76 * 0.76), 0.02)
    # One view's hidden patch tells nothing of the other's sight anywhere.
    seen = torch.where(hidden > 0, counted, 0.76)  # known where the first is blind
    joint = (hidden - hidden.mean(dim=0)).T @ (seen - seen.mean(dim=0)) / len(noise)
    assert joint.abs().max() < 0.02, joint.abs().max()


def test_contrast_has_its_hand_value_and_chance_is_the_logarithm_of_the_batch():
    # Two images at one place. Cosines: .6 and 1 with their own, 0 and .8 with the other's target.
    queries = torch.tensor([[[2.0, 0.0]], [[0.6, 0.8]]])
    targets = torch.tensor([[[0.6, 0.8]], [[0.0, 5.0]]])
    s = [[0.6, 0.0], [1.0, 0.8]]

    def by_hand(rows, right, temperature):
        scores = [[math.exp(v / temperature) for v in row] for row in rows]
        parts = [row[i] / sum(row) for row, i in zip(scores, right, strict=True)]
        return -sum(map(math.log, parts)) / len(parts)

    close(losses.info_nce(queries, targets), by_hand(s, [0, 1], 0.2), 1e-6)
    # The same targets as the second and third of three processes' four.
    more = torch.cat([torch.tensor([[[-1.0, 0.0]]]), targets, torch.tensor([[[0.0, -1.0]]])])
    s = [[-1, 0.6, 0.0, 0], [-0.6, 1.0, 0.8, -0.8]]
    close(losses.info_nce(queries, more, 1, 0.5), by_hand(s, [1, 2], 0.5), 1e-6)
    same = torch.ones(7, 3, 5)
    close(losses.info_nce(same, same), math.log(7), 1e-6)
    close(losses.byol_loss(queries, targets), 2 - 0.6 - 0.8, 1e-6)
    torch.manual_seed(0)  # places are compared with their own kind alone: a loop
    q, t = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    total = 0
    for b, n in itertools.product(range(3), range(4)):
        scores = torch.stack([F.cosine_similarity(q[b, n], t[m, n], dim=0) / 0.2 for m in range(3)])
        total -= scores.log_softmax(dim=0)[b] / 12
    close(losses.info_nce(q, t), total, 1e-6)


def test_c_mae_compares_complementary_views_at_the_same_place():
    for loss, grain, symmetric in (
        ("c_mae", "token", False),
        ("c_mae", "mean", True),
        ("byol_mae", "cls", True),
    ):
        flags = ["--grain", grain, *["--symmetric"] * symmetric]
        run, args, (views, noise, _), terms = sibling_terms(loss, *flags)
        hidden = torch.zeros(4, 16)
        for b, n in hidden_patches(noise):
            hidden[b, n] = 1
        # Which patches of which view do queries and targets depend on?
        views.requires_grad_()
        pairs = run.mae(views, 0.75, noise)
        assert len(pairs) == 1 + symmetric
        for direction, (queries, targets) in enumerate(pairs):
            assert queries.shape == targets.shape == (4, 16 if grain == "token" else 1, 192)
            assert not targets.requires_grad
            (grad,) = torch.autograd.grad(queries.square().sum(), views, retain_graph=True)
            seen = losses.patchify(grad[:, direction], 8).abs().amax(dim=2) > 0
            assert torch.equal(seen, hidden == direction)
            assert grad[:, 1 - direction].abs().max() == 0
            # Targets: the same network, without predictor, as long as the teacher is its copy.
            other = views[:, 1 - direction].detach()
            expected = run.mae.embed(other, hidden if direction else 1 - hidden)
            close(targets, expected.detach(), 1e-6)
        name = "contrast" if loss == "c_mae" else "disagreement"
        compare = losses.info_nce if loss == "c_mae" else losses.byol_loss
        close(terms[name], sum(compare(q, t) for q, t in pairs).detach() / len(pairs), 1e-5)


def test_a_teacher_is_a_moving_average_that_starts_as_a_copy_and_has_no_gradient():
    for loss in ("boot_mae", "c_mae"):
        run, args, batch, _ = sibling_terms(loss)
        own = dict(run.mae.named_parameters())
        trained = {id(p) for group in run.opt_g.param_groups for p in group["params"]}
        start = {k: v.clone() for k, v in run.mae.teacher.named_parameters()}
        assert start.keys() <= own.keys() and len(start) > 50
        for name, p in run.mae.teacher.named_parameters():
            assert torch.equal(p, own[name]) and p.grad is None and id(p) not in trained
        # A network that jumps by 1 once: after k steps the teacher has done 1 - m^k of it.
        with torch.no_grad():
            for name in start:
                own[name] += 1
        for _ in range(5):
            model.move_teacher(run.mae, 0.9)
        for name, p in run.mae.teacher.named_parameters():
            close(p, start[name] + 1 - 0.9**5, 1e-5)
    args = SimpleNamespace(loss="boot_mae")
    for epoch, wanted in ((1, 0.999), (51, 0.99945), (101, 0.9999), (300, 0.9999)):
        close(train.teacher_momentum(epoch, args), wanted, 1e-9)
    assert train.teacher_momentum(40, SimpleNamespace(loss="c_mae")) == 0.996


def test_every_sibling_lowers_its_terms():
    for loss in SIBLINGS:
        run, args = tiny_run("--loss", loss, "--epochs", "1")
        images, noise, seeds = tiny_batch(views=losses.LOSSES[loss]["views"])
        batch, progress = ((255 * images).byte(), noise, seeds, []), train.new_progress()
        train.set_rate(run.opt_g, 1e-3)
        history = []
        for _ in range(20):
            terms = train.step_gradients(run, [batch], False, progress, args)
            history.append(sum(terms.values()).item())
            train.update(run, apply=True)
        assert np.mean(history[-3:]) < 0.75 * np.mean(history[:3]), (loss, history)


def test_siblings_run_from_their_name_and_their_encoders_are_measured():
    with scratch() as root:
        for loss in SIBLINGS:
            out, flags = root / loss, [*FAST, "--loss", loss, "--limit-images", 8, "--epochs", 1]
            assert command(*flags, *loss_network_flags(), "--out", out)[0] == 0
            [row] = log_of(out)
            paints = losses.LOSSES[loss]["pixel"] is not None
            assert math.isfinite(row["psnr" if paints else "val_loss"])
            assert (out / "pictures" / "epoch_0001.png").exists() == paints
            path = ["--checkpoint", out / "checkpoint.pt", "--workers", 0]
            assert tune(*path, "--task", "knn", *PROBE, "--limit-images", 20)[0] == 0
            encoder, measured = kept_in(out)["mae"], opened_run([*path, *PROBE])[0].network.encoder
            for name, value in measured.state_dict().items():
                assert torch.equal(value, encoder[name]) or name == "pos_embed", name
            look = [*path, "--task", "reconstruct", "--data", "shapes", "--val-images", 3]
            look += ["--inception-weights", "none", "--out", root / "look"]
            if paints:
                assert tune(*look)[0] == 0
            else:
                tune_refused(*look, names=[f"--loss {loss}", "paints nothing"])
            if momentum := losses.LOSSES[loss]["momentum"]:  # each step moves the teacher
                after = []
                for steps in (1, 2):
                    out_k = ["--out", root / f"{loss}_steps", "--steps", steps]
                    assert command(*flags, *loss_network_flags(), *out_k)[0] == 0
                    after.append(kept_in(out_k[1])["mae"])
                for name, value in after[1].items():
                    if name.startswith("teacher.") and name != "teacher.pos_embed":
                        own = after[1][name.removeprefix("teacher.")]
                        expected = torch.lerp(after[0][name], own, 1 - momentum[0])
                        close(value, expected, 1e-7)
                teacher, own = (after[1][k] for k in ("teacher.norm.bias", "norm.bias"))
                assert teacher.abs().max() > 0 and not torch.equal(teacher, own)
            if loss == "boot_mae":  # --init: the teacher starts from the same weights
                run, args = tiny_run("--loss", "c_mae", "--init", str(out / "checkpoint.pt"))
                with contextlib.redirect_stdout(io.StringIO()):
                    train.initialise(run, args)
                assert torch.equal(run.mae.teacher.cls_token, encoder["cls_token"])
                assert torch.equal(run.mae.cls_token, encoder["cls_token"])
            run, args = tiny_run("--loss", "mse", "--init", str(out / "checkpoint.pt"))
            with contextlib.redirect_stdout(io.StringIO()):
                train.initialise(run, args)
            assert torch.equal(run.mae.norm.weight, encoder["norm.weight"])
            decoder = torch.equal(run.mae.mask_token, encoder.get("mask_token", torch.zeros(0)))
            assert decoder == (loss == "r_mae")
        refused(*FAST, "--loss", "feature_mae", names=["--teacher FILE"])
        refused(*FAST, "--loss", "r_mae", "--arch", "msg_mae", names=["--arch msg_mae"])
        flags = [*FAST, "--loss", "feature_mae", "--teacher"]
        refused(*flags, root / "none.pt", names=["none.pt"])
        refused(*flags, root / "r_mae" / "checkpoint.pt", "--patch-size", 4, names=["8 px", "4"])
        refused(*FAST, "--loss", "c_mae", "--batch-size", 1, names=["--batch-size 1", "c_mae"])
        other = [*FAST, "--loss", "feature_mae", "--teacher", root / "r_mae" / "checkpoint.pt"]
        other += ["--limit-images", 8, "--out", root / "feature_mae"]
        refused(*other, names=["--teacher", "mae.pth (now"])
        r_mae = [*FAST, "--loss", "r_mae", "--out", root / "r_mae", "--second", "whole"]
        refused(*r_mae, "--limit-images", 8, names=["--second complement (now whole)"])


# ---- Weights in and out --------------------------------------------------------------------------


def test_weights_have_the_names_of_other_projects():
    torch.manual_seed(0)
    mae = model.build_mae("tiny", 32, 8)
    ours = mae.state_dict()
    theirs = model.to_hf(ours)
    qkv = ours["blocks.3.attn.qkv.bias"]
    layer = "vit.encoder.layer.3.attention.attention"
    attention = "decoder.decoder_layers.0.attention.output.dense.bias"
    expected = {
        "vit.embeddings.cls_token": ours["cls_token"],
        "vit.embeddings.patch_embeddings.projection.weight": ours["patch_embed.proj.weight"],
        f"{layer}.query.bias": qkv[:192],
        f"{layer}.key.bias": qkv[192:384],
        f"{layer}.value.bias": qkv[384:],
        "vit.encoder.layer.5.output.dense.weight": ours["blocks.5.mlp.fc2.weight"],
        "vit.layernorm.weight": ours["norm.weight"],
        "decoder.mask_token": ours["mask_token"],
        attention: ours["decoder_blocks.0.attn.proj.bias"],
        "decoder.decoder_layers.3.layernorm_before.weight": ours["decoder_blocks.3.norm1.weight"],
        "decoder.decoder_pred.bias": ours["decoder_pred.bias"],
    }
    assert all(torch.equal(theirs[k], v) for k, v in expected.items())
    assert len(theirs) == len(ours) + 4 * (6 + 4)  # query, key and value apart in ten blocks
    renamed = {"vit.encoder.layer.": "vit.layers.", "attention.output.dense": "attention.o_proj"}
    renamed |= {
        f"attention.attention.{n}": f"attention.{n[0]}_proj" for n in ("query", "key", "value")
    }
    renamed |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    newer = {}  # transformers 5
    for name, value in theirs.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        newer[name] = value
    for names in (theirs, newer, ours):
        back, left_out = model.from_others(names)
        assert model.misfits(mae, back) == "" and left_out == []
        assert all(torch.equal(back[k], v) for k, v in ours.items())
    encoder = {k.removeprefix("vit."): v for k, v in theirs.items() if k.startswith("vit.")}
    back, _ = model.from_others(encoder)  # transformers' ViTMAEModel
    assert len(back) == 78 and torch.equal(back["norm.bias"], ours["norm.bias"])
    timm = {"head.weight": torch.zeros(5, 192), "fc_norm.weight": torch.ones(192), **ours}
    back, left_out = model.from_others(timm)
    assert left_out == ["head.weight"] and "unexpected: fc_norm.weight" in model.misfits(mae, back)


def test_exported_weights_start_other_runs():
    with scratch() as root:
        source = root / "checkpoint.pt"
        save_autoencoder(source)
        ours = kept_in(root)["mae"]
        for kind, kept in (("mae", 134), ("timm", 78), ("hf", 174)):
            file = root / f"{kind}.pt"
            assert tune("--export", file, "--format", kind, "--checkpoint", source)[0] == 0
            written = torch.load(file, weights_only=True)
            assert len(written["model"] if kind == "mae" else written) == kept
            run, args = tiny_run("--loss", "msg_gan", "--init", str(file), "--seed", "1")
            fresh = {k: v.clone() for k, v in run.mae.state_dict().items()}
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                train.initialise(run, args)
            for name, value in run.mae.state_dict().items():
                other = name.startswith(("decoder_fuse", "decoder_rgb"))
                other |= kind == "timm" and name.startswith(("decoder_", "mask_token"))
                assert torch.equal(value, fresh[name] if other else ours[name]), (kind, name)
            assert "took 78 tensors of the encoder" in output.getvalue(), output.getvalue()
            given = ["--checkpoint", file, "--task", "knn", *PROBE, "--limit-images", 20]
            assert tune(*given, "--out", root / "knn") == (0, "")
        msg = [*FAST, "--loss", "msg_gan", "--init", source, "--out", root, "--resume", "off"]
        assert command(*msg, "--limit-images", 4, "--epochs", 1)[0] == 0
        export = ["--checkpoint", source, "--export"]
        tune_refused(*export, root / "x.pt", "--format", "hf", names=["decoder_rgb", "timm"])
        tune_refused("--export", root / "x.pt", names=["--checkpoint is missing"])
        tune_refused(*export, root / "no" / "x.pt", names=["no/x.pt", "cannot write"])
        with mock.patch.dict(sys.modules, {"safetensors": None, "safetensors.torch": None}):
            names = ["pip install safetensors"]
            tune_refused(*export, root / "x.safetensors", names=names)
            refused(*FAST, "--init", root / "x.safetensors", names=names)


def test_files_of_other_weights_are_refused_by_the_names_that_differ():
    with scratch() as root:
        save_autoencoder(root / "checkpoint.pt")
        ours, fast = kept_in(root)["mae"], [*FAST, "--out", root / "run"]
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
            "odd": "unexpected: 1, fc.bias",
            "no": "does not exist",
        }.items():
            refused(*fast, "--init", root / f"{name}.pt", names=[f"{name}.pt", words])
        odd = root / "odd.pt"
        given = [*RECONSTRUCT, "--checkpoint", root / "checkpoint.pt", "--inception-weights", odd]
        tune_refused(*given, names=["odd.pt", "fc.bias has shape ()"])
        dvae, vgg, _ = (flag.split("=")[1] for flag in loss_network_flags())
        for loss, kind, other, misfit in (
            ("dvae_p", "dVAE", vgg, "blocks.input.w"),
            ("vgg_p", "VGG-16", dvae, "features.0"),
        ):
            flag = f"--{loss.removesuffix('_p')}-weights"
            refused(*fast, "--loss", loss, flag, odd, names=["odd.pt", kind])
            refused(*fast, "--loss", loss, flag, other, names=[kind, misfit])
        refused(*fast, "--loss", "dvae_p", names=["dvae_p", "--dvae-weights", "encoder.pkl"])


def test_only_the_first_process_exports():
    with scratch() as folder:
        source, file = folder / "checkpoint.pt", folder / "encoder.pt"
        save_autoencoder(source)
        for rank in (1, 0):
            with mock.patch.dict(os.environ, RANK=str(rank)):
                assert tune("--export", file, "--checkpoint", source)[0] == 0
            assert file.exists() == (rank == 0)


# ---- Fine-tuning ---------------------------------------------------------------------------------

SMALL_HEADS = ["--model", "nano", "--width", "16"]  # of detection and segmentation
PROBE = ["--batch-size", "4", "--workers", "0", "--data", "shapes", "--val-images", "9"]
RANDOM = ["--checkpoint", "none", "--model", "tiny", "--image-size", "32", "--patch-size", "8"]


def probe_run(*flags, classes=3):
    """A finetune.py run without data: (run, args)."""
    return opened_run([*RANDOM, "--out", "unused", *flags], classes)


def opened_run(flags, classes=3):
    """What finetune.py trains on a checkpoint: (run, args)."""
    weights, args = finetune.open_checkpoint(finetune.parse_args([str(f) for f in flags]))
    args.classes = list(range(classes))
    return finetune.build_run(args, weights, torch.device("cpu")), args


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


@mock.patch.object(finetune, "PENALTIES", [1.0, 0.1, 0.01])
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
        assert log_of(root) == [row]
    tune_refused(*flags, "--task", "knn", "--pool", "auto", names=["--pool auto", "logistic"])


def test_seeds_are_compared_by_hand_values():
    with scratch() as root:
        tune_refused("--compare", root, names=["--compare takes logs"])
        tune_refused("--compare", root, "--demo", names=["reads logs alone"])
        write_results(root / "flat" / "runs" / "mse", knn={"top1": 1.0})  # RUNS/ROW/TASK
        tune_refused("--compare", root / "flat", names=["mse/knn/log.jsonl", "ROW/SEED"])
        root = root / "seeds"
        for seed, psnr, top1 in ((0, 17.0, 40.0), (1, 18.0, 44.0), (2, 16.0, 42.0)):
            write_results(root / "mse" / str(seed), own={"psnr": psnr}, knn={"top1": top1})
            more = {"top1": top1 + seed + 1}  # 1, 2 and 3 better
            write_results(root / "ls_gan" / str(seed), own={"psnr": psnr - 2}, knn=more)
        write_results(root / "random" / "1", knn={"top1": 30.0})
        write_results(root / "ms_ssim" / "0", own={"pixel": 0.5})  # stopped between measurements
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert not finetune.main(["--compare", str(root)])
        found = json.loads((root / "compare.json").read_text())
        assert list(found) == ["psnr", "knn top1"]
        assert list(found["knn top1"]) == ["mse", "ls_gan", "random"]  # as in `LOSSES`, then others
        assert "ms_ssim" not in found["psnr"]
        assert f"{root / 'ms_ssim' / '0' / 'log.jsonl'} is left out" in printed.getvalue()
        mse, ls_gan, random = found["knn top1"].values()
        close([mse["mean"], mse["error"]], [42, 2 / 3**0.5], 1e-9)
        close([ls_gan["difference"], ls_gan["difference_error"]], [2, 1 / 3**0.5], 1e-9)
        assert random["difference"] == 30 - 44 and random["difference_error"] is None
        close(found["psnr"]["ls_gan"]["difference"], -2, 1e-9)
        assert ls_gan["values"] == {"0": 41, "1": 46, "2": 45} and random["error"] is None
        stars = [line for line in printed.getvalue().splitlines() if "*" in line][1:]
        assert len(stars) == 2 and all(line.startswith("ls_gan ") for line in stars), stars
        assert Image.open(root / "compare.png").width > 500


def test_ticks_of_a_chart_are_round_and_enough():
    assert data.round_ticks(-0.5, 4.5) == [0, 1, 2, 3, 4]
    close(data.round_ticks(0.399, 0.427), [0.4, 0.41, 0.42], 1e-12)
    rng = np.random.default_rng(0)
    for low, exponent in zip(rng.normal(0, 50, 200), rng.uniform(-4, 4, 200), strict=True):
        ticks = data.round_ticks(low, high := low + 10**exponent)
        assert 2 <= len(ticks) <= 6 and low <= ticks[0] <= ticks[-1] <= high, (low, high, ticks)
        step = f"{ticks[1] - ticks[0]:.0e}"
        assert step[0] in "125", (low, high, ticks)
    with scratch() as root, mock.patch.object(data, "round_ticks", wraps=data.round_ticks) as spy:
        data.save_dots(root / "equal.png", {"top-1, %": {"mse": [80.0, 80.0]}})  # in the middle
        close(spy.call_args.args, [79.5, 80.5], 1e-9)


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
        spoil(lambda w: [w.update({"generator." + k: w.pop(k)}) for k in list(w)])
        rejected(*given, names=["missing: cls_token", "unexpected: ", "generator.cls_token"])
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
        rejected(*RANDOM, "--limit-images", 3, names=["3 training images", "--batch-size"])
        rejected(*RANDOM, "--drop-path", 1, names=["--drop-path 1", "below 1"])
        rejected("--checkpoint", folder / "no.pt", names=["no.pt does not exist"])
        assert not (folder / "run").exists()


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
    for task, *figures in (
        ("linear", "top1", "val_loss"),
        ("finetune", "top1", "val_loss"),
        ("detect", "ap", "mask_ap50", "ap_small"),
        ("segment", "miou", "miou_all", "pixel_accuracy"),
    ):
        with scratch() as root:
            flags = [*RANDOM, *PROBE, "--task", task, "--limit-images", 16, "--epochs", 2]
            size = []
            if task in finetune.DENSE:
                size = [*SMALL_HEADS, "--batch-size", 2, "--limit-images", 8, "--val-images", 4]
            flags += ["--lr", 1e-3, *size, "--out"]
            assert tune(*flags, root / "once")[0] == 0
            assert tune(*flags, root / "twice", "--steps", 6)[0] == 0  # of 8
            names = ["--pool cls (now mean)"]
            tune_refused(*flags, root / "twice", "--pool", "mean", names=names)
            assert tune(*flags, root / "twice")[0] == 0
            same_weights(root / "once", root / "twice")
            once, twice = log_of(root / "once"), log_of(root / "twice")
            for a, b in zip(once, twice, strict=True):
                assert all(a[name] == b[name] for name in ("loss", *figures)), (a, b)
                if task == "detect":
                    terms = [value for name, value in a.items() if name.startswith("loss_")]
                    assert len(terms) == 5
                    close(sum(terms), a["loss"], 1e-4)
            best, output = max(once, key=lambda row: row[figures[0]]), io.StringIO()
            with contextlib.redirect_stdout(output):
                measured = ["--checkpoint", root / "once" / "best.pt", *PROBE, *size]
                finetune.main(["--eval", *(str(flag) for flag in measured)])
            for name in figures:
                assert f"{name} {best[name]:.4g}" in output.getvalue(), (best, output.getvalue())
            written = {path.name for path in (root / "once").rglob("*")}
            assert ("segmentation.png" in written) == (task == "segment")
            assert ({"detections.png", "results_segm.json"} <= written) == (task == "detect")


def test_a_probe_and_fine_tuning_learn_colours():
    with scratch() as folder:
        for part in ("train", "val"):
            for name in ("red", "green", "blue"):
                (folder / part / name).mkdir(parents=True)
                for i in range(8):
                    Image.new("RGB", (32, 32), name).save(folder / part / name / f"{i}.png")
        flags = [*RANDOM, "--data", folder, "--workers", 0, "--batch-size", 8, "--epochs", 6]
        flags += ["--mixup", 0, "--cutmix", 0, "--rand-augment", 0, "--lr", 3e-3]
        for task in CLASSIFY:
            out = folder / task
            assert tune(*flags, "--task", task, "--out", out)[0] == 0
            row = log_of(out)[-1]
            assert row["top1"] == 100, (task, row)
            assert "top5" not in row


CLASSIFY = ("linear", "finetune", "knn", "logistic")


def test_two_processes_measure_what_one_does():
    common = ["--data", "shapes", "--workers", 0]
    learn = [*RANDOM, *common, "--val-images", 9, "--limit-images", 21, "--epochs", 1]
    learn += ["--lr", 1e-4, "--drop-path", 0, "--k", 5]
    learn += ["--mixup", 0, "--cutmix", 0]  # these act on the batch of a process
    with scratch() as root:
        save_autoencoder(root / "g.pt", "--loss", "msg_gan_p")
        torch.save(stand_in(), root / "inception.pth")
        jobs = {task: [*learn, "--task", task] for task in CLASSIFY}
        # A detector's samples and stochastic depth are drawn for each batch, here of one image.
        dense = [*learn, *SMALL_HEADS, "--limit-images", 6, "--epochs", 2, "--drop-path", 0.3]
        jobs |= {task: [*dense, "--task", task] for task in finetune.DENSE}
        jobs["reconstruct"] = [*RECONSTRUCT, "--checkpoint", root / "g.pt", "--val-images", 3]
        jobs["reconstruct"] += ["--inception-weights", root / "inception.pth"]
        size = {task: 1 if task in finetune.DENSE else 2 for task in jobs}
        two = [
            [*job, "--out", root / f"{task}2", "--batch-size", size[task]]
            for task, job in jobs.items()
        ]
        (root / "jobs.json").write_text(json.dumps(two, default=str))
        ranks = launch_pair(__file__, "--tune", root / "jobs.json")
        for task, job in jobs.items():
            alone = ["--batch-size", 1, "--accum", 2] if size[task] == 1 else ["--batch-size", 4]
            assert tune(*job, "--out", root / f"{task}1", *alone)[0] == 0
        finish(ranks)
        one, two = (json.loads((root / f"reconstruct{n}" / "eval.json").read_text()) for n in "12")
        assert one["images"] == two["images"] == 3
        assert set(one["results"]) == {"real", "msg_gan_p"}
        for name, row in one["results"].items():
            for metric, value in row.items():
                close(two["results"][name][metric], value, 1e-4 * max(1, abs(value)))
        for task in CLASSIFY:
            [one], [two] = (log_of(root / f"{task}{n}") for n in "12")
            assert one["val_images"] == two["val_images"] == 9
            assert (one["top1"], one["top5"]) == (two["top1"], two["top5"]), (one, two)
            close(one.get("val_loss", 0), two.get("val_loss", 0), 1e-4)
        for task in finetune.DENSE:
            for one, two in zip(*(log_of(root / f"{task}{n}") for n in "12"), strict=True):
                assert one["val_images"] == two["val_images"] == 9
                same = [name for name in one if name not in ("seconds", "images_per_second")]
                close([one[name] for name in same], [two[name] for name in same], 1e-3)
        one, two = (json.loads((root / f"detect{n}/results_bbox.json").read_text()) for n in "12")
        assert len({entry["image_id"] for entry in one}) > 5 and len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
            close([a["score"], *a["bbox"]], [b["score"], *b["bbox"]], 1e-3)


def tune_in_turn(jobs):
    """One process of the last test: `finetune.main` for each list of flags in the file `jobs`."""
    device = train.start_processes()
    with mock.patch.object(train, "start_processes", lambda: device):
        with mock.patch.object(train, "stop_processes"):
            for flags in json.loads(Path(jobs).read_text()):
                assert not finetune.main([str(flag) for flag in flags])
    train.stop_processes()


# ---- Dense tasks ---------------------------------------------------------------------------------


def tiny_detector(classes=80, image_size=32, patch_size=8):
    torch.manual_seed(0)
    sizes = dict(image_size=image_size, patch_size=patch_size, width=16)
    return model.build_detector("nano", classes, **sizes)


def tiny_segmenter(classes=150):
    torch.manual_seed(0)
    return model.build_segmenter("nano", classes, image_size=32, patch_size=8, width=16)


def rectangles(*boxes, size=32, label=1):
    """Targets of one image: each box (x0, y0, x1, y1), integers, is an object that fills it."""
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    labels = torch.full((len(boxes),), label)
    return dict(boxes=torch.tensor(boxes).float().view(-1, 4), labels=labels, masks=masks)


def test_the_pyramid_has_maps_of_a_quarter_to_two_patches_a_cell():
    for patch_size in (4, 8, 16):
        network = tiny_detector(image_size=64, patch_size=patch_size)
        maps = network.maps(torch.rand(1, 3, 64, 64))
        expected = [64 // (patch_size * 2**i // 4) for i in range(4)]
        assert [list(x.shape[2:]) for x in maps] == [[side, side] for side in expected]
        assert [x.shape[1] for x in maps] == network.channels
    for size, levels in (("nano", [0, 1, 3]), ("base", [0, 4, 8])):  # PAPER: [0, 4, 8, 12]
        with torch.device("meta"):
            encoder = model.build_encoder(size, 32, 16, 0.0)
            assert model.FeaturePyramid(encoder, 8).levels == levels


def test_the_pyramid_equals_matrix_products_on_the_tokens_of_each_block():
    network, images = tiny_detector(image_size=32, patch_size=8), tiny_batch(1)[0]
    encoder = network.encoder
    x = encoder.patch_embed(model.imagenet_normalize(images)) + encoder.pos_embed[:, 1:]
    x = torch.cat([encoder.cls_token, x], dim=1)
    levels = [x]
    for block in encoder.blocks:
        levels.append(block(levels[-1]))

    def grid(x):  # normalised by hand: the norms start with weight 1 and bias 0
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        return x[0, 1:].T.reshape(-1, 4, 4)

    def up(x):  # new cell 2 i lies a quarter of an old cell before cell i, 2 i + 1 after it
        side = x.shape[1]
        rows = torch.zeros(2 * side, side)
        for i in range(side):
            rows[2 * i, i] = rows[2 * i + 1, i] = 0.75
            rows[2 * i, max(0, i - 1)] += 0.25
            rows[2 * i + 1, min(side - 1, i + 1)] += 0.25
        return rows @ x @ rows.T

    def conv(x, layer, stride=1):
        windows = F.pad(x, (1, 1, 1, 1)).unfold(1, 3, stride).unfold(2, 3, stride)
        weight, bias = layer.weight, layer.bias[:, None, None]
        return torch.einsum("chwij,ocij->ohw", windows, weight) + bias

    fine, half, _, coarse = network.resample
    expected = [
        conv(up(conv(up(grid(levels[0])), fine[1])), fine[3]),
        conv(up(grid(levels[1])), half[1]),
        grid(levels[3]),
        conv(grid(levels[4]), coarse, stride=2),
    ]
    for found, wanted in zip(network.maps(images), expected, strict=True):
        close(found[0], wanted, 1e-4)


def test_masks_of_28_px_boxes_are_their_own_targets_and_are_pasted_back_pixel_by_pixel():
    masks = (torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    boxes = torch.tensor([[0.0, 0, 28, 28], [3, 5, 31, 33], [22, 12, 50, 40]])
    targets = model.mask_targets(masks, boxes, torch.tensor([0, 2, 1]))
    cut = [masks[0, :28, :28], masks[2, 5:33, 3:31], masks[1, 12:, 22:]]
    assert torch.equal(targets, torch.stack(cut))
    pasted = model.paste_masks(targets, boxes, 40, 50)
    for whole, (x0, y0, x1, y1), wanted in zip(pasted, boxes.int().tolist(), cut, strict=True):
        assert torch.equal(whole[y0:y1, x0:x1].float(), wanted)
        assert whole.sum() == wanted.sum()


def test_a_perfect_mask_pasted_back_has_an_iou_of_9_tenths_from_8_px_on():
    y, x = torch.meshgrid(torch.arange(100) + 0.5, torch.arange(120) + 0.5, indexing="ij")
    for size, shift in itertools.product((8, 11, 16, 23, 32, 64), (0.0, 0.3, 0.5)):
        left, top, width, height = 10 + shift, 7 + 2 * shift, size, 0.8 * size
        u, v = (x - left) / width, (y - top) / height  # 0 to 1 across the object
        shapes = {
            "ellipse": (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25,
            "triangle": (v > 0) & (v < 1) & ((u - 0.5).abs() < v / 2),
        }
        for name, mask in shapes.items():
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            box = torch.tensor([box]).float()
            target = model.mask_targets(mask[None], box, torch.tensor([0]))
            pasted = model.paste_masks(target, box, 100, 120)[0]
            iou = (pasted & mask).sum() / (pasted | mask).sum()
            assert iou >= 0.9, (name, size, shift, iou)


def test_pasted_masks_stay_in_their_boxes_and_in_the_image():
    boxes = torch.tensor([[-5.0, -5, 5, 5], [6.4, 2, 8.6, 3], [2.6, 2.6, 3.4, 3.4], [30, 0, 40, 9]])
    pasted = model.paste_masks(torch.ones(4, 28, 28), boxes, 10, 12)
    assert not pasted[2:].any()  # between two centres; outside
    assert pasted[0, :5, :5].all() and pasted[0].sum() == 25
    assert pasted[1].nonzero().tolist() == [[2, 6], [2, 7], [2, 8]]  # centres at 6.5, 7.5 and 8.5
    assert model.paste_masks(torch.ones(0, 28, 28), torch.ones(0, 4), 10, 12).shape == (0, 10, 12)


def test_untrained_detection_losses_are_those_of_guessing_and_reach_every_parameter():
    network, images = tiny_detector(), tiny_batch(2)[0]
    some = [rectangles((2, 3, 20, 15), (8, 20, 30, 30), label=80), rectangles()]
    for targets in (some, [rectangles(), rectangles()]):
        network.zero_grad()
        found = network(images, targets)
        close(found["loss_classifier"].item(), math.log(81), 0.5)
        close(found["loss_objectness"].item(), math.log(2), 0.05)
        if targets is some:
            close(found["loss_mask"].item(), math.log(2), 0.15)
            weight = network.roi_heads.mask_predictor.mask_fcn_logits.weight
            [slope] = torch.autograd.grad(found["loss_mask"], weight, retain_graph=True)
            assert slope.flatten(1).any(dim=1).nonzero().tolist() == [[80]]  # the objects' class
            assert 0 < found["loss_box_reg"] < 1 and 0 < found["loss_rpn_box_reg"] < 1
        else:
            parts = ("loss_mask", "loss_box_reg", "loss_rpn_box_reg")
            assert all(found[name] == 0 for name in parts), found
        sum(found.values()).backward()
        missing = [k for k, p in network.named_parameters() if p.grad is None]
        assert not missing and all(p.grad.isfinite().all() for p in network.parameters()), missing


def test_detections_do_not_depend_on_what_a_network_saw_first():
    images = torch.rand(2, 3, 32, 32)
    fresh, used = tiny_detector(3), tiny_detector(3)
    with torch.no_grad():
        used.train()(torch.zeros(1, 3, 32, 32), [rectangles((0, 0, 3, 2))])
        used.eval()(torch.zeros(3, 3, 32, 32))
        for one, two in zip(fresh.eval()(images), used(images), strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)
            N = len(one["boxes"])
            assert N > 0 and one["masks"].shape == (N, 28, 28) and one["labels"].min() >= 1
    pool = used.roi_heads.box_roi_pool
    assert pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]  # patches of 8
    boxes = torch.tensor([[0, 0, side, side] for side in (10.0, 55, 57, 111, 113, 225)])
    assert pool.map_levels([boxes]).tolist() == [0, 0, 1, 1, 2, 3]  # 14 patches = 112 px: map 2


def test_boxes_are_float32_under_autocast():
    network = tiny_detector(3).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        [found] = network(tiny_batch(1)[0])
        assert found["boxes"].dtype == found["scores"].dtype == torch.float32
        assert (found["boxes"] != found["boxes"].bfloat16().float()).any()
        logits = tiny_segmenter().eval()(tiny_batch(1)[0])
    assert logits.dtype == torch.float32 and (logits != logits.bfloat16().float()).any()


def test_wrong_targets_and_sizes_of_the_dense_tasks_are_refused():
    network, images = tiny_detector(), tiny_batch(1)[0]
    good = rectangles((2, 3, 20, 15))
    for label in (0, 81):
        wrong = good | {"labels": torch.tensor([label])}
        raises_value_error(network, images, [wrong], says=f"[{label}]")
    wrong = good | {"boxes": torch.tensor([[2.0, 3, 2, 15]])}
    raises_value_error(network, images, [wrong], says="[[2.0, 3.0, 2.0, 15.0]]")
    wrong = good | {"masks": torch.zeros(1, 16, 16)}
    raises_value_error(network, images, [wrong], says="[1, 16, 16]")
    raises_value_error(
        tiny_segmenter(), torch.rand(1, 3, 16, 64), says="[16, 64]"
    )  # also 16 patches
    for image_size, patch_size in ((40, 8), (32, 2)):
        build = functools.partial(tiny_detector, 3, image_size, patch_size)
        raises_value_error(build, says=f"a multiple of {2 * patch_size} px")


def test_layers_of_dense_networks_hold_each_parameter_once_and_encoders_load_at_any_size():
    with torch.random.fork_rng():
        mae = model.build_mae("nano", image_size=64, patch_size=8)
    weights = model.encoder_weights(mae.state_dict(), 4, "file")
    for network in (tiny_detector(), tiny_segmenter()):
        layers = network.layers()
        assert len(layers) == 2 + len(network.encoder.blocks)
        flat = [id(p) for layer in layers for p in layer]
        assert sorted(flat) == sorted(id(p) for p in network.parameters())
        assert layers[0][0] is network.encoder.cls_token
        model.load_whole(network.encoder, weights, "file")
        assert torch.equal(network.encoder.norm.weight, mae.norm.weight)


def test_the_segmenter_labels_pixels_and_its_losses_reach_every_parameter():
    network, images = tiny_segmenter(), tiny_batch(1)[0]  # a single image, too
    logits, aux = network(images)
    assert logits.shape == aux.shape == (1, 150, 32, 32)
    loss = losses.segmentation_loss(logits, torch.randint(0, 150, (1, 32, 32)), aux)
    close(loss.item(), 1.4 * math.log(150), 0.4)  # of guessing; the weight .4
    loss.backward()
    assert not [k for k, p in network.named_parameters() if p.grad is None]
    assert network.eval()(images).shape == (1, 150, 32, 32)


def test_the_segmentation_loss_equals_a_loop_and_is_0_where_all_is_ignored():
    generator = torch.Generator().manual_seed(0)
    logits, aux = torch.randn(2, 2, 5, 3, 4, generator=generator).requires_grad_()
    target = torch.randint(0, 5, (2, 3, 4), generator=generator, dtype=torch.uint8)
    target[0, :2, 1:] = 255

    def slow(x):
        terms = []
        for b, i, j in itertools.product(range(2), range(3), range(4)):
            if target[b, i, j] != 255:
                exp = x[b, :, i, j].exp()
                terms.append(-(exp[int(target[b, i, j])] / exp.sum()).log().item())
        return sum(terms) / len(terms)

    close(losses.segmentation_loss(logits, target).item(), slow(logits), 1e-5)
    both = losses.segmentation_loss(logits.bfloat16(), target, aux)
    assert both.dtype == torch.float32
    close(both.item(), slow(logits) + 0.4 * slow(aux), 0.02)
    ignored = torch.full_like(target, 255)
    nothing = losses.segmentation_loss(logits, ignored, aux)
    for gradient in torch.autograd.grad(nothing, (logits, aux)):
        assert nothing == 0 and not gradient.any()


class Oracle(torch.nn.Module):
    """A network that gives prepared answers, one for each image, in turn."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images):
        answers = [next(self.answers) for _ in images]
        return torch.stack(answers) if isinstance(answers[0], torch.Tensor) else answers


class FewScenes(torch.utils.data.Dataset):
    """Grey images of several shapes with a rectangle and a disc each, for either task."""

    image_ids, category_ids, classes = [3, 5, 8, 9], [7, 90], ["rectangle", "disc"]

    def __init__(self, task):
        self.task = task

    def __len__(self):
        return 4

    def __getitem__(self, index):
        height, width = [(40, 60), (60, 33), (50, 50), (41, 64)][index]
        rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
        box = (rows > 3) & (rows < 30) & (columns > 2 + index) & (columns < 17)
        disc = (rows - height + 10).square() + (columns - width + 9).square() < 64
        masks, image = torch.stack([box, disc]), Image.new("RGB", (width, height), "grey")
        if self.task == "segment":
            labels = disc.byte()
            labels[box] = 255  # not known
            return image, labels
        labels, crowd = torch.tensor([1, 2]), torch.zeros(2, dtype=torch.bool)
        area, boxes = masks.sum(dim=(1, 2)).float(), data.mask_boxes(masks)
        return image, dict(boxes=boxes, labels=labels, masks=masks, crowd=crowd, area=area)


def oracle_run(task, answer, out):
    """Measure a network that answers with answer(the sample's truth): (row, its data set)."""
    common = dict(image_size=256, seed=0, task=task)
    dataset = data.DenseSet(FewScenes(task), range(4), augment=False, **common)
    answers = [answer(dataset[0, i][1]) for i in range(4)]
    network = Oracle(answers * 2)  # the second time for the picture
    run = SimpleNamespace(network=network, device=torch.device("cpu"))
    run.autocast = contextlib.nullcontext
    loader = data.build_loader(dataset, [(0, i) for i in range(4)], batch_size=3, workers=0)
    args = SimpleNamespace(task=task, classes=FewScenes.classes, out=out, slide=False)
    return finetune.by_task(task)[2](run, loader, [], args)


def test_perfect_detections_have_an_ap_of_100_through_the_letterbox_and_back():
    def answer(truth):
        place, boxes = truth["letterbox"], truth["boxes"]
        masks = model.mask_targets(truth["masks"], boxes, torch.arange(2))
        ratios = torch.tensor([place.columns / place.width, place.rows / place.height] * 2)
        padding = torch.tensor([[place.columns + 1.0, place.rows + 1.0, 256, 256]])
        return {
            "boxes": torch.cat([boxes * ratios, padding]),
            "masks": torch.cat([masks, torch.ones(1, 28, 28)]),
            "labels": torch.tensor([1, 2, 1]),
            "scores": torch.tensor([0.9, 0.8, 0.95]),
        }

    with scratch() as out:
        row = oracle_run("detect", answer, out)
        assert row["ap"] == row["ap75"] == row["ap_small"] == row["mask_ap50"] == 100, row
        assert row["mask_ap"] > 90 and row["ap_large"] == -1 and row["val_images"] == 4
        boxes, masks = (
            json.loads((out / f"results_{k}.json").read_text()) for k in ("bbox", "segm")
        )
        Image.open(out / "pictures" / "detections.png").verify()
    assert [entry["image_id"] for entry in boxes] == [3, 3, 5, 5, 8, 8, 9, 9]
    assert [entry["category_id"] for entry in masks] == [7, 90] * 4
    close(boxes[0]["bbox"], [2, 3, 15, 27], 1e-3)  # xywh; what lies in the padding is gone
    rle = masks[0]["segmentation"]
    mask = data.rle_to_mask(rle["counts"], *rle["size"])
    assert rle["size"] == [40, 60] and np.array_equal(mask, FewScenes("detect")[0][1]["masks"][0])
    assert "segmentation" not in boxes[0] and "bbox" not in masks[0]


def test_a_perfect_class_map_has_an_miou_of_100_through_the_letterbox_and_back():
    def answer(truth):
        place, logits = truth["letterbox"], torch.rand(2, 256, 256)
        wanted = torch.stack([truth["map"] == 0, truth["map"] == 1])[None].float()
        size = (place.rows, place.columns)
        logits[:, : size[0], : size[1]] += 9 * F.interpolate(wanted, size, mode="nearest-exact")[0]
        return logits

    with scratch() as out:
        row = oracle_run("segment", answer, out)
        Image.open(out / "pictures" / "segmentation.png").verify()
    assert row == {"miou": 100, "miou_all": 100, "pixel_accuracy": 100, "val_images": 4}


def test_sliding_windows_of_a_network_that_sees_single_pixels_give_the_whole():
    shapes = []

    def network(images):
        shapes.append(len(images))
        return torch.stack([images[:, 0], images.square().sum(dim=1)], dim=1)

    for (height, width), windows in (((30, 30), 1), ((30, 82), 4), ((41, 30), 2), ((60, 50), 6)):
        image = torch.rand(3, height, width)  # steps of 20: 0, 20, 40, 52; 0, 11; 0, 20, 30 ...
        close(finetune.slide(network, image, 30), network(image[None])[0], 1e-6)
        assert shapes[-2] == windows
    common = dict(image_size=32, seed=0, task="segment", augment=False)
    dataset = data.DenseSet(FewScenes("segment"), [3], slide=True, **common)
    assert dataset[0, 0][1]["whole"].shape == (3, 32, 49)  # 64 * 32 / 41 = 49.95, cut off
    run = SimpleNamespace(network=network, device="cpu", autocast=contextlib.nullcontext)
    args = SimpleNamespace(slide=True, image_size=32)
    [(labels, truth)] = finetune.segment(run, data.collate([dataset[0, 0]]), args)
    assert labels.shape == truth["map"].shape == (41, 64)


def test_encoders_load_into_detectors_and_segmenters_at_any_size():
    images = tiny_batch()[0]
    with scratch() as folder:
        path = folder / "c.pt"
        save_autoencoder(path)
        expected = model.build_mae("tiny", 32, 8)
        expected.load_state_dict(torch.load(path)["mae"])
        for task in finetune.DENSE:
            flags = ["--checkpoint", path, "--task", task, "--width", 16]
            run, args = opened_run(flags)
            encoder = run.network.encoder.eval()
            assert torch.equal(encoder(images), expected.encode(images)[0])
            assert args.drop_path == 0.1 and 0.6 < args.layer_decay < 0.8
            run, args = opened_run([*flags, "--image-size", 48])
            images_48, targets = finetune.random_batch(args)
            assert (
                finetune.step_gradients(run, [(images_48, targets)], {"step": 0}, args)["loss"] > 0
            )
            assert all(p.grad is not None for p in run.network.parameters())
        flags = [*RANDOM, *SMALL_HEADS, "--task", "segment", "--batch-size", "2"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            finetune.main([*flags, "--benchmark", "1"])
        row = json.loads(output.getvalue())
        assert row["task"] == "segment" and row["parameters"] == row["parameters_trained"]


def test_dense_tasks_refuse_what_does_not_fit_in_one_line():
    with scratch() as root:
        write_coco(root / "coco")
        write_ade(root / "ade")
        write_coco(root / "torn", json.dumps(coco_content())[:-30])
        flags = [*RANDOM, *SMALL_HEADS, "--workers", 0, "--batch-size", 2, "--epochs", 1]
        flags += ["--out", root / "out"]

        def rejected(task, *more, names):
            tune_refused(*flags, "--task", task, *more, names=names)

        rejected("detect", "--data", root / "ade", names=["ADE20K's layout, of segmentation"])
        rejected("segment", "--data", root / "coco", names=["COCO's layout, of detection"])
        rejected("detect", "--data", root / "torn", names=["torn or not COCO's"])
        rejected("detect", "--data", root / "none", names=["does not exist"])
        rejected("detect", "--shots", 1, names=["--shots", "for classification"])
        rejected("segment", "--mixup", 0.8, names=["--mixup", "for classification"])
        rejected("segment", "--width", 20, names=["--width 20", "multiple of 16"])
        rejected("detect", "--scales", 2, 1, names=["--scales", "smaller first"])
        rejected("detect", "--image-size", 40, "--data", "shapes", names=["multiple of 16 px"])
        rejected("detect", "--data", root / "coco", "--limit-images", 1, names=["--batch-size"])
        assert not (root / "out").exists()
        status, errors = tune(*flags, "--task", "segment", "--data", root / "ade")
        assert status == 0, errors
        (root / "ade" / "images" / "training").rename(root / "gone")  # measuring needs none of it
        best = ["--checkpoint", root / "out" / "best.pt", "--workers", 0]
        status, errors = tune("--eval", *best, "--data", root / "ade")
        assert status == 0, errors
        (root / "ade" / "objectInfo.txt").unlink()
        tune_refused("--eval", *best, "--data", root / "ade", names=["sky", "only in"])


def test_unreadable_scenes_are_named_replaced_in_training_and_not_measured():
    with scratch() as root:
        write_ade(root)
        (root / "images" / "training" / "1.jpg").write_bytes(b"torn")
        (root / "annotations" / "validation" / "2.png").write_bytes(b"torn")
        flags = [*RANDOM, *SMALL_HEADS, "--workers", 0, "--batch-size", 3, "--epochs", 1]
        status, errors = tune(*flags, "--task", "segment", "--data", root, "--out", root / "out")
        assert status == 0 and errors.count("replaced: ") == errors.count("left out: ") == 1
        assert "training/1.jpg" in errors and "validation/2.jpg" in errors, errors
        [row] = log_of(root / "out")
        assert row["val_images"] == 2 and row["bad_images"] == 2


# ---- README --------------------------------------------------------------------------------------


def test_every_name_in_the_readmes_map_of_the_paper_exists():
    text = Path(__file__).with_name("README.md").read_text()
    maps = [text.split(title)[1].split("\n\n")[0] for title in ("\nPaper | Here\n", "stands\n")]
    missing, count = [], 0
    for row in "\n".join(maps).splitlines():
        module = None  # `file.py` `name`, `Class.method`, ...: names are of the file before them
        for name in re.findall("`([^`]+)`", row.rpartition(" | ")[2]):
            if name.endswith(".py"):
                module = sys.modules[name.removesuffix(".py")]
            elif re.fullmatch(r"[A-Za-z_][\w.]*", name) and name not in losses.LOSSES:
                count += 1
                try:
                    functools.reduce(getattr, name.split("."), module)
                except AttributeError:
                    missing.append(f"{module and module.__name__}: {name}")
    assert count > 40 and not missing, (count, missing)


# ---- Runner --------------------------------------------------------------------------------------


def main():
    tests = {k: v for k, v in globals().items() if k.startswith("test_")}
    failed = 0
    for name, test in tests.items():
        began = time.perf_counter()
        try:
            test()
            outcome = "passed"
        except Exception:
            failed += 1
            outcome = "FAILED\n" + traceback.format_exc()
        print(f"{time.perf_counter() - began:6.1f} s  {name}: {outcome}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--gloo"]:
        gloo_gradients(sys.argv[2])
    elif sys.argv[1:2] == ["--tune"]:
        tune_in_turn(sys.argv[2])
    else:
        sys.exit(main())
