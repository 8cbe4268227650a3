"""Tests of extras/, started by test_smoke.py: `python test_smoke.py` runs them last."""

import atexit
import colorsys
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import sys
import tempfile
import tracemalloc
from types import SimpleNamespace
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
from extras import (
    benchmark,
    cka,
    coco,
    compare,
    dense,
    detect,
    export,
    reconstruct,
    segment,
    siblings,
)
from test_smoke import (
    FAST,
    PROBE,
    RANDOM,
    TINY,
    Evil,
    as_hugging_face,
    close,
    command,
    commands_in_turn,
    gradients,
    in_two_processes,
    kept_in,
    log_of,
    opened_run,
    raises_value_error,
    refused,
    same_weights,
    save_autoencoder,
    scratch,
    tiny_batch,
    tiny_run,
    tune,
    write_folder,
)

LOOK = ["--data", "shapes", "--workers", "0"]  # for extras/reconstruct.py


# ---- Reconstructions -----------------------------------------------------------------------------


def set_sums(features, logits=None, parts=1):
    """`inception_sums` of all images, added up over batches of 7; splits are contiguous."""
    n, total = len(features), None
    logits = torch.zeros(n, 4) if logits is None else logits
    for index in torch.arange(n).split(7):
        sums = reconstruct.inception_sums(features[index], logits[index], index * parts // n, parts)
        total = {k: v + total[k] for k, v in sums.items()} if total else sums
    return total


def test_frechet_distance_of_gaussians_equals_the_closed_form():
    # Along the axes of one rotation, deviations 1, 2, 3 against 2, 2, 5: 1 + 0 + 4, means: 9.
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    cov_x = rotation @ torch.diag(torch.tensor([1.0, 4, 9]).double()) @ rotation.T
    cov_y = rotation @ torch.diag(torch.tensor([4.0, 4, 25]).double()) @ rotation.T
    means = torch.zeros(3).double(), torch.tensor([1.0, 2, 2]).double()
    close(reconstruct.frechet_distance(means[0], cov_x, means[1], cov_y), 14.0, 1e-9)
    # Covariances that do not commute: the root's trace from the product's own eigenvalues.
    torch.manual_seed(0)
    x, y = torch.randn(2, 40, 6, dtype=torch.float64)
    x, y = x @ (torch.eye(6) + torch.ones(6, 6) / 3).double(), y * torch.arange(1, 7)
    root = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace()
    sums = [reconstruct.mean_and_covariance(set_sums(part)) for part in (x, y)]
    close(reconstruct.frechet_distance(*sums[0], *sums[1]), expected - 2 * root, 1e-9)


def test_frechet_distance_of_few_images_equals_the_nuclear_norm():
    # With fewer images than features: Tr (S1 S2)^1/2 = |X1 X2^T|_* / sqrt((n1 - 1) (n2 - 1)).
    x, y = torch.randn(20, 50).double(), torch.randn(15, 50).double() * 2 + 1
    centred = [part - part.mean(0) for part in (x, y)]
    norm = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / math.sqrt(19 * 14)
    traces = sum(part.square().sum() / (len(part) - 1) for part in centred)
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * norm
    sums = [reconstruct.mean_and_covariance(set_sums(part)) for part in (x, y)]
    close(reconstruct.frechet_distance(*sums[0], *sums[1]) / expected, 1.0, 1e-9)
    close(reconstruct.frechet_distance(*sums[0], *sums[0]), 0.0, 1e-9)


def test_inception_score_is_1_for_uniform_and_the_number_of_classes_for_sure_predictions():
    features = torch.zeros(20, 2)
    close(reconstruct.inception_score(set_sums(features, torch.zeros(20, 5), 10)), (1.0, 0.0), 1e-9)
    sure = torch.full((20, 5), -1e4).scatter(1, (torch.arange(20) % 5)[:, None], 1e4)
    close(reconstruct.inception_score(set_sums(features, sure, 1)), (5.0, 0.0), 1e-6)
    # Two parts, one sure and one without a clue: scores 5 and 1.
    half = torch.cat([sure[:10], torch.zeros(10, 5)])
    close(reconstruct.inception_score(set_sums(features, half, 2)), (3.0, 2.0), 1e-6)
    # exp of the mean KL divergence, the slow way.
    logits = torch.randn(20, 5).double()
    p = logits.softmax(1)
    kl = sum((row * (row / p.mean(0)).log()).sum() for row in p) / 20
    close(reconstruct.inception_score(set_sums(features, logits, 1))[0], kl.exp(), 1e-9)


def test_cls_attention_equals_a_slow_softmax():
    torch.manual_seed(0)
    mae = model.build_mae("tiny", 32, 8)
    images = tiny_batch(2)[0]
    seen = []
    hook = mae.blocks[-1].attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mae.encode(images)
    hook.remove()
    maps = reconstruct.cls_attention(mae, images)
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
        features, logits = reconstruct.InceptionFeatures(weights)(images)
        close(logits, network.eval()(2 * images - 1), 1e-5)
        assert features.shape == (1, 2048)

    # torchvision's file: no batch counters, and the auxiliary classifier is in it.
    bare = {k: v for k, v in weights.items() if "num_batches" not in k}
    bare["AuxLogits.fc.bias"] = torch.zeros(1)
    assert reconstruct.InceptionFeatures(bare).sizes == (2048, 1000)

    published = reconstruct.InceptionFeatures(stand_in(1008))
    assert published.sizes == (2048, 1008) and not published.network.training
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


def test_heat_goes_from_the_darkest_to_the_brightest_colour_of_each_map():
    maps = torch.tensor([[[0.0, 1.0], [0.5, 0.25]], [[7.0, 7.0], [7.0, 9.0]]])
    colours = (reconstruct.heat(maps) * 255).round()
    anchors = torch.tensor(reconstruct.HEAT_COLOURS).float()
    close(colours[0, :, 0, 0], anchors[0], 0)
    close(colours[0, :, 0, 1], anchors[-1], 0)
    close(colours[0, :, 1, 0], anchors[2], 0)  # half way is the middle one of five
    close(colours[1, :, 0, 0], anchors[0], 0)
    close(colours[1, :, 1, 1], anchors[-1], 0)


def test_checkpoints_are_measured_and_drawn_side_by_side():
    with scratch() as root:
        for loss in ("mse", "msg_gan_p"):
            flags = [*FAST, "--loss", loss, "--limit-images", 8, "--out", root / loss]
            assert command(*flags, "--epochs", 3, "--eval-every", 2)[0] == 0
            assert ["psnr_full" in row for row in log_of(root / loss)] == [False, True, True]
        mse, msg = (root / loss / "checkpoint.pt" for loss in ("mse", "msg_gan_p"))
        both = [*LOOK, "--val-images", 2, "--checkpoint", mse, msg]
        both += ["--inception-weights", "none", "--out", root / "both"]
        assert command(*both, script=reconstruct)[0] == 0
        both = json.loads((root / "both" / "eval.json").read_text())
        assert both["images"] == 2 and list(both["results"]) == ["mse", "msg_gan_p"]
        for row in both["results"].values():
            assert row["psnr_pasted"] > row["psnr"] and "fid_full" not in row
        names = ["attention.png", "attention_mse.png", "attention_msg_gan_p.png"]
        names += ["reconstruction.png"]
        assert {p.name for p in (root / "both" / "pictures").iterdir()} == set(names)


def test_what_cannot_be_measured_is_refused():
    with scratch() as root:
        small, large, touched = root / "small.pt", root / "large.pt", root / "touched"
        save_autoencoder(small)
        save_autoencoder(large, "--image-size", "64")
        look = [*LOOK, "--out", root / "out", "--checkpoint"]
        status, errors = command(*LOOK, script=reconstruct)
        assert status == 2 and "required: --checkpoint" in errors
        refused(*look, "none", names=["none does not exist"], script=reconstruct)
        refused(*look, small, large, names=["image-size 64", "apart"], script=reconstruct)
        torch.save({"fc.bias": torch.zeros(1008)}, root / "part.pth")
        torch.save({1: torch.zeros(2), "fc.bias": torch.tensor(1.0)}, root / "odd.pt")
        torch.save(dict.fromkeys(("mae", "fc.bias"), Evil(touched)), root / "evil.pt")
        refused(*look, root / "evil.pt", names=["evil.pt"], script=reconstruct)
        refused(*look, root / "part.pth", names=["an encoder alone"], script=reconstruct)
        refused(*look, small, "--data", root / "no.jpg", names=["no.jpg"], script=reconstruct)
        torch.save({"script": "finetune.py", "classifier": {}}, root / "other.pt")
        refused(*look, root / "other.pt", names=["not a checkpoint of train"], script=reconstruct)
        for file, *names in (
            (small, "Inception weights", "6726825d"),
            (root / "part.pth", "missing: Conv2d_1a", "more"),
            (root / "odd.pt", "odd.pt", "fc.bias has shape ()"),
            (root / "evil.pt", "evil.pt", "Inception"),
            (root / "no.pth", "no.pth", "not exist"),
        ):
            given = [*look, small, "--inception-weights", file]
            refused(*given, names=names, script=reconstruct)
        assert not touched.exists()
        pickle.loads(pickle.dumps(Evil(touched)))
        assert touched.exists()  # it would have been


def test_photographs_are_painted_by_files_of_other_projects():
    """A published MAE's file holds {"model": weights}, without a word on how it was trained."""
    torch.manual_seed(0)
    mae = model.build_mae("nano", 32, 8)
    photograph = (torch.rand(32, 32, 3) * 255).byte().numpy()
    with scratch() as root:
        torch.save({"model": mae.state_dict()}, root / "mae_visualize.pth")
        theirs = as_hugging_face(mae.state_dict(), newer=False)
        torch.save({f"module.{k}": v for k, v in theirs.items()}, root / "hf.bin")
        (root / "photos" / "sub").mkdir(parents=True)
        for name in ("photo.png", "sub/other.png", "sub/last.png"):
            Image.fromarray(photograph).save(root / "photos" / name)

        def results(*flags):
            given = ["--workers", 0, "--out", root / "out", "--checkpoint", root / "hf.bin"]
            flags = [*given, root / "mae_visualize.pth", *flags]
            status, errors = command(*flags, script=reconstruct)
            assert status == 0 and (root / "out" / "pictures" / "reconstruction.png").exists()
            return json.loads((root / "out" / "eval.json").read_text())

        one = results("--data", root / "photos" / "photo.png")
        assert one["images"] == 1 and list(one["results"]) == ["hf", "mae_visualize"]
        assert one["results"]["hf"] == one["results"]["mae_visualize"]
        # The mask of seed 0, and eq. 1's network: its own PSNR over all pixels.
        real = torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255
        noise = data.PretrainSet(
            data.Folder([root / "photos" / "photo.png"], [0], ["x"]),
            augment=False,
            image_size=32,
            num_patches=16,
            seed=0,
        )[0, 0][1]
        [fake], _ = mae(real, 0.75, noise[None])
        psnr = -10 * (fake.clamp(0, 1) - real).square().mean().log10()
        close(one["results"]["hf"]["psnr_full"], psnr.item(), 1e-3)
        normalised = results("--data", root / "photos" / "photo.png", "--norm-pix-loss")
        assert list(normalised["results"])[0] == "hf (true contrast)"
        assert normalised["results"]["hf (true contrast)"] != one["results"]["hf"]
        two = [root / "photos" / name for name in ("photo.png", "sub/other.png")]
        assert results("--data", *two)["images"] == 2
        assert results("--data", root / "photos", "--inception-weights", "none")["images"] == 3


def test_an_evaluation_takes_the_images_that_training_held_out():
    with scratch() as root:
        write_folder(root / "photos", count=20)  # 40 images, 8 of them held out
        given = [*LOOK, "--data", root / "photos", "--inception-weights", "none", "--checkpoint"]
        for seed in (1, 2):
            flags = [*FAST, "--data", root / "photos", "--out", root / str(seed), "--epochs", 1]
            assert command(*flags, "--seed", seed, "--val-images", 8)[0] == 0
        one, two = (root / str(seed) / "checkpoint.pt" for seed in (1, 2))
        assert command(*given, one, script=reconstruct)[0] == 0
        found = json.loads((root / "1" / "reconstruct" / "eval.json").read_text())
        [log] = log_of(root / "1")
        assert found["images"] == 8 and found["seed"] == 1
        for folder in (root / "photos" / "a", root):  # within the folder, and around it
            names = [f"{folder} holds images that were trained on", f"--data {root}/photos"]
            look = [*given[:-1], "--data", folder, "--checkpoint", one]
            refused(*look, names=names, script=reconstruct)
        for seen, folder, shared in (
            (root / "photos", root / "photos" / "b", True),
            (root / "photos", root / "photographs", False),
            (root / "none", root / "none" / "a", False),
            (root / "parts", root / "parts" / "val", False),
            (root / "parts", root / "parts" / "train" / "a", True),
        ):
            (root / "parts" / "train").mkdir(parents=True, exist_ok=True)
            assert reconstruct.shares_training_images(folder, seen) == shared
        close(found["results"]["mse"]["psnr_full"], log["psnr_full"], 1e-3)
        refused(*given, one, two, names=["different images", "val"], script=reconstruct)
        # What a run started from has seen, counts.
        more = ["--init", one, "--out", root / "more", "--seed", 2, "--epochs", 1]
        assert command(*FAST, "--limit-images", 4, *more)[0] == 0
        later = root / "more" / "checkpoint.pt"
        refused(*given, later, names=["different images", "val"], script=reconstruct)
        photos = [*CKA, "--data", root / "photos", "--checkpoint", one]
        cka_refused(*photos, names=["give --seed 1"])
        # With what seed another folder was seen does not.
        more = ["--init", later, "--out", root / "last", "--seed", 1, "--epochs", 1]
        assert command(*FAST, "--data", root / "photos", *more)[0] == 0
        last = root / "last" / "checkpoint.pt"
        assert command(*given, one, last, script=reconstruct)[0] == 0
        more = ["--loss", "r_mae", "--init", one, "--out", root / "sibling", "--seed", 2]
        photos = [*SIBLING, "--model", "nano", "--data", root / "photos", "--epochs", 1]
        refused(*photos, *more, names=["give --seed 1"], script=siblings)


def test_unreadable_images_are_left_out_of_an_evaluation():
    with scratch() as root:
        write_folder(root / "train", count=4)
        write_folder(root / "val", count=4)
        flags = [*FAST, "--data", root, "--out", root / "run"]
        assert command(*flags, "--epochs", 1)[0] == 0
        (root / "val" / "a" / "2.png").write_text("not an image")
        given = ["--checkpoint", root / "run" / "checkpoint.pt", "--data", root, "--workers", 0]
        given += ["--inception-weights", "none", "--out", root / "out"]
        status, errors = command(*given, script=reconstruct)
        result = json.loads((root / "out" / "eval.json").read_text())
        assert status == 0 and "left out" in errors and "a/2.png" in errors
        assert (result["images"], result["unreadable"]) == (7, 1)


def test_two_processes_measure_pictures_as_one_does():
    with scratch() as root:
        save_autoencoder(root / "g.pt", "--loss", "msg_gan_p")
        torch.save(stand_in(), root / "inception.pth")
        given = [*LOOK, "--checkpoint", root / "g.pt", "--val-images", 3]
        given += ["--inception-weights", root / "inception.pth"]
        two = [*given, "--batch-size", 2, "--out", root / "2"]
        wait = in_two_processes(commands_in_turn, (reconstruct, two))
        one = [*given, "--batch-size", 4, "--out", root / "1"]
        assert command(*one, script=reconstruct)[0] == 0
        wait()
        one, two = (json.loads((root / n / "eval.json").read_text()) for n in "12")
        assert one["images"] == two["images"] == 3 and "not the file" in one["inception"]
        assert list(one["results"]) == ["real", "msg_gan_p"]
        assert one["results"]["msg_gan_p"]["fid_full"] > 0
        for name, row in one["results"].items():
            for metric, value in row.items():
                close(two["results"][name][metric], value, 1e-4 * max(1, abs(value)))


# ---- Export --------------------------------------------------------------------------------------


def test_weights_get_the_names_of_other_projects():
    torch.manual_seed(0)
    mae = model.build_mae("tiny", 32, 8)
    ours = mae.state_dict()
    theirs = export.to_hf(ours)
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
    back, left_out = model.from_others(theirs)
    assert left_out == [] and back.keys() == ours.keys()
    assert all(torch.equal(back[k], v) for k, v in ours.items())


def test_exported_weights_start_other_runs():
    with scratch() as root:
        source = root / "checkpoint.pt"
        save_autoencoder(source)
        ours = kept_in(root)["mae"]
        given = ["--checkpoint", source, "--format", "mae", "--out", f"{root}/./checkpoint.pt"]
        refused(*given, names=["is the checkpoint itself"], script=export)
        for kind, kept in (("mae", 134), ("timm", 78), ("hf", 174)):
            file = root / f"{kind}.pt"
            given = ["--checkpoint", source, "--format", kind, "--out", file]
            assert command(*given, script=export)[0] == 0
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
            for path in (file, root / "x.safetensors"):  # what it prints: a program as it stands
                lines = export.loading_lines(path, kind, kept_in(root)["arguments"])
                compile(lines, "printed", "exec")
                assert "(0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)" in lines
                assert "import torch\n" in lines and str(path) in lines
                assert ("import safetensors" in lines) == (path.suffix == ".safetensors")
        msg = [*FAST, "--model", "tiny", "--loss", "msg_gan", "--init", source, "--out", root]
        msg += ["--resume", "off"]
        assert command(*msg, "--limit-images", 4, "--epochs", 1)[0] == 0
        hf = ["--checkpoint", source, "--format", "hf", "--out", root / "x.pt"]
        refused(*hf, names=["decoder_rgb", "timm"], script=export)
        status, errors = command("--out", root / "x.pt", script=export)
        assert status == 2 and "required: --checkpoint" in errors
        written = ["--checkpoint", source, "--out"]
        refused(*written, root / "no" / "x.pt", names=["no/x.pt", "cannot write"], script=export)
        torch.save({"mae": Evil(root / "touched")}, root / "evil.pt")
        evil = ["--checkpoint", root / "evil.pt", "--out", root / "x.pt"]
        refused(*evil, names=["evil.pt", "not a checkpoint"], script=export)
        evil = ["--checkpoint", root / "timm.pt", "--out", root / "x.pt"]
        refused(*evil, names=["timm.pt is not a checkpoint"], script=export)
        assert not (root / "touched").exists() and not (root / "x.pt").exists()
        with mock.patch.dict(sys.modules, {"safetensors": None, "safetensors.torch": None}):
            names = ["pip install safetensors"]
            refused(*written, root / "x.safetensors", names=names, script=export)


def test_a_network_that_is_more_than_a_plain_autoencoder_gives_its_encoder():
    torch.manual_seed(0)
    plain = model.build_mae("tiny", 32, 8).state_dict()
    encoder = {k: v for k, v in plain.items() if not k.startswith(("decoder_", "mask_token"))}
    more = plain | {"teacher.cls_token": torch.ones(1), "projector.weight": torch.ones(2)}
    msg = model.build_mae("tiny", 32, 8, "msg_mae", 4).state_dict()
    assert export.chosen(plain, "mae").keys() == plain.keys()
    for weights in (more, msg):
        for names in ("mae", "timm"):
            assert export.chosen(weights, names).keys() == encoder.keys()
        raises_value_error(export.to_hf, weights, says="timm and mae take the encoder alone")


# ---- Seeds against each other --------------------------------------------------------------------


def write_logs(folder, **logs):
    """FOLDER/TASK/log.jsonl, or FOLDER/log.jsonl for `own`, whose last row is `logs[task]`."""
    for task, row in logs.items():
        log = folder / task / "log.jsonl" if task != "own" else folder / "log.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps({"top1": -1.0, "psnr": -1.0}) + "\n" + json.dumps(row) + "\n")


def test_seeds_are_compared_by_hand_values():
    with scratch() as root:
        refused(root, names=["there must be logs"], script=compare)
        write_logs(root / "flat" / "runs" / "mse", knn={"top1": 1.0})  # RUNS/ROW/TASK
        refused(root / "flat", names=["mse/knn/log.jsonl", "ROW/SEED"], script=compare)
        root = root / "seeds"
        for seed, psnr, top1 in ((0, 17.0, 40.0), (1, 18.0, 44.0), (2, 16.0, 42.0)):
            write_logs(root / "mse" / str(seed), own={"psnr": psnr}, knn={"top1": top1})
            more = {"top1": top1 + seed + 1}  # 1, 2 and 3 better
            write_logs(root / "ls_gan" / str(seed), own={"psnr": psnr - 2}, knn=more)
        write_logs(root / "random" / "1", knn={"top1": 30.0})
        write_logs(root / "ms_ssim" / "0", own={"pixel": 0.5})  # stopped between measurements
        # Neither nan nor AP's -1, "no such objects", is a value.
        write_logs(root / "mse" / "0", own={"psnr": 17.0}, detect={"ap": -1})
        write_logs(root / "mse" / "1", own={"psnr": 18.0}, detect={"ap": 30.0})
        write_logs(root / "ls_gan" / "1", own={"psnr": 16.0}, detect={"ap": math.nan})
        with open(root / "mse" / "2" / "log.jsonl", "a") as log:
            log.write('{"epoch": 2, "ps')  # a full disk
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert not compare.main([str(root)])
        found = json.loads((root / "compare.json").read_text())
        assert list(found) == ["psnr", "knn top1", "detect ap"]
        assert found["detect ap"]["mse"]["values"] == {"1": 30}
        assert list(found["detect ap"]) == ["mse"]
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


def test_curves_of_several_runs_share_one_picture():
    real = data.save_charts
    with scratch() as root, mock.patch.object(data, "save_charts") as drawn:
        for name, values in (("mse", (15.0, 16.0)), ("sub/gan", (14.0, math.nan))):
            (root / name).mkdir(parents=True)
            rows = [
                {"epoch": n, "psnr": v, "lr": 1e-3, "eq3_on": True}
                for n, v in enumerate(values, start=3)
            ]
            rows[0] |= {"ssim": 0.5} if name == "mse" else {}
            (root / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert not compare.main([str(root / "mse"), str(root / "sub" / "gan")])
        path, charts = drawn.call_args.args
        assert path == root.resolve() / "compare.png"
        lines = {"mse": [(3, 15.0), (4, 16.0)], "sub/gan": [(3, 14.0)]}
        other = {"mse": [(3, 0.5)], "sub/gan": []}  # in the same order: the same colours
        assert charts == {"psnr": ("epoch", 3, 4, lines), "ssim": ("epoch", 3, 4, other)}
        drawn.side_effect = real
        assert not compare.main([str(root / "mse"), str(root / "sub" / "gan")])
        (root / "none").mkdir()
        refused(root / "none", root / "none", names=["no results in"], script=compare)
        for more in (root / "mse", "--tensorboard"):
            names = [f"no results in {root / 'typo'}/log.jsonl"]
            refused(root / "typo", more, names=names, script=compare)
        assert not (root / "typo").exists()
        (root / "none" / "log.jsonl").write_text('{"psnr": 15.0}\n')
        refused(root / "mse", root / "none", names=["a row with its epoch"], script=compare)
        with mock.patch.dict(sys.modules, {"torch.utils.tensorboard": None}):
            names = ["needs the package tensorboard"]
            refused(root / "mse", "--tensorboard", names=names, script=compare)


def test_ticks_of_a_chart_are_round_and_enough():
    assert compare.round_ticks(-0.5, 4.5) == [0, 1, 2, 3, 4]
    close(compare.round_ticks(0.399, 0.427), [0.4, 0.41, 0.42], 1e-12)
    rng = np.random.default_rng(0)
    for low, exponent in zip(rng.normal(0, 50, 200), rng.uniform(-4, 4, 200), strict=True):
        ticks = compare.round_ticks(low, high := low + 10**exponent)
        assert 2 <= len(ticks) <= 6 and low <= ticks[0] <= ticks[-1] <= high, (low, high, ticks)
        step = f"{ticks[1] - ticks[0]:.0e}"
        assert step[0] in "125", (low, high, ticks)
    with (
        scratch() as root,
        mock.patch.object(compare, "round_ticks", wraps=compare.round_ticks) as spy,
    ):
        compare.save_dots(root / "equal.png", {"top-1, %": {"mse": [80.0, 80.0]}})  # in the middle
        close(spy.call_args.args, [79.5, 80.5], 1e-9)


# ---- Cost ----------------------------------------------------------------------------------------


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
    step_alone = mock.patch.multiple(train, step_gradients=step, update=lambda run, apply: None)
    timed = mock.patch.object(benchmark, "time", clock)
    with step_alone, timed, contextlib.redirect_stdout(printed):
        benchmark.main([*FAST, "--loss", "stylegan2_ada_p", "--steps", "11"])
    assert steps == [0, 0, *range(4), *range(4), *range(4)]  # 2 to warm up, 11 made whole rounds
    row = json.loads(printed.getvalue())
    assert row["seconds_per_step"] == 2.0 and row["images_per_second"] == 2.0


def test_a_benchmark_of_all_rows_prints_each_relative_to_mse():
    def run(command, **options):  # the row's own process; here within this one
        assert command[:3] == [sys.executable, "-m", "extras.benchmark"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = benchmark.main(command[3:])
        return SimpleNamespace(returncode=status, stdout=printed.getvalue())

    output, flags = io.StringIO(), [*TINY, "--steps", "1", "--batch-size", "2"]
    fake = dict(all_rows=lambda: ("mse", "ls_gan"), subprocess=mock.Mock(run=run))
    with mock.patch.multiple(benchmark, **fake), contextlib.redirect_stdout(output):
        assert benchmark.main([*flags, "--loss", "all"]) == 0
    rows = [line.split() for line in output.getvalue().splitlines()[1:]]
    assert [row[0] for row in rows] == ["mse", "ls_gan"] and float(rows[0][1]) == 1
    close(float(rows[1][1]), float(rows[1][2]) / float(rows[0][2]), 0.1 * float(rows[1][1]))
    with mock.patch.dict("os.environ", RANK="0"):
        refused(*TINY, "--loss", "all", names=["--loss all", "torchrun"], script=benchmark)
    for flags, names in (  # before the first row is timed
        (["--ada-p", "0"], ["feature_mae has no --ada-p", "--loss ROW"]),
        (["--grain", "cls"], ["mse has no --grain"]),
    ):
        refused("--loss", "all", *flags, names=names, script=benchmark)
    status, errors = command("--loss", "mae", script=benchmark)
    assert status == 2 and "'msg_gan_p'" in errors and "'boot_mae'" in errors


def benchmark_of(*flags):
    """The row that extras/benchmark.py prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert benchmark.main([*flags, *TINY[:6], "--batch-size", "2", "--steps", "1"]) == 0
    return json.loads(printed.getvalue())


def test_a_benchmark_needs_no_weights_and_counts_what_is_trained():
    for loss in ("dvae_p", "vgg_p"):
        row = benchmark_of("--loss", loss)
        assert row["loss"] == loss and row["parameters_d"] == 0 and row["batch_size"] == 2
        weights = model.build_mae("tiny", 32, 8).parameters()
        assert row["parameters_g"] == sum(p.numel() for p in weights if p.requires_grad)
    probe, tuned = (benchmark_of("--task", task) for task in ("linear", "finetune"))
    assert probe["parameters_trained"] == 192 * 1000 + 1000  # a thousand classes, as ImageNet
    assert tuned["parameters_trained"] == tuned["parameters"] == probe["parameters"]


DENSE_SCRIPTS = {"detect": detect, "segment": segment}
SCENE_SETS = {"detect": detect.DetectionSet, "segment": segment.SegmentationSet}
UNTRAINED = ["--checkpoint", "none", "--model", "nano", "--image-size", "32", "--patch-size", "8"]
UNTRAINED += ["--width", "16", "--workers", "0"]


# ---- Average precision, mean IoU -----------------------------------------------------------------


def ap_of(truth, found, *, crowd=(), area=None, masks=False):
    """Average precision of one image and class; truth: [box]; found: [(score, box)], xyxy."""

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
    return coco.average_precision([coco.match_detections(detections, objects, masks=masks)])


ONE, TWO = [0, 0, 10, 10], [20, 0, 30, 10]  # two objects
FAR = [40, 40, 50, 50]  # where there is none


def test_average_precision_has_its_hand_values():
    for truth, found, expected in (
        ([ONE], [(0.9, ONE)], 1.0),
        ([ONE], [(0.9, [0, 0, 8, 10])], 0.7),  # IoU .8 passes .5, .55, ..., .8
        ([ONE], [(0.9, [0, 0, 6, 10])], 0.3),
        ([ONE], [(0.9, [0, 0, 5, 10])], 0.1),
        ([ONE], [(0.9, FAR), (0.8, ONE)], 0.5),  # precision 1/2 at every recall
        ([ONE], [(0.9, ONE), (0.8, ONE), (0.7, FAR)], 1.0),  # what is wrong below costs nothing
        ([ONE, TWO], [(0.9, ONE)], 51 / 101),  # recalls 0 to .50
        ([ONE, TWO], [(0.9, ONE), (0.8, FAR), (0.7, TWO)], (51 + 50 * 2 / 3) / 101),
        (
            [ONE, TWO],
            [(0.9, ONE), (0.8, ONE), (0.7, TWO)],
            (51 + 50 * 2 / 3) / 101,
        ),  # a duplicate is wrong
        ([ONE], [], 0.0),
        ([], [(0.9, FAR)], -1.0),
    ):
        close(ap_of(truth, found)["ap"], expected, 1e-12)
        close(ap_of(truth, found, masks=True)["ap"], expected, 1e-12)  # rectangles


def test_overlaps_of_large_masks_are_those_of_set_algebra_and_take_little_memory():
    rng = np.random.default_rng(0)
    found, truth = (rng.random((n, 300, 700)) < part for n, part in ((30, 0.3), (8, 0.6)))
    crowd = np.arange(8) == 5
    tracemalloc.start()
    ious, areas = coco.overlaps(found, truth, crowd)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for d, g in itertools.product(range(30), range(8)):
        whole = found[d] if crowd[g] else found[d] | truth[g]
        close(ious[d, g], (found[d] & truth[g]).sum() / whole.sum(), 1e-12)
    assert areas.tolist() == found.sum(axis=(1, 2)).tolist()
    assert peak < 2 * found.nbytes, peak  # all of them as float32 would be 4 times as much


def test_average_precision_lets_crowds_and_other_sizes_count_neither_way():
    assert ap_of([ONE], [(0.9, ONE)], crowd=[0])["ap"] == -1
    crowded = [(0.9, [20, 0, 24, 4]), (0.8, [25, 5, 29, 9]), (0.7, ONE)]  # two wholly in the crowd
    for masks in (False, True):
        assert ap_of([ONE, TWO], crowded, crowd=[1], masks=masks)["ap"] == 1
    large = [0, 0, 50, 50]  # 2500 pixels: medium
    scores = ap_of([large, TWO], [(0.9, large), (0.8, FAR)])
    assert (scores["ap_medium"], scores["ap_small"], scores["ap_large"]) == (1, 0, -1)
    # Sizes are of the listed area, whatever that of the box.
    assert ap_of([ONE], [(0.9, ONE)], area=[1e4])["ap_large"] == 1


def test_average_precision_tells_sizes_thresholds_and_the_hundred_best():
    def square(left, side):
        return [left, 0, left + side, side]

    # Areas: 32 x 32 is both small and medium, 96 x 96 both medium and large.
    for side, names in ((31, "small"), (33, "medium"), (95, "medium"), (97, "large")):
        scores = ap_of([square(0, side)], [(0.9, square(0, side))], area=[float(side**2)])
        expected = {f"ap_{n}": 1.0 if n == names else -1.0 for n in ("small", "medium", "large")}
        assert {k: scores[k] for k in expected} == expected, side
    for area, names in ((32.0**2, ("small", "medium")), (96.0**2, ("medium", "large"))):
        scores = ap_of([ONE], [(0.9, ONE)], area=[area])
        assert {n for n in ("small", "medium", "large") if scores[f"ap_{n}"] == 1} == set(names)
    # A wrong detection of another size counts neither way; one of this size does.
    small, large = square(0, 10), [100, 100, 300, 300]
    right, wrong = (0.5, small), (0.9, large)
    scores = ap_of([small], [wrong, right])
    close([scores["ap"], scores["ap_small"]], [0.5, 1.0], 1e-12)
    close(ap_of([small], [(0.9, [50, 50, 60, 60]), right])["ap_small"], 0.5, 1e-12)
    # AP75 asks for an IoU of .75: 76 % passes, 74 % does not.
    for part, expected in ((76, 1.0), (74, 0.0)):
        scores = ap_of([[0, 0, 100, 10]], [(0.9, [0, 0, part, 10])])
        assert (scores["ap75"], scores["ap50"]) == (expected, 1.0)
    # The hundred best of a class take part, in an image.
    for others, expected in ((99, 1 / 100), (100, 0.0)):
        found = [(0.9, FAR)] * others + [(0.1, ONE)]
        close(ap_of([ONE], found)["ap"], expected, 1e-12)
    # Of two detections, the better takes the object that it overlaps most.
    near = [1, 0, 11, 10]
    scores = ap_of([ONE, near], [(0.9, near), (0.8, ONE)])
    assert scores["ap"] == 1


def test_average_precision_pools_images_by_score_and_averages_classes():
    one = {"labels": torch.tensor([1]), "boxes": torch.tensor([ONE]), "scores": torch.tensor([0.5])}
    truth = {
        "labels": torch.tensor([1]),
        "boxes": torch.tensor([ONE]),
        "area": torch.tensor([100.0]),
    }
    truth["crowd"] = torch.tensor([False])
    wrong = one | {"boxes": torch.tensor([FAR]), "scores": torch.tensor([0.9])}
    pair = [coco.match_detections(one, truth), coco.match_detections(wrong, truth)]
    close(
        coco.average_precision(pair)["ap"], 51 / 101 / 2, 1e-12
    )  # the better score is the wrong one
    other = {k: v + 1 if k == "labels" else v for k, v in truth.items()}
    missed = coco.match_detections(wrong, other)  # class 2 was never found
    close(coco.average_precision([pair[0], missed])["ap"], (1 / 2 + 0) / 2, 1e-12)


def test_segmentation_scores_have_their_hand_values():
    target, prediction = torch.tensor([0, 0, 1, 1, 2, 255]), torch.tensor([0, 1, 1, 1, 0, 2])
    matrix = segment.confusion_matrix(prediction, target, 4)  # class 3 is nowhere
    scores = segment.segmentation_scores(matrix)
    close(scores["pixel_accuracy"], 0.6, 1e-12)
    close(scores["miou"], (1 / 3 + 2 / 3 + 0) / 3, 1e-12)
    close(scores["miou_all"], (1 / 3 + 2 / 3 + 0 + 0) / 4, 1e-12)
    assert matrix.sum() == 5 and matrix[0, 1] == 1  # truth 0, called 1


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
    box = coco.polygons_to_mask([[2, 2, 6, 2, 6, 5, 2, 5]], 8, 9)
    expected = np.zeros((8, 9), bool)
    expected[2:5, 2:6] = True  # 12 pixels, where PIL fills 20
    assert (box == expected).all()
    assert coco.polygons_to_mask([[2.5, 2.5, 6.5, 2.5, 6.5, 5.5, 2.5, 5.5]], 8, 9).sum() == 12
    both = coco.polygons_to_mask([[0, 0, 3, 0, 3, 3, 0, 3], [2, 2, 6, 2, 6, 5, 2, 5]], 8, 9)
    assert both.sum() == 9 + 12 - 1  # parts unite where they meet
    rng = np.random.default_rng(0)
    for _ in range(40):  # partly outside of the image
        polygon = rng.uniform(-4, 16, 2 * rng.integers(3, 8)).round(2).tolist()
        assert (coco.polygons_to_mask([polygon], 11, 13) == slow_polygon(polygon, 11, 13)).all()


def test_run_lengths_are_compressed_as_coco_does_and_come_back():
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)  # by columns: 0 0, 1 1, 1 0
    assert coco.mask_to_rle(mask) == {"size": [2, 3], "counts": "231"}
    # Runs 0, 4, 2, 1: the fourth is 1 - 4 = -3, 29 in five bits; 29 + 48 is M.
    assert coco.mask_to_rle(np.array([[1, 1, 1, 1, 0, 0, 1]], bool))["counts"] == "042M"
    assert coco.mask_to_rle(np.zeros((40, 1), bool))["counts"] == "X1"  # 40 = 8 + 32 * 1
    rng = np.random.default_rng(0)
    for share in (0, 0.003, 0.1, 0.5, 1):
        mask = rng.random((31, 47)) < share
        packed = coco.mask_to_rle(mask)
        assert (coco.rle_to_mask(packed["counts"], 31, 47) == mask).all()
        runs = [0] * int(mask[0, 0]) + [len(list(g)) for _, g in itertools.groupby(mask.T.ravel())]
        assert (coco.rle_to_mask(runs, 31, 47) == mask).all()
        message = refusal(coco.rle_to_mask, packed["counts"], 31, 46)
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


def scenes_refused(script, path):
    """What a script says of a --data that does not fit."""
    return refusal(dense.open_scenes, script.open_source, str(path), 8)


def test_coco_scenes_read_what_the_files_say():
    with scratch() as root:
        write_coco(root)
        scenes = coco.CocoScenes(root, "train")
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
    keyless = coco_content()
    del keyless["annotations"][1]["category_id"]
    mask, short = {"size": [8, 11], "counts": [88]}, {"size": [8, 12], "counts": [0, 8, 1]}
    part = {"size": [8, 12], "counts": [0, 8.4, 88]}
    for content, words in (
        (torn, "torn or not COCO's"),
        ("[]", "torn or not COCO's"),
        ('{"images": []}', "torn or not COCO's"),
        ('{"images": [1], "categories": [], "annotations": []}', "torn or not COCO's"),
        ('{"images": [], "categories": [], "annotations": []}', "lists no images for train"),
        (keyless, "annotation 1 has no 'category_id'"),
        (changed("annotations", bbox=None), "annotation 1 has a box of 1 numbers"),
        (changed("annotations", bbox=[1, 2, 3, "x"]), "annotation 1 could not convert"),
        (changed("annotations", image_id=[9]), "annotation 1 "),
        (changed("annotations", bbox=[1, 2, 10**400, 4]), "annotation 1 "),
        (changed("images", id=[4]), "image [4] has no id, or none that can be read"),
        ("[" * 100_000, "torn or not COCO's"),
        (changed("annotations", area="large"), "annotation 1 could not convert"),
        (changed("annotations", segmentation=[[1, 2, 3]]), "annotation 1 has a segmentation that"),
        (changed("annotations", segmentation=[1, 2, 3, 4]), "annotation 1 has a segmentation that"),
        (changed("annotations", segmentation={"size": [8, 12]}), "annotation 1 has no 'counts'"),
        (changed("annotations", segmentation=short), "annotation 1 run lengths cover 9 pixels"),
        (changed("images", height=7.5), "image 4 has height 7.5, which is no number of pixels"),
        (changed("images", width=None), "image 4 has width None"),
        (changed("images", file_name=5), "image 4 has no file_name, or none that can be read (5)"),
        (changed("categories", id=90), "category 90 is listed twice"),
        (changed("annotations", image_id=5), "annotation 1 is of image 5, which is not listed"),
        (changed("annotations", category_id=8), "annotation 1 is of category 8"),
        (changed("annotations", bbox=[1, 2]), "annotation 1 has a box of 2 numbers"),
        (changed("annotations", iscrowd="0"), "annotation 1 has iscrowd '0', not 0 or 1"),
        (changed("annotations", segmentation=[[1, 2, 10**400, 4]]), "annotation 1 has a segm"),
        (changed("annotations", segmentation=part), "annotation 1 has run lengths that are not"),
        (changed("annotations", segmentation=mask), "mask of [8, 11], its image [8, 12]"),
        (changed("images", file_name="none.jpg"), "not there, such as"),
    ):
        with scratch() as root:
            write_coco(root, content)
            message = scenes_refused(detect, root)
            assert words in message and str(root / "annotations") in message, message
    # Drawn pixel by pixel, a corner so far away would take gigabytes.
    far, near = [[1, 2, 4, 2, 121, 6]], [[1, 2, 4, 2, 119, 6]]  # of 10 times 12 px
    with scratch() as root:
        write_coco(root, changed("annotations", segmentation=near))
        assert len(coco.CocoScenes(root, "train")) == 2
    for key, values, words in (
        ("annotations", dict(segmentation=far), "annotation 1 has corners more than 10 sides away"),
        ("annotations", dict(bbox=[5, 5, -3, 2]), "annotation 1 has a box of width and height"),
        ("images", dict(id=9), "image 9 is listed twice"),
        ("images", dict(file_name="../9.jpg"), "file_name ../9.jpg of image 4 leaves the folder"),
        ("images", dict(file_name="/9.jpg"), "file_name /9.jpg of image 4 leaves the folder"),
    ):
        with scratch() as root:
            write_coco(root, changed(key, **values))
            assert words in (message := scenes_refused(detect, root)), message
    with scratch() as root:
        write_coco(root)
        Image.new("RGB", (12, 9)).save(root / "val2017" / "4.jpg")
        message = scenes_refused(detect, root)
        assert "4.jpg has (12, 9) pixels" in message
        assert "is ADE20K's layout" not in refusal(coco.CocoScenes, root / "train2017", "val")


def test_coco_files_of_other_tools_are_read():
    """Keys that may be missing, boxes without outlines, float sizes; what is dropped is said."""
    content = coco_content()
    square, crowd = content["annotations"]
    for row in content["images"]:
        row |= {"width": 12.0, "height": 8.0}
    del square["area"], square["iscrowd"], crowd["area"]
    boxes = [
        {"id": 2, "image_id": 9, "category_id": 7, "bbox": [2.6, 1, 4, 2.5], "segmentation": []},
        {"id": 3, "image_id": 9, "category_id": 7, "bbox": [2, 1, 4, 3], "segmentation": None},
        {"id": 4, "image_id": 9, "category_id": 7, "bbox": [2, 1, 4, 3], "area": 5},
        {"id": 5, "image_id": 9, "category_id": 7, "bbox": [2, 1, 0, 3], "segmentation": [[]]},
    ]
    content["annotations"] += boxes
    with scratch() as root:
        write_coco(root, content)
        scenes = coco.CocoScenes(root, "train")
        target = scenes[1][1]
        content["annotations"] = [*boxes, boxes[1] | {"image_id": 4, "category_id": 90}]
        content["annotations"].insert(0, boxes[2] | {"image_id": 4})
        content["annotations"].remove(boxes[0])
        write_coco(root, content)
        mixed = coco.CocoScenes(root, "train")  # annotations of both images, in no order
        assert [mixed[i][1]["labels"].tolist() for i in (0, 1)] == [[1, 2], [1, 1]]
        assert "warning" not in mixed.note  # 1 of 5 is left out
        content["annotations"].pop(0)
        write_coco(root, content)
        assert "; warning: 1 left out" in coco.CocoScenes(root, "train").note  # 1 of 4
        content["annotations"] = boxes[-1:]
        write_coco(root, content)
        nothing = coco.CocoScenes(root, "train").note
        # Boxes beyond their image, of 12 x 8 px, are left out; one that touches it is not.
        where = [[12, 1, 4, 4], [-4, 1, 4, 4], [1, 8, 2, 2], [1, -3, 2, 3], [11, 7, 9, 9]]
        content["annotations"] = [boxes[1] | {"id": n, "bbox": b} for n, b in enumerate(where)]
        write_coco(root, content)
        beyond = coco.CocoScenes(root, "train")
        assert beyond.boxes.tolist() == [[11, 7, 20, 16]]
        assert beyond.note.endswith("warning: 4 left out, which lie outside of their images")
        # Outlines count where a box was not filled in.
        content["annotations"] = [square | {"bbox": [0, 0, 0, 0]}]
        write_coco(root, content)
        assert coco.CocoScenes(root, "train").note.endswith(": 1 objects of 2 classes in 2 images")
        # Parts of the image instead of pixels.
        content["annotations"] = [boxes[1] | {"bbox": [0.2, 0.5, 0.8, 0.5]}]
        write_coco(root, content)
        assert "no corner beyond pixel 1" in refusal(coco.CocoScenes, root, "train")
        content["annotations"] = [crowd]  # nothing that training takes, or AP counts
        write_coco(root, content)
        assert "there is none to learn from" in refusal(detect.open_source, str(root), "train", 8)
        assert "there is none to measure by" in refusal(detect.open_source, str(root), "val", 8)
    assert scenes.note.endswith(
        ": 5 objects of 2 classes in 2 images, 3 of them boxes without an outline; 1 left out, "
        "which have neither an outline nor an area"
    )
    assert nothing.endswith(
        "in 2 images; warning: 1 left out, which have neither an outline nor an area"
    )
    assert target["outlined"].tolist() == [True, True, False, False, False]
    assert target["crowd"].tolist() == [False, True, False, False, False]
    # Of pixels, of a box, or as listed. The masks of boxes are the boxes.
    close(target["area"], [12, 8, 10, 12, 5], 1e-12)
    assert target["boxes"][2].tolist() == [2.6, 1, 6.6, 3.5]
    expected = torch.zeros(3, 8, 12, dtype=torch.bool)
    expected[0, 1:4, 3:7] = expected[1:, 1:4, 2:6] = True
    assert torch.equal(target["masks"][2:], expected)
    for box in ([2, 1.2, 6, 1.3], [2.1, 1, 2.2, 6], [11.8, 7.9, 12, 8]):  # under a pixel
        assert coco.box_to_mask(box, 8, 12).any()


def test_coco_files_beside_their_images_or_one_file_for_all_are_found():
    with scratch() as root:
        message = refusal(coco.CocoScenes, root, "val")
        assert "annotations/instances_train2017.json" in message and "valid/" in message
        for name, number in (("train", 9), ("valid", 4)):
            content = coco_content()
            content["images"] = [row for row in content["images"] if row["id"] == number]
            content["annotations"] = []
            (root / name).mkdir()
            Image.new("RGB", (12, 8)).save(root / name / f"{number}.jpg")
            (root / name / "_annotations.coco.json").write_text(json.dumps(content))
        assert coco.CocoScenes(root, "train").image_ids == [9]
        assert coco.CocoScenes(root, "val").image_ids == [4]
    with scratch() as root:
        content = coco_content()
        (root / "images" / "sub").mkdir(parents=True)
        image, _ = content["images"]
        names = [f"sub/{number}.jpg" for number in range(21)]
        content["images"] = [image | {"id": n, "file_name": f} for n, f in enumerate(names)]
        for name in names:
            Image.new("RGB", (12, 8)).save(root / "images" / name)
        (root / "annotations.json").write_text(json.dumps(content))
        train_scenes, val_scenes = (coco.CocoScenes(root, part) for part in ("train", "val"))
        assert val_scenes.image_ids == [9, 19] and len(train_scenes) == 19
        assert len(val_scenes.labels) == 2 and len(train_scenes.labels) == 0
        assert train_scenes.note.endswith("every tenth image held out")


def test_boxes_alone_teach_and_measure_boxes_and_no_masks():
    torch.manual_seed(0)
    network = tiny_detector()
    square = {"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1])}
    square["masks"] = torch.zeros(1, 32, 32)
    square["masks"][0, 4:20, 4:20] = 1
    images = torch.rand(1, 3, 32, 32)

    def step(*outlined):
        torch.manual_seed(1)
        network.zero_grad()
        known = {"outlined": torch.tensor(outlined)} if outlined else {}
        terms = network(images, [square | known])
        sum(terms.values()).backward()
        return terms, network.roi_heads.mask_predictor.mask_fcn_logits.weight.grad.abs().sum()

    (alone, mask_grad), (outlined, other_grad), (plain, _) = step(False), step(True), step()
    assert alone["loss_mask"] == 0 and mask_grad == 0 and other_grad > 0
    assert outlined["loss_mask"] == plain["loss_mask"] > 0
    close(alone["loss_box_reg"], outlined["loss_box_reg"], 0)

    # Two objects, one of them a box alone: its own mask is neither right nor wrong.
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :10, :10] = masks[1, 12:, 12:] = True
    truth = {"labels": torch.tensor([1, 1]), "masks": masks, "boxes": detect.mask_boxes(masks)}
    truth |= {"crowd": torch.tensor([False, False]), "area": masks.sum(dim=(1, 2)).double()}
    found = truth | {"scores": torch.tensor([0.5, 0.9])}
    found["masks"] = masks.clone()
    found["masks"][1, 12:22] = False  # half of the box: would be wrong
    for known, expected in ((None, 51 / 202), ([True, False], 1.0), ([False, False], -1.0)):
        known = {} if known is None else {"outlined": torch.tensor(known)}
        match = coco.match_detections(found, truth | known, masks=True)
        close(coco.average_precision([match])["ap75"], expected, 1e-12)
        match = coco.match_detections(found, truth | known)
        close(coco.average_precision([match])["ap"], 1.0, 1e-12)


def test_annotations_are_kept_in_few_large_arrays():
    # A million Python objects would be copied into each loader worker as they are touched.
    content = coco_content()
    square = content["annotations"][0]
    content["annotations"] = [square | {"id": n} for n in range(300)]
    with scratch() as root:
        write_coco(root, content)
        scenes = coco.CocoScenes(root, "train")
        assert len(scenes[1][1]["labels"]) == 300
    values = [value for name, value in vars(scenes).items() if name != "files"]
    assert max(len(value) for value in values if isinstance(value, (list, dict))) <= 2
    assert scenes.numbers.size == 8 * 300


def test_truth_keeps_the_digits_of_the_file():
    # In float32 this area is 1024, a small object, and the box ends elsewhere than pycocotools'.
    content = coco_content()
    content["annotations"][0] |= {"area": 1024.00001, "bbox": [0.1, 0.2, 3.3, 4.1]}
    with scratch() as root:
        write_coco(root, content)
        target = coco.CocoScenes(root, "train")[1][1]
    assert target["area"][0].item() == 1024.00001
    assert target["boxes"][0].tolist() == [0.1, 0.2, 0.1 + 3.3, 0.2 + 4.1]
    nothing = dict(labels=np.zeros(0), scores=np.zeros(0), boxes=np.zeros((0, 4)))
    counted = coco.match_detections(nothing, target)["counted"][0]
    assert counted.tolist() == [True, False, True, False]  # in all, small, medium, large


def test_pictures_lie_as_their_annotations_say_whatever_exif_says():
    def stored(orientation, path):
        """12 x 8 px, black but for the white left half, with a note that they be turned."""
        image = Image.new("L", (12, 8))
        image.paste(255, (0, 0, 6, 8))
        exif = Image.Exif()
        exif[data.EXIF_ORIENTATION] = orientation
        image.save(path, exif=exif)

    for orientation in range(1, 9):
        for turned in (False, True):  # is the listed size that of the upright picture?
            content = coco_content()
            size = {"width": 8, "height": 12} if turned else {}
            content["images"] = [row | size for row in content["images"]]
            content["annotations"] = []
            with scratch() as root:
                write_coco(root, content)
                stored(orientation, root / "val2017" / "9.jpg")
                scenes = coco.CocoScenes(root, "val")
                if turned and orientation < 5:
                    assert "9.jpg has (12, 8) pixels" in refusal(lambda s=scenes: s[1])
                    continue
                pixels = np.asarray(data.to_rgb(scenes[1][0]))[..., 0] > 127
            white = np.zeros((8, 12), bool)
            white[:, :6] = True
            if turned:  # 5 and 6: the left half becomes the upper one; 7 and 8: the lower one
                white = white.T if orientation in (5, 6) else ~white.T
            assert (pixels == white).all(), (orientation, turned)
    with scratch() as root:  # a class map is turned by no one
        write_ade(root)
        stored(3, root / "images" / "validation" / "1.jpg")
        image, _ = segment.MapScenes(root, "validation")[1]
        assert np.asarray(data.to_rgb(image))[0, 0, 0] > 127


def test_files_are_pictures_of_the_formats_that_their_names_may_have():
    for script, write, part in ((detect, write_coco, "val2017"), (segment, write_ade, "images")):
        with scratch() as root:
            write(root)
            path = sorted((root / part).rglob("*.jpg"))[0]
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 8\n%%EOF\n")
            source = script.open_source(str(root), "val", 8)
            if script is segment:
                source.files = [str(path)]
            try:
                source[0]
            except OSError as error:  # as for any torn file
                assert "cannot identify" in str(error)
            else:
                raise AssertionError("PostScript was opened")


def test_class_maps_come_back_as_they_were_written_in_colours():
    classes = torch.tensor([[0, 1, 7], [2, 0, 149]])
    for unknown in (0, 255):
        with scratch() as root:
            segment.write_map(root / "map.png", classes, unknown)
            assert (segment.read_map(root / "map.png", unknown) == classes.numpy()).all()
            pixels = np.asarray(Image.open(root / "map.png").convert("RGB"))
        assert (pixels[0, 1] == dense.class_colour(1)).all()


def test_ade_scenes_read_their_files_and_refuse_what_does_not_fit():
    with scratch() as root:
        write_ade(root)
        scenes = segment.MapScenes(root, "validation")
        image, target = scenes[2]
        assert scenes.classes == ["wall", "sky", "tree"] and image.size == (12, 8)
        assert target.shape == (8, 12) and target.dtype == torch.uint8
        assert target[0, 1] == 2 and (target == 255).sum() == 95  # 3 is class 2, 0 is ignored
        for changes, words in (
            ({"top": 4}, "0.png has label 4, beyond the 3 classes"),
            ({"size": (8, 12)}, "0.png has (8, 12) pixels (width, height), its image (12, 8)"),
        ):
            write_ade(root, **changes)
            assert words in scenes_refused(segment, root)
        names = root / "objectInfo.txt"
        write_ade(root)
        for text, unknown, classes in (  # labels in any order; the unknown one is no class
            ("3\ttree\n1\twall\n2\tsky\n", 0, ["wall", "sky", "tree"]),
            ("0\tunlabelled\n1\twall\n2\tsky\n3\ttree", 0, ["wall", "sky", "tree"]),
            ("0\ta\n1\tb\n2\tc\n3\td\n255\tvoid", 255, ["a", "b", "c", "d"]),
        ):
            names.write_text(text)
            assert segment.MapScenes(root, "training", unknown).classes == classes
        for text, unknown in (
            ("1\twall\n3\ttree", 0),  # a gap
            ("1\twall\n1\tsky\n2\ttree", 0),
            ("1\twall\n2\tsky", 255),
            ("1 wall\n2 sky", 0),  # no tabs
        ):
            names.write_text(text)
            message = refusal(segment.MapScenes, root, "training", unknown)
            assert f"objectInfo.txt must give each label from {int(unknown == 0)} on" in message
        (root / "annotations" / "training" / "1.png").unlink()
        assert "1 maps are missing, such as" in refusal(segment.MapScenes, root, "training")


def partial_of(unknown):
    """`segment.open_source` with another label for unknown pixels."""
    return lambda path, part, size: segment.open_source(path, part, size, unknown)


def test_maps_whose_zero_is_a_class_are_read_as_such():
    def write(values, mode="L"):
        write_ade(root)
        (root / "objectInfo.txt").unlink()
        for path in (root / "annotations").rglob("*.png"):
            pixels = np.resize(np.array(values, np.uint8), (8, 12))
            image = Image.fromarray(pixels)
            (image.convert(mode, dither=0) if mode == "P" else image).save(path)
            if mode == "1":
                Image.fromarray(pixels > 0).save(path)

    with scratch() as root:
        write([0, 1, 2, 255])
        scenes = segment.MapScenes(root, "training", unknown=255)
        assert (
            scenes.classes == ["class 0", "class 1", "class 2"] and "3 classes from" in scenes.note
        )
        assert scenes[0][1].flatten()[:4].tolist() == [0, 1, 2, 255]
        message = refusal(segment.MapScenes, root, "training")
        assert "has label 255: if it means unknown, give --unknown 255" in message
        write([0, 1, 2, 0])  # as ADE20K: 1 is class 0
        scenes = segment.MapScenes(root, "training")
        assert scenes.classes == ["class 1", "class 2"] and "warning" not in scenes.note
        assert scenes[0][1].flatten()[:4].tolist() == [255, 0, 1, 255]
        write([0, 0, 0, 1, 2])
        note = segment.MapScenes(root, "validation").note
        assert "warning: 60% of the pixels are unknown, label 0" in note, note
        for mode in ("L", "1"):
            write([0, 1], mode)
            message = refusal(segment.MapScenes, root, "training")
            assert "1 classes" in message and "give --unknown 255" in message
            scenes = segment.MapScenes(root, "training", unknown=255)
            assert len(scenes.classes) == 2 and scenes[0][1].flatten()[:2].tolist() == [0, 1]
        write([0, 255])
        assert "nothing to tell apart" in refusal(segment.MapScenes, root, "training", 255)
        write([0, 1, 2])
        (root / "annotations" / "validation" / "0.png").unlink()
        pixels = np.full((8, 12), 3, np.uint8)
        Image.fromarray(pixels).save(root / "annotations" / "validation" / "0.png")
        message = refusal(lambda: segment.MapScenes(root, "validation", 255)[0])
        assert "0.png has label 3, beyond the 3 classes" in message
        with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 40):  # of 96: Pillow refuses twice that
            refusal(segment.MapScenes, root, "training", 255)  # no map can be read: no classes
            (root / "objectInfo.txt").write_text("0\ta\n1\tb\n2\tc\n")
            assert len(dense.open_scenes(partial_of(255), str(root), 8)) == 2


def test_each_task_recognises_the_other_tasks_layout():
    with scratch() as root:
        write_coco(root / "coco")
        write_ade(root / "ade")
        words = scenes_refused(detect, root / "ade")
        assert "this is ADE20K's layout, of segmentation" in words
        words = scenes_refused(segment, root / "coco")
        assert "this is COCO's layout, of detection" in words
        assert "does not exist" in scenes_refused(detect, "none")


def test_shapes_give_the_visible_part_of_each_object():
    shapes = data.Shapes("val", 32)
    back, hidden, front = (
        data.DrawnObject(kind, x, 0.5, radius, 0, "plain", 0, 0.1, 0, ())
        for kind, x, radius in ((2, 0.4, 0.3), (5, 0.6, 0.05), (0, 0.6, 0.2))
    )
    with mock.patch.object(shapes, "scene", lambda index: [back, hidden, front]):
        target, kinds = detect.shape_objects(shapes, 0), segment.shape_map(shapes, 0)
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


def scene_set(task, source, indices, *, image_size=16, seed=0, scales=(0.5, 2.0), **options):
    """A task's set of samples."""
    common = dict(image_size=image_size, seed=seed, scales=scales)
    return SCENE_SETS[task](source, indices, **common, **options)


def shapes_set(task):
    """Samples of shapes 48 px wide, at 32 px."""
    source = DENSE_SCRIPTS[task].open_source("shapes", "train", 48)
    return scene_set(task, source, range(6), image_size=32, seed=3)


def test_dense_samples_depend_on_seed_epoch_and_index_alone():
    for task in DENSE_SCRIPTS:
        dataset = shapes_set(task)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = [dataset[(1, index)] for index in range(6)]
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        for index in (4, 0, 2):  # in any order
            assert_close(shapes_set(task)[(1, index)], first[index], rtol=0, atol=0)
        assert not torch.equal(dataset[(2, 0)][0], first[0][0])
        images, targets, _, bad = data.collate(first)
        assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8 and not bad
        shape = targets.shape if task == "segment" else len(targets)
        assert shape == ((6, 32, 32) if task == "segment" else 6)


def test_loaders_hold_few_scenes_and_end_after_measuring():
    for augment in (True, False):
        dataset = scene_set("segment", FewScenes("segment"), range(4), augment=augment)
        loader = data.build_loader(dataset, [(0, 0)], batch_size=1, workers=1)
        assert (loader.prefetch_factor, loader.persistent_workers) == (2, augment)


def test_colours_are_jittered_as_strongly_as_said():
    # MMSegmentation's hue jitter, 18 of OpenCV's 180, is a tenth of the circle to either side.
    torch.manual_seed(0)
    distort = scene_set("segment", FewScenes("segment"), [0]).distort
    red = torch.tensor([200, 40, 40], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    hues = []
    for _ in range(300):
        r, g, b = (distort(red)[:, 0, 0] / 255).tolist()
        hue = colorsys.rgb_to_hsv(r, g, b)[0]
        hues.append(hue - round(hue))  # around 0
    assert 0.09 < max(hues) < 0.11 and -0.11 < min(hues) < -0.09, (min(hues), max(hues))


def test_maps_stay_on_their_image_in_random_views():
    rows, columns = torch.arange(60)[:, None], torch.arange(90)
    truth = ((rows // 15 + columns // 15) % 2).byte()  # a chessboard, its colours its classes
    image = (truth * 255).expand(3, -1, -1).contiguous()
    views = set()
    for ratio in (0.35, 0.5, 0.8, 1.3, 2.6):
        for seed in range(8):
            torch.manual_seed(seed)
            view, maps = dense.random_view(image, truth[None], size=64, ratio=ratio, fill=255)
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


def test_views_have_every_size_place_and_mirror_and_no_classes_beyond_the_image():
    """Of a picture whose pixels are their own coordinates: what do 200 views show of it?"""
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(100), indexing="ij")
    image = torch.stack([2 * columns, 6 * rows, torch.full_like(rows, 255)]).byte()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    labels = torch.ones(40, 100, dtype=torch.uint8)
    target = {"masks": labels[None].bool(), "labels": torch.tensor([1])}
    target |= {"crowd": torch.tensor([False]), "outlined": torch.tensor([True])}
    size, low, high = 64, 0.4, 2.0
    for task, side in (("detect", 100), ("segment", 40)):  # by the longer, or the shorter side
        dataset = scene_set(task, [(picture, target if task == "detect" else labels)], [0] * 200)
        dataset.image_size, dataset.scales = size, (low, high)
        if task == "segment":  # whose colours would move the coordinates
            assert dataset[0, 0][0][2, 0, 0] != dataset[0, 1][0][2, 0, 0]  # of a blue that is 255
            dataset.distort = lambda image: image
        ratios, mirrored, places = [], [], {"left": [], "right": [], "top": [], "bottom": []}
        for index in range(200):
            view, found, _, _ = dataset[1, index]
            inside = found["masks"].any(dim=0) if task == "detect" else found != 255
            height, width = inside.any(1).sum().item(), inside.any(0).sum().item()
            assert inside[:height, :width].all() and inside.sum() == height * width
            if task == "segment":  # nothing is learnt where there is no image
                assert (found[inside] == 1).all() and set(found.unique().tolist()) <= {1, 255}
            x, y = view[0, height // 2, :width] / 2, view[1, :height, width // 2] / 6
            mirrored.append(bool(x[0] > x[-1]))
            x = x.flip(0) if mirrored[-1] else x
            ratios.append(((width - 1) / (x[-1] - x[0])).item() * side / size)
            for name, value in zip(places, (x[0], x[-1], y[0], y[-1]), strict=True):
                places[name].append(value.item())
        ratios = torch.tensor(ratios)
        assert low * 0.94 < ratios.min() < low * 1.2, (task, ratios.min())
        assert high * 0.9 < ratios.max() < high * 1.06, (task, ratios.max())
        assert abs((ratios < (low + high) / 2).float().mean() - 0.5) < 0.15
        assert 0.4 < sum(mirrored) / 200 < 0.6
        # Crops begin at either end, and in between.
        assert min(places["left"]) < 2 and max(places["right"]) > 97, places["right"]
        assert min(places["top"]) < 2 and max(places["bottom"]) > 37
        cut = [a for a, b in zip(places["left"], places["right"], strict=True) if b - a < 60]
        assert max(cut) - min(cut) > 30
    image, starts = torch.arange(66).expand(3, 66, 66).byte(), set()
    for seed in range(40):
        torch.manual_seed(seed)
        view, _ = dense.random_view(image, image[:0], size=64, ratio=1.0, fill=0)
        starts.add(view[0, 0].min().item())
    assert starts == {0, 1, 2}  # both ends, too


def test_boxes_end_where_the_last_pixel_of_their_mask_ends():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[1, 1:4, 2:7] = True
    masks[2, 0, 0] = masks[2, 5, 7] = True
    assert detect.mask_boxes(masks).tolist() == [[3, 2, 4, 3], [2, 1, 7, 4], [0, 0, 8, 6]]
    target = detect.objects_in(torch.stack([masks[0] * 0, masks[1]]), torch.tensor([4, 5]))
    assert target["labels"].tolist() == [5] and target["boxes"].tolist() == [[2, 1, 7, 4]]


def test_training_leaves_out_crowds_and_evaluation_keeps_them():
    with scratch() as root:
        write_coco(root)
        scenes = coco.CocoScenes(root, "train")
        trained = scene_set("detect", scenes, [0, 1], scales=(1.0, 1.0))
        measured = scene_set("detect", scenes, [1], augment=False)
        _, target, _, _ = trained[(1, 1)]
        assert target["labels"].tolist() == [1] and target["masks"].shape == (1, 16, 16)
        nothing = trained[(1, 0)][1]
        assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 16, 16)
        image, target, _, _ = measured[(0, 0)]
    assert target["crowd"].tolist() == [False, True] and target["index"] == 1
    assert target["letterbox"] == dense.Letterbox(8, 12, 11, 16)  # 8 * 16 / 12 = 10.7
    assert (image[:, 11:].permute(1, 2, 0) == torch.tensor(data.MEAN_COLOUR)).all()


def test_an_unreadable_scene_is_replaced_in_training_and_not_measured():
    for task, write, Scenes, splits, name in (
        ("detect", write_coco, coco.CocoScenes, ("train", "val"), "train2017/4.jpg"),
        ("segment", write_ade, segment.MapScenes, ("training",), "annotations/training/0.png"),
    ):
        with scratch() as root:
            write(root)
            scenes = Scenes(root, splits[0])
            (root / name).write_bytes(b"torn")
            trained = scene_set(task, scenes, [0, 1])
            (image, target, _, bad), other = trained[(1, 0)], trained[(1, 1)]
            assert [index for index, _ in bad] == [0] and not other[3]
            assert target is not None and image.shape == (3, 16, 16)
            measured = scene_set(task, scenes, [0, 1], augment=False)
            assert measured[(0, 0)][1] is None and measured[(0, 1)][1]["index"] == 1
            alone = scene_set(task, scenes, [0])[(1, 0)]  # the run is about to end
            assert len(alone[3]) == 1 and not alone[0].any()
            data.collate([alone, other])


def test_boxes_come_back_from_a_letterbox_and_stay_in_the_image():
    generator = torch.Generator().manual_seed(0)
    for height, width, size in ((427, 640, 224), (31, 1000, 64), (640, 426, 512), (50, 50, 64)):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, 0, 0] = 255
        square, place = dense.letterbox(image, size)
        assert square.shape == (3, size, size)
        corners = torch.rand(20, 2, 2, generator=generator) * torch.tensor([width, height])
        boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
        inside = boxes.clone()
        inside[:, ::2] *= place.columns / width
        inside[:, 1::2] *= place.rows / height
        close(dense.boxes_to_image(inside, place), boxes, 1e-3)
        beyond = dense.boxes_to_image(torch.tensor([[-5.0, -5.0, size + 5.0, size + 5.0]]), place)
        close(beyond, [[0, 0, width, height]], 1e-3)
        assert dense.maps_to_image(torch.rand(2, size, size), place).shape == (2, height, width)


def test_maps_come_back_from_a_letterbox_where_they_were():
    place = dense.Letterbox(20, 40, 8, 16)  # of a 16 px square
    x = (torch.arange(16) + 0.5) * 40 / 16  # of each column's centre, in the image's pixels
    back = dense.maps_to_image(x.expand(1, 16, 16), place)[0]
    close(back[:, 2:-2], (torch.arange(40) + 0.5).expand(20, 40)[:, 2:-2], 1e-4)
    logits = torch.randn(19, 16, 16, generator=torch.Generator().manual_seed(0)) - 5
    likeliest = dense.maps_to_image(logits, place).argmax(dim=0)
    assert torch.equal(segment.class_map(logits, place), likeliest) and likeliest.max() == 18


# ---- Networks ------------------------------------------------------------------------------------


def tiny_detector(classes=80, image_size=32, patch_size=8):
    torch.manual_seed(0)
    return detect.Detector(model.build_encoder("nano", image_size, patch_size), classes, 16)


def tiny_segmenter(classes=150):
    torch.manual_seed(0)
    return segment.Segmenter(model.build_encoder("nano", 32, 8), classes, 16)


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
            assert dense.FeaturePyramid(encoder, 8).levels == levels


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


def test_anchors_stand_on_the_cells_of_their_maps():
    # 112 px in patches of 8: maps of 56, 28, 14, 7 and, rounded up, 4 cells; torchvision would take
    # 112 // 4 = 28 px for the step of the last.
    network, seen = tiny_detector(3, 112), []
    generator = network.rpn.anchor_generator
    generator.register_forward_hook(lambda module, inputs, found: seen.append(found[0]))
    with torch.no_grad():
        network.eval()(torch.rand(1, 3, 112, 112))
    last = seen[0][-3 * 4 * 4 :]
    centres = (last[:, :2] + last[:, 2:]) / 2
    assert centres[:, 0].unique().tolist() == centres[:, 1].unique().tolist() == [0, 32, 64, 96]
    first = seen[0][: 3 * 56 * 56]
    assert first[:, 0].max() - first[:, 0].min() > 109  # 55 steps of 2 px


def test_masks_of_28_px_boxes_are_their_own_targets_and_are_pasted_back_pixel_by_pixel():
    masks = (torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    boxes = torch.tensor([[0.0, 0, 28, 28], [3, 5, 31, 33], [22, 12, 50, 40]])
    targets = detect.mask_targets(masks, boxes, torch.tensor([0, 2, 1]))
    cut = [masks[0, :28, :28], masks[2, 5:33, 3:31], masks[1, 12:, 22:]]
    assert torch.equal(targets, torch.stack(cut))
    pasted = detect.paste_masks(targets, boxes, 40, 50)
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
            target = detect.mask_targets(mask[None], box, torch.tensor([0]))
            pasted = detect.paste_masks(target, box, 100, 120)[0]
            iou = (pasted & mask).sum() / (pasted | mask).sum()
            assert iou >= 0.9, (name, size, shift, iou)


def test_pasted_masks_stay_in_their_boxes_and_in_the_image():
    boxes = torch.tensor([[-5.0, -5, 5, 5], [6.4, 2, 8.6, 3], [2.6, 2.6, 3.4, 3.4], [30, 0, 40, 9]])
    pasted = detect.paste_masks(torch.ones(4, 28, 28), boxes, 10, 12)
    assert not pasted[2:].any()  # between two centres; outside
    assert pasted[0, :5, :5].all() and pasted[0].sum() == 25
    assert pasted[1].nonzero().tolist() == [[2, 6], [2, 7], [2, 8]]  # centres at 6.5, 7.5 and 8.5
    assert detect.paste_masks(torch.ones(0, 28, 28), torch.ones(0, 4), 10, 12).shape == (0, 10, 12)


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
    loss = segment.segmentation_loss(logits, torch.randint(0, 150, (1, 32, 32)), aux)
    close(loss.item(), 1.4 * math.log(150), 0.4)  # of guessing; the weight .4
    loss.backward()
    assert not [k for k, p in network.named_parameters() if p.grad is None]
    assert network.eval()(images).shape == (1, 150, 32, 32)


def test_the_segmenter_equals_one_that_is_written_out():
    """UperNet (Xiao et al. 2018, Figure 4), step by step, with the layers' own weights."""
    network = tiny_segmenter(7).eval()
    images = tiny_batch(2)[0]

    def layer(part, x):  # convolution without a bias, GroupNorm, ReLU
        conv, norm, _ = part
        padding = conv.kernel_size[0] // 2
        x = F.conv2d(x, conv.weight, conv.bias, padding=padding)
        return F.relu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))

    def grow(x, side):
        return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)

    with torch.no_grad():
        one, two, three, four = network.maps(images)
        side = four.shape[-1]
        pooled = [
            grow(layer(part, F.adaptive_avg_pool2d(four, n)), side)
            for part, n in zip(network.pooled, (1, 2, 3, 6), strict=True)
        ]
        top = layer(network.context, torch.cat([four, *pooled], dim=1))
        third = layer(network.laterals[2], three) + grow(top, three.shape[-1])
        second = layer(network.laterals[1], two) + grow(third, two.shape[-1])
        first = layer(network.laterals[0], one) + grow(second, one.shape[-1])
        smooth = [layer(*pair) for pair in zip(network.smooth, (first, second, third), strict=True)]
        fine = first.shape[-1]
        merged = torch.cat([grow(x, fine) for x in (*smooth, top)], dim=1)
        logits = network.classify(layer(network.fuse[0], merged))
        close(network(images), grow(logits, 32), 1e-5)
    drops = [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout2d)]
    assert drops == [0.1, 0.1]
    # The second head's gradient reaches the encoder, too: it has the map of one patch a cell.
    network.train().zero_grad()
    network(images)[1].sum().backward()
    assert network.encoder.blocks[0].mlp.fc2.weight.grad.abs().sum() > 0


def test_heads_have_the_published_widths():
    """Parameters, counted from layers' sizes, of heads of 256 (Mask R-CNN) and 512 (UperNet)."""

    def count(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())

    with torch.device("meta"):
        encoder = model.build_encoder("base", 1024, 16)
        detector = detect.Detector(encoder, 80, 256)
        segmenter = segment.Segmenter(model.build_encoder("base", 512, 16), 150, 512)
    conv, norm = 256 * 256 * 9, 2 * 256
    heads = detector.roi_heads
    assert count(detector.rpn) == 2 * (conv + 256) + 3 * 257 + 12 * 257  # ViTDet's two
    dense_layer = 256 * 49 * 1024 + 1024
    assert count(heads.box_head) == 4 * (conv + norm) + dense_layer
    assert count(heads.box_predictor) == 1025 * 81 + 1025 * 4 * 81
    assert count(heads.mask_head) == 4 * (conv + norm)
    assert count(heads.mask_predictor) == 256 * 256 * 4 + 256 + 257 * 81
    sizes, _ = detector.rpn.anchor_generator.sizes, detector.rpn.anchor_generator.aspect_ratios
    assert [s for (s,) in sizes] == [32, 64, 128, 256, 512]  # FPN's
    assert set(detector.rpn.anchor_generator.aspect_ratios) == {(0.5, 1.0, 2.0)}
    assert (heads.box_roi_pool.canonical_scale, heads.box_roi_pool.canonical_level) == (224, 4)
    maps = segmenter.channels  # 512, 512, 768, 512
    head = sum(c * 512 + 2 * 512 for c in maps[:3]) + 4 * (512 * 512 + 2 * 512)
    head += 512 * 5 * 512 * 9 + 2 * 512 + 3 * (512 * 512 * 9 + 2 * 512)
    head += 2048 * 512 * 9 + 2 * 512 + 513 * 150
    parts = ("laterals", "pooled", "context", "smooth", "fuse", "classify")
    assert count(*(getattr(segmenter, name) for name in parts)) == head
    assert count(segmenter.aux, segmenter.aux_classify) == 768 * 256 * 9 + 2 * 256 + 257 * 150


def test_a_detector_runs_under_autocast_and_its_heads_in_float32():
    run, args = dense_run(detect, [*UNTRAINED, "--data", "shapes", "--limit-images", "4"])
    entered, types = [], []

    @contextlib.contextmanager
    def autocast():
        entered.append(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    run.autocast = autocast
    batch = detect.random_batch(args)
    run.network.encoder.register_forward_hook(lambda *_: None)
    run.network.encoder.norm.register_forward_pre_hook(lambda m, x: types.append(x[0].dtype))
    run.network.roi_heads.box_head.register_forward_pre_hook(lambda m, x: types.append(x[0].dtype))
    block = run.network.encoder.blocks[0].mlp.fc1
    block.register_forward_hook(lambda m, x, y: types.append(y.dtype))
    images = data.to_float(batch[0])
    detect.detection_terms(run, images, batch[1], {}, args)
    assert entered and torch.bfloat16 in types and types[-1] == torch.float32


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

    expected = slow(logits) + 0.4 * slow(aux)
    close(segment.segmentation_loss(logits, target, aux).item(), expected, 1e-5)
    both = segment.segmentation_loss(logits.bfloat16(), target, aux)
    assert both.dtype == torch.float32
    close(both.item(), expected, 0.02)
    ignored = torch.full_like(target, 255)
    nothing = segment.segmentation_loss(logits, ignored, aux)
    for gradient in torch.autograd.grad(nothing, (logits, aux)):
        assert nothing == 0 and not gradient.any()


# ---- Measuring -----------------------------------------------------------------------------------


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
    note = ""

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
        area, boxes = masks.sum(dim=(1, 2)).float(), detect.mask_boxes(masks)
        truth = dict(boxes=boxes, labels=labels, masks=masks, crowd=crowd, area=area)
        return image, truth | {"outlined": ~crowd}


class SegmentationStrip(torch.utils.data.Dataset):
    """One long grey picture, and its class map."""

    def __init__(self, height, width):
        self.size = (height, width)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Image.new("RGB", self.size[::-1], "grey"), torch.zeros(self.size, dtype=torch.uint8)


def oracle_run(task, answer, out):
    """Measure a network that answers with answer(the sample's truth): (row, its data set)."""
    dataset = scene_set(task, FewScenes(task), range(4), image_size=256, augment=False)
    answers = [answer(dataset[0, i][1]) for i in range(4)]
    network = Oracle(answers * 2)  # the second time for the picture
    run = SimpleNamespace(network=network, device=torch.device("cpu"))
    run.autocast = contextlib.nullcontext
    loader = data.build_loader(dataset, [(0, i) for i in range(4)], batch_size=3, workers=0)
    args = SimpleNamespace(classes=FewScenes.classes, out=out, slide=False)
    evaluate = {"detect": detect.evaluate_detector, "segment": segment.evaluate_segmenter}[task]
    return evaluate(run, loader, [], args)


def test_perfect_detections_have_an_ap_of_100_through_the_letterbox_and_back():
    def answer(truth):
        place, boxes = truth["letterbox"], truth["boxes"]
        masks = detect.mask_targets(truth["masks"], boxes, torch.arange(2))
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
    mask = coco.rle_to_mask(rle["counts"], *rle["size"])
    assert rle["size"] == [40, 60] and np.array_equal(mask, FewScenes("detect")[0][1]["masks"][0])
    assert "segmentation" not in boxes[0] and "bbox" not in masks[0]

    def boxes_alone(scenes, index, whole=FewScenes.__getitem__):
        image, truth = whole(scenes, index)
        return image, truth | {"outlined": torch.zeros_like(truth["crowd"])}

    with scratch() as out, mock.patch.object(FewScenes, "__getitem__", boxes_alone):
        row = oracle_run("detect", answer, out)
    assert row["ap"] == 100 and not any(name.startswith("mask") for name in row), row


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
        shapes.clear()
        close(segment.slide(network, image, 30, 4), network(image[None])[0], 1e-6)
        assert sum(shapes[:-1]) == windows and max(shapes) <= 4
    image = torch.rand(3, 7, 64)  # narrower than a window
    close(segment.slide(network, image, 30, 4), network(image[None])[0], 1e-6)
    strip = SegmentationStrip(height=5, width=2000)
    dataset = scene_set("segment", strip, [0], image_size=32, augment=False, slide=True)
    assert dataset[0, 0][1]["whole"].shape == (3, 1, 128)  # at most four windows long
    options = dict(image_size=32, augment=False, slide=True)
    dataset = scene_set("segment", FewScenes("segment"), [3], **options)
    assert dataset[0, 0][1]["whole"].shape == (3, 32, 49)  # 64 * 32 / 41 = 49.95, cut off
    run = SimpleNamespace(network=network, device="cpu", autocast=contextlib.nullcontext)
    args = SimpleNamespace(slide=True, image_size=32, batch_size=2)
    [(labels, truth)] = segment.segment(run, data.collate([dataset[0, 0]]), args)
    assert labels.shape == truth["map"].shape == (41, 64)


# ---- Runs ----------------------------------------------------------------------------------------


def dense_run(script, flags):
    """What a script trains on a checkpoint: (run, args)."""
    args = script.parse_args([str(flag) for flag in flags])
    weights, args = finetune.open_checkpoint(args)
    args.classes = [0, 1, 2]
    return script.build_run(args, weights, torch.device("cpu")), args


def test_encoders_load_into_detectors_and_segmenters_at_any_size():
    images = tiny_batch()[0]
    with scratch() as folder:
        path = folder / "c.pt"
        save_autoencoder(path)
        expected = model.build_mae("tiny", 32, 8)
        expected.load_state_dict(torch.load(path)["mae"])
        for script in DENSE_SCRIPTS.values():
            flags = ["--checkpoint", path, "--width", 16, "--batch-size", 8]
            torch.backends.cudnn.benchmark = True
            run, args = dense_run(script, flags)
            assert not torch.backends.cudnn.benchmark  # sizes vary
            encoder = run.network.encoder.eval()
            assert torch.equal(encoder(images), expected.encode(images)[0])
            assert args.drop_path == 0.1 and 0.6 < args.layer_decay < 0.8
            assert args.weight_decay == 0.05
            run, args = dense_run(script, [*flags, "--image-size", 48])
            batch = script.random_batch(args)
            assert finetune.step_gradients(run, [batch], {"step": 0}, args)["loss"] > 0
            assert all(p.grad is not None for p in run.network.parameters())


def test_dense_flags_reach_what_they_name():
    for script in DENSE_SCRIPTS.values():
        flags = [*UNTRAINED, "--data", "shapes", "--limit-images", "4", "--val-images", "2"]
        flags += ["--batch-size", "2"]
        _, args = dense_run(script, flags)
        assert args.layer_decay == 1.0  # of random weights: all layers have all to learn
        run, _ = dense_run(script, [*flags, "--layer-decay", "0.6"])
        scales = sorted({group["lr_scale"] for group in run.opt.param_groups})
        close(scales, [0.6**n for n in (5, 4, 3, 2, 1, 0)], 1e-9)  # embedding, 4 blocks, the rest
        args = script.parse_args([*flags, "--scales", "0.7", "0.8"])
        weights, args = finetune.open_checkpoint(args, "x", script.SCRIPT, keep=())
        make = SCENE_SETS["detect" if script is detect else "segment"]
        train_set, val_set, args = dense.build_data(args, make, script.open_source)
        assert list(train_set.scales) == [0.7, 0.8]
        assert len(train_set) == 4 and len(val_set) == 2 and train_set.augment
        assert not val_set.augment and weights is None


def check_predictions(script, root):
    """Photographs: nothing but the checkpoint and the files is needed."""
    (root / "photos" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png"):
        FewScenes("detect")[1][0].save(root / "photos" / name)
    given = ["--checkpoint", root / "once" / "best.pt", "--workers", 0]
    given += ["--predict", root / "photos", "--out", root / "seen"]
    with mock.patch.object(train, "say") as say:
        assert command(*given, script=script)[0] == 0
    drawn = sorted((root / "seen" / "predictions").iterdir())
    assert [path.name for path in drawn] == ["0000_a.png", "0001_a.png"]
    if script is detect:
        lines = [call.args[0] for call in say.call_args_list]  # it has learnt nothing
        nothing = "nothing with a score of 0.5 or more"
        assert lines[:2] == [f"{root}/photos/{n}: {nothing}" for n in ("a.png", "sub/a.png")]
        with mock.patch.object(detect, "SURE", 0.0), mock.patch.object(train, "say") as say:
            assert command(*given, script=script)[0] == 0
        names = [call.args[0].split("a.png: ")[-1].split()[0] for call in say.call_args_list]
        assert set(names[:2]) <= set(data.SHAPES), names
        results = json.loads((root / "seen" / "results_bbox.json").read_text())
        assert {row["category_id"] for row in results} <= set(range(1, 11)) and results
        assert {row["image_id"] for row in results} == {
            str(root / "photos" / name) for name in ("a.png", "sub/a.png")
        }
    else:
        found = segment.read_map(drawn[1], 0)
        assert found.shape == (60, 33) and found.max() < 11


@mock.patch.object(dense, "VIEW", 96)  # pixels of pictures
def test_dense_runs_stopped_in_mid_epoch_continue_bit_for_bit_and_eval_agrees():
    for script, figures, pictures in (
        (detect, ("ap", "mask_ap50", "ap_small"), {"detections.png", "results_segm.json"}),
        (segment, ("miou", "miou_all", "pixel_accuracy"), {"segmentation.png"}),
    ):
        with scratch() as root:
            few = ["--data", "shapes", "--workers", 0, "--batch-size", 2, "--val-images", 4]
            flags = [*UNTRAINED, *few, "--limit-images", 8, "--epochs", 2, "--lr", 1e-3, "--out"]
            assert command(*flags, root / "once", script=script)[0] == 0
            assert command(*flags, root / "twice", "--steps", 6, script=script)[0] == 0  # of 8
            names = ["--width 16 (now 32)"]
            refused(*flags, root / "twice", "--width", 32, names=names, script=script)
            assert command(*flags, root / "twice", script=script)[0] == 0
            same_weights(root / "once", root / "twice")
            once, twice = log_of(root / "once"), log_of(root / "twice")
            for a, b in zip(once, twice, strict=True):
                assert all(a[name] == b[name] for name in ("loss", *figures)), (a, b)
                if script is detect:
                    terms = [value for name, value in a.items() if name.startswith("loss_")]
                    assert len(terms) == 5
                    close(sum(terms), a["loss"], 1e-4)
            best, output = max(once, key=lambda row: row[figures[0]]), io.StringIO()
            measured = ["--eval", "--checkpoint", root / "once" / "best.pt", *few]
            with contextlib.redirect_stdout(output):
                assert not script.main([str(flag) for flag in measured])
            unsure = "no detection has a score of 0.5 or more" in output.getvalue()
            assert unsure == (script is detect)
            for name in figures:
                assert f"{name} {best[name]:.4g}" in output.getvalue(), (best, output.getvalue())
            written = {path.name for path in (root / "once").rglob("*")}
            assert pictures <= written, written
            # A flag that contradicts the checkpoint is not passed over.
            own = {detect: ("width", 32, 16), segment: ("unknown", 255, 0)}[script]
            names = ["--{} {}, but".format(*own), "best.pt has {}".format(*own[2:]), "leave"]
            refused(*measured, f"--{own[0]}", own[1], names=names, script=script)
            # Neither script takes the other's checkpoint, nor does finetune.py.
            other = next(other for other in DENSE_SCRIPTS.values() if other is not script)
            names = [f"a checkpoint of {script.SCRIPT}, not of"]
            refused(*measured, names=[*names, other.SCRIPT], script=other)
            refused(*measured, names=[*names, "finetune.py"], script=finetune)
            refused(*measured[1:], names=["--eval measures it"], script=script)
            check_predictions(script, root)


@mock.patch.object(dense, "VIEW", 96)  # pixels of pictures
def test_two_processes_detect_and_segment_as_one_does():
    learn = [*UNTRAINED, "--data", "shapes", "--val-images", 9, "--limit-images", 6, "--epochs", 2]
    learn += ["--lr", 1e-4, "--batch-size", 1]
    # A detector's samples and stochastic depth are drawn for each batch, here of one image.
    learn += ["--drop-path", 0.3]
    with scratch() as root:
        jobs = ((s, [*learn, "--out", root / f"{task}2"]) for task, s in DENSE_SCRIPTS.items())
        wait = in_two_processes(commands_in_turn, *jobs)
        for task, script in DENSE_SCRIPTS.items():
            alone = ["--out", root / f"{task}1", "--accum", 2]
            assert command(*learn, *alone, script=script)[0] == 0
        wait()
        for task in DENSE_SCRIPTS:
            for one, two in zip(*(log_of(root / f"{task}{n}") for n in "12"), strict=True):
                assert one["val_images"] == two["val_images"] == 9
                same = [name for name in one if name not in ("seconds", "images_per_second")]
                close([one[name] for name in same], [two[name] for name in same], 1e-3)
        one, two = (json.loads((root / f"detect{n}/results_bbox.json").read_text()) for n in "12")
        assert len({entry["image_id"] for entry in one}) > 5 and len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
            close([a["score"], *a["bbox"]], [b["score"], *b["bbox"]], 1e-3)


def test_dense_tasks_refuse_what_does_not_fit_in_one_line():
    with scratch() as root:
        write_coco(root / "coco")
        write_ade(root / "ade")
        write_coco(root / "torn", json.dumps(coco_content())[:-30])
        flags = [*UNTRAINED, "--batch-size", 2, "--epochs", 1, "--out", root / "out"]

        def rejected(script, *more, names):
            refused(*flags, *more, names=names, script=script)

        rejected(detect, "--data", root / "ade", names=["ADE20K's layout, of segmentation"])
        rejected(segment, "--data", root / "coco", names=["COCO's layout, of detection"])
        rejected(detect, "--data", root / "torn", names=["torn or not COCO's"])
        rejected(detect, "--data", root / "none", names=["does not exist"])
        rejected(detect, names=["--data data/coco does not exist"])
        rejected(segment, "--width", 24, names=["--width 24", "multiple of 16"])
        rejected(detect, "--scales", 2, 1, names=["--scales", "smaller first"])
        rejected(detect, "--drop-path", 1, names=["--drop-path 1", "below 1"])
        rejected(segment, "--checkpoint", "none", "--eval", names=["nothing to measure"])
        rejected(detect, "--image-size", 40, "--data", "shapes", names=["multiple of 16 px"])
        rejected(detect, "--data", root / "coco", "--limit-images", 1, names=["--batch-size"])
        for flag in ("--shots", "--mixup"):  # of classification
            status, errors = command(*flags, flag, 1, script=detect)
            assert status == 2 and f"unrecognized arguments: {flag} 1" in errors
        assert not (root / "out").exists()
        status, errors = command(*flags, "--data", root / "ade", script=segment)
        assert status == 0, errors
        (root / "ade" / "images" / "training").rename(root / "gone")  # measuring needs none of it
        best = ["--eval", "--checkpoint", root / "out" / "best.pt", "--workers", 0]
        status, errors = command(*best, "--data", root / "ade", script=segment)
        assert status == 0, errors
        (root / "ade" / "objectInfo.txt").unlink()
        names = ["sky", "only in"]
        refused(*best, "--data", root / "ade", names=names, script=segment)


def test_unreadable_scenes_are_named_replaced_in_training_and_not_measured():
    with scratch() as root:
        write_ade(root)
        (root / "images" / "training" / "1.jpg").write_bytes(b"torn")
        map_file = root / "annotations" / "validation" / "2.png"
        pixels = np.random.default_rng(0).integers(0, 4, (8, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(map_file)
        map_file.write_bytes(map_file.read_bytes()[:70])
        flags = [*UNTRAINED, "--batch-size", 3, "--epochs", 1, "--data", root]
        status, errors = command(*flags, "--out", root / "out", script=segment)
        assert (
            status == 0 and errors.count("replaced by another") == errors.count("left out: ") == 1
        )
        assert "training/1.jpg" in errors and "validation/2.jpg" in errors, errors
        assert f"(OSError: its map {map_file}: " in errors, errors
        # With nothing known in any map there is no score, and no success.
        for path in (root / "annotations" / "validation").iterdir():
            Image.new("L", (12, 8), 0).save(path)
        names = ["no pixel of the validation maps is known", "--unknown 0"]
        status, errors = command(*flags, "--out", root / "none", script=segment)
        assert status == 2 and all(name in errors for name in names), errors
        [row] = log_of(root / "out")
        assert row["val_images"] == 2 and row["bad_images"] == 2


# ---- Siblings ------------------------------------------------------------------------------------

SIBLING = ["--model", "tiny", "--image-size", "32", "--patch-size", "8", "--data", "shapes"]
SIBLING += ["--batch-size", "4", "--val-images", "4", "--workers", "0", "--lr", "1e-3"]
CKA = ["--data", "shapes", "--workers", "0"]


def sibling_command(*flags):
    """`command` for extras.siblings."""
    return command(*flags, script=siblings)


def sibling_refused(*flags, names):
    """`refused` for extras.siblings."""
    refused(*flags, names=names, script=siblings)


def cka_command(*flags):
    """`command` for extras.cka."""
    return command(*flags, script=cka)


def cka_refused(*flags, names):
    """`refused` for extras.cka."""
    refused(*flags, names=names, script=cka)


def tiny_sibling(*flags):
    """A sibling's run without data: (run, args)."""
    size = ["--model", "tiny", "--image-size", "32", "--patch-size", "8", "--data", "shapes"]
    args = siblings.parse_args([*size, "--out", "unused", *map(str, flags)])
    if args.loss == "feature_mae" and not args.teacher:
        args.teacher = published_mae()
    run = siblings.build_run(args, torch.device("cpu"))
    run.epoch = 1
    return run, args


@functools.cache
def published_mae():
    """A file of a trained MAE, `nano`; its weights are random."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(model.build_mae("nano", 32, 8).state_dict(), f"{folder.name}/mae.pth")
    return f"{folder.name}/mae.pth"


def sibling_batch(loss, B=4):
    """`tiny_batch` of a row, with as many views as it has."""
    views = siblings.SIBLINGS[loss]["views"]
    images, noise, seeds = tiny_batch(B)
    if views > 1:
        images = torch.stack([images, tiny_batch(B, seed=1)[0]], dim=1)
    return images, noise, seeds


def sibling_terms(loss, *flags):
    """(run, args, batch, terms) of a sibling's batch, gradients in place."""
    run, args = tiny_sibling("--loss", loss, *flags)
    batch = sibling_batch(loss)
    terms = siblings.TERMS[loss](run, *batch[:2], {"epoch": 1}, args)
    sum(terms.values()).backward()
    return run, args, batch, {name: value.detach() for name, value in terms.items()}


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
        masks = torch.stack([siblings.block_mask(side, 120 / 196) for _ in range(300)])
        assert masks.shape == (300, side**2) and set(masks.unique().tolist()) == {0, 1}
        assert (masks.sum(dim=1) == wanted).all(), side
        grid = masks.view(-1, side, side)
        # In rectangles: a hidden patch's neighbour is hidden far more often than by chance, 61 %.
        beside = (grid[:, :, 1:] * grid[:, :, :-1]).sum() / grid[:, :, :-1].sum()
        assert side < 14 or beside > 0.85, beside
        coverage = grid.mean(dim=0)  # anywhere, but corners, which few rectangles reach, less often
        assert coverage.min() > 0.05 and coverage[0, 0] < coverage[side // 2, side // 2]
        close(coverage, coverage.T, 0.2)  # upright rectangles as often as flat ones
    # Two draws: an area of 16 + .75 (60 - 16) = 49 at one corner; what then is left at the other.
    draws = [torch.tensor([0.75, 0.5, 0, 0]), torch.tensor([1, 0.5, 0.99, 0.99])]
    with mock.patch.object(torch, "rand", side_effect=draws):
        mask = siblings.block_mask(14, 98 / 196).view(14, 14)
    assert mask[:7, :7].all() and mask[7:, 7:].all() and mask.sum() == 98
    common = dict(image_size=32, num_patches=196, seed=0, blocks=120 / 196)
    dataset = siblings.SiblingSet(data.Shapes("train", 32), **common)
    noise = dataset[1, 0][1]
    assert torch.equal(noise, dataset[1, 0][1]) and (noise >= 1).sum() == 120
    _, _, mask = model.random_masking(noise[None], 0.75)
    assert mask.sum() == 147 and (mask[0] >= (noise >= 1)).all()  # blocks, and 27 others


def test_two_views_are_two_colourings_of_one_crop():
    source = data.Shapes("train", 32)
    common = dict(image_size=32, num_patches=16, seed=0)
    coloured = siblings.SiblingSet(source, views=2, **common)
    plain = siblings.SiblingSet(source, views=2, jitter=0, **common)
    whole = siblings.SiblingSet(source, views=2, augment=False, **common)
    single = siblings.SiblingSet(source, jitter=0, **common)
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
    weights = siblings.mask_density(mask.flatten(1)).view(5, 5)
    close(weights[0, 0], 10 / 9, 1e-6)  # a corner alone
    close(weights[3, 3], 2, 1e-6)  # within a block
    close(weights[4, 4], 1 + 4 / 9, 1e-6)  # beyond the image nothing is hidden
    close(weights[2, 2], 1 + 4 / 9, 1e-6)


def test_cross_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours = siblings.CrossAttention(24, 3, 40)
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
            seen = run.network(images, 0.75, noise)
        features, target, mask = seen[-3:]
        assert {(b, n) for b, n in mask.nonzero().tolist()} == hidden_patches(noise)
        assert target.shape == (4, 16, 128 if loss == "feature_mae" else 192)
        # The target: a plain ViT of the teacher's weights, the whole image, no final norm.
        size = "nano" if loss == "feature_mae" else "tiny"
        shape = {k: model.MAE_SIZES[size][k] for k in ("width", "depth", "heads")}
        vit = model.ViT(image_size=32, patch_size=8, **shape)
        vit.load_state_dict(run.network.teacher.state_dict(), strict=False)
        vit.norm = torch.nn.Identity()
        close(target, vit(images)[:, 1:].detach(), 1e-5)
        weight = siblings.mask_density(mask) if loss == "boot_mae" else torch.ones(4, 16)
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
                progress = {"epoch": epoch}
                weighed = siblings.boot_mae_terms(run, images, noise, progress, args)["features"]
                close(weighed, part * total, 1e-5)
        assert all(p.grad is None for p in run.network.teacher.parameters())


def test_boot_mae_paints_from_an_early_level_and_guesses_features_from_the_last():
    run, _, (images, noise, _), _ = sibling_terms("boot_mae")
    ids_keep, ids_restore, _ = model.random_masking(noise, 0.75)
    x, levels = run.network.encode(images, ids_keep, [0, 1, 6])
    assert [len(d.blocks) for d in (run.network.regressor, run.network.predictor)] == [2, 2]
    image, features, _, _ = run.network(images, 0.75, noise)
    patches = run.network.regressor(x, ids_restore, levels[1])
    close(image, model.imagenet_denormalize(model.unpatchify(patches, 8)), 1e-6)
    close(features, run.network.predictor(x, ids_restore, levels[2]), 1e-6)
    [again], mask = siblings.paint(run.network, images, 0.75, noise)
    assert torch.equal(again, image) and mask.sum() == 48


def test_boot_maes_decoder_equals_one_that_is_written_out():
    torch.manual_seed(0)
    encoder = model.build_encoder("nano", 32, 8)
    decoder = siblings.CrossDecoder(encoder, 48, 4, 10)
    x, context = torch.randn(2, 5, 128), torch.randn(2, 5, 128)
    _, ids_restore, mask = model.random_masking(torch.rand(2, 16), 0.75)
    with torch.no_grad():
        embedded = decoder.embed(x)
        tokens = torch.empty(2, 17, 48)
        tokens[:, 0] = embedded[:, 0]
        for b in range(2):
            for n in range(16):
                place = ids_restore[b, n]
                tokens[b, 1 + n] = embedded[b, 1 + place] if place < 4 else decoder.mask_token[0, 0]
        assert (tokens[:, 1:][mask > 0] == decoder.mask_token[0, 0]).all()
        assert decoder.mask_token.abs().max() > 0
        tokens += model.sincos_positions(48, 4)
        assert len(decoder.blocks) == 2
        for block in decoder.blocks:
            tokens = tokens + block.attn(block.norm1(tokens))
            tokens = tokens + block.cross(block.norm_x(tokens), block.norm_context(context))
            tokens = tokens + block.mlp(block.norm2(tokens))
        close(decoder(x, ids_restore, context), decoder.pred(decoder.norm(tokens[:, 1:])), 1e-5)


def test_both_views_of_r_mae_have_a_gradient():
    # (a - b)^2 and (b - I)^2: the first view's gradient is 2 (a - b), the second's 2 (b - a) + ...
    run, args, (images, noise, _), _ = sibling_terms("r_mae")
    painted = []

    def forward(images, mask_ratio, mask_noise):
        first, second = (torch.rand_like(images).requires_grad_() for _ in range(2))
        painted.extend([first, second])
        return first, second, model.random_masking(mask_noise, mask_ratio)[2]

    with mock.patch.object(run.network, "forward", forward):
        terms = siblings.r_mae_terms(run, images, noise, {"epoch": 1}, args)
    sum(terms.values()).backward()
    first, second = painted
    std = torch.tensor(model.IMAGENET_STD).view(1, 3, 1, 1)
    _, _, mask = model.random_masking(noise, 0.75)
    hidden = data.pixel_mask(mask, 32)
    count = hidden.sum() * 3
    weight = terms["disagreement"].item() / (
        (((first - second) / std).square() * hidden).sum() / count
    )
    expected = 2 * weight * (first - second) / std.square() * hidden / count
    close(first.grad, expected.detach(), 1e-6)
    other = 2 * args.pixel_weight * (second - images) / std.square() * hidden / count
    close(second.grad, (other - expected).detach(), 1e-6)


def test_r_mae_sees_the_halves_that_it_should_and_compares_what_it_should():
    visible = {"complement": 12, "independent": 12, "whole": 16}
    for second, count in visible.items():
        run, args, (images, noise, _), terms = sibling_terms("r_mae", "--second", second)
        images = images.clone().requires_grad_()
        first, other, counted = run.network(images, 0.75, noise)
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
            [expected], _ = model.MAE.forward(run.network, images, 0.25, -noise)
            close(other, expected, 1e-5)
        [expected], _ = siblings.paint(run.network, images, 0.75, noise)
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
    mae = siblings.RMAE(
        second="independent", image_size=20, patch_size=4, **model.MAE_SIZES["nano"]
    )
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

    close(siblings.info_nce(queries, targets), by_hand(s, [0, 1], 0.2), 1e-6)
    # The same targets as the second and third of three processes' four.
    more = torch.cat([torch.tensor([[[-1.0, 0.0]]]), targets, torch.tensor([[[0.0, -1.0]]])])
    s = [[-1, 0.6, 0.0, 0], [-0.6, 1.0, 0.8, -0.8]]
    close(siblings.info_nce(queries, more, 1, 0.5), by_hand(s, [1, 2], 0.5), 1e-6)
    same = torch.ones(7, 3, 5)
    close(siblings.info_nce(same, same), math.log(7), 1e-6)
    close(siblings.byol_loss(queries, targets), 2 - 0.6 - 0.8, 1e-6)
    torch.manual_seed(0)  # places are compared with their own kind alone: a loop
    q, t = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    total = 0
    for b, n in itertools.product(range(3), range(4)):
        scores = torch.stack([F.cosine_similarity(q[b, n], t[m, n], dim=0) / 0.2 for m in range(3)])
        total -= scores.log_softmax(dim=0)[b] / 12
    close(siblings.info_nce(q, t), total, 1e-6)


def test_c_maes_heads_have_the_published_widths_and_its_mask_token_stands_for_hidden_patches():
    first, _, last = siblings.two_layers(768)
    assert (first.out_features, last.in_features, last.out_features) == (2048, 2048, 768)
    torch.manual_seed(0)
    sizes = {k: model.MAE_SIZES["nano"][k] for k in ("width", "depth", "heads")}
    branch = siblings.ContrastBranch(grain="token", image_size=32, patch_size=8, **sizes)
    branch.run_blocks = lambda x: (torch.cat([x[:, :1], x], dim=1), [])
    branch.projector = torch.nn.Identity()
    images, mask = torch.rand(2, 3, 32, 32), (torch.rand(2, 16) > 0.5).float()
    found = branch.embed(images, mask)
    plain = branch.patch_embed(model.imagenet_normalize(images)) + branch.pos_embed[:, 1:]
    hidden = (branch.mask_token + branch.pos_embed[:, 1:]).expand(2, -1, -1)
    close(found, torch.where(mask[:, :, None] > 0, hidden, plain), 1e-6)
    assert (branch.mask_token.abs() > 0).any()


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
        pairs = run.network(views, 0.75, noise)
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
            expected = run.network.embed(other, hidden if direction else 1 - hidden)
            close(targets, expected.detach(), 1e-6)
        name = "contrast" if loss == "c_mae" else "disagreement"
        compare = siblings.info_nce if loss == "c_mae" else siblings.byol_loss
        close(terms[name], sum(compare(q, t) for q, t in pairs).detach() / len(pairs), 1e-5)


def test_a_teacher_is_a_moving_average_that_starts_as_a_copy_and_has_no_gradient():
    for loss in ("boot_mae", "c_mae"):
        run, args, batch, _ = sibling_terms(loss)
        own = dict(run.network.named_parameters())
        trained = {id(p) for group in run.opt.param_groups for p in group["params"]}
        start = {k: v.clone() for k, v in run.network.teacher.named_parameters()}
        assert start.keys() <= own.keys() and len(start) > 50
        for name, p in run.network.teacher.named_parameters():
            assert torch.equal(p, own[name]) and p.grad is None and id(p) not in trained
        # A network that jumps by 1 once: after k steps the teacher has done 1 - m^k of it.
        with torch.no_grad():
            for name in start:
                own[name] += 1
        for _ in range(5):
            siblings.move_teacher(run.network, 0.9)
        for name, p in run.network.teacher.named_parameters():
            close(p, start[name] + 1 - 0.9**5, 1e-5)
    args = SimpleNamespace(loss="boot_mae")
    for epoch, wanted in ((1, 0.999), (51, 0.99945), (101, 0.9999), (300, 0.9999)):
        close(siblings.teacher_momentum(epoch, args), wanted, 1e-9)
    assert siblings.teacher_momentum(40, SimpleNamespace(loss="c_mae")) == 0.996


def test_every_sibling_lowers_its_terms():
    for loss in siblings.SIBLINGS:
        run, args = tiny_sibling("--loss", loss, "--epochs", "1")
        images, noise, seeds = sibling_batch(loss)
        batch, progress = ((255 * images).byte(), noise, seeds, []), train.new_progress()
        train.set_rate(run.opt, 1e-3)
        history = []
        for _ in range(20):
            terms = finetune.step_gradients(run, [batch], progress, args)
            history.append(terms["loss"].item())
            finetune.update(run, apply=True)
        assert np.mean(history[-3:]) < 0.75 * np.mean(history[:3]), (loss, history)


def test_flags_of_other_siblings_are_named():
    flags = ["--pixel-weight", "3", "--second", "whole", "--grain", "cls", "--temperature", "1"]
    for loss, said in (
        ("feature_mae", ["pixel-weight", "second", "grain", "temperature"]),
        ("boot_mae", ["second", "grain", "temperature"]),
        ("r_mae", ["grain", "temperature"]),
        ("c_mae", ["pixel-weight", "second"]),
        ("byol_mae", ["pixel-weight", "second", "temperature"]),
    ):
        with mock.patch.object(train, "say") as say:
            siblings.parse_args(["--loss", loss, *flags])
        lines = [f"--{flag} has no effect on --loss {loss}" for flag in said]
        assert [call.args[0] for call in say.call_args_list] == lines


def test_siblings_run_from_their_name_and_their_encoders_are_measured():
    with scratch() as root:
        for loss in siblings.SIBLINGS:
            out, flags = root / loss, [*SIBLING, "--loss", loss, "--limit-images", 8]
            flags += ["--epochs", 1, "--teacher", published_mae()]
            assert sibling_command(*flags, "--out", out)[0] == 0
            [row] = log_of(out)
            paints = loss in siblings.PAINTS
            assert math.isfinite(row["psnr" if paints else "val_loss"])
            assert (out / "pictures" / "epoch_0001.png").exists() == paints
            assert (out / "pictures" / "curves.png").exists()
            path = ["--checkpoint", out / "checkpoint.pt", "--workers", 0]
            knn = [*path, "--task", "knn", *PROBE, "--limit-images", 20]
            assert command(*knn, script=finetune)[0] == 0
            encoder, measured = kept_in(out)["mae"], opened_run([*path, *PROBE])[0].network.encoder
            for name, value in measured.state_dict().items():
                assert torch.equal(value, encoder[name]) or name == "pos_embed", name
            if momentum := siblings.SIBLINGS[loss]["momentum"]:  # each step moves the teacher
                after = []
                for steps in (1, 2):
                    out_k = ["--out", root / f"{loss}_steps", "--steps", steps]
                    assert sibling_command(*flags, *out_k)[0] == 0
                    after.append(kept_in(out_k[1])["mae"])
                for name, value in after[1].items():
                    if name.startswith("teacher.") and name != "teacher.pos_embed":
                        own = after[1][name.removeprefix("teacher.")]
                        expected = torch.lerp(after[0][name], own, 1 - momentum[0])
                        close(value, expected, 1e-7)
                teacher, own = (after[1][k] for k in ("teacher.norm.bias", "norm.bias"))
                assert teacher.abs().max() > 0 and not torch.equal(teacher, own)
            if loss == "boot_mae":  # --init: the teacher starts from the same weights
                with contextlib.redirect_stdout(io.StringIO()):
                    run, args = tiny_sibling("--loss", "c_mae", "--init", out / "checkpoint.pt")
                assert torch.equal(run.network.teacher.cls_token, encoder["cls_token"])
                assert torch.equal(run.network.cls_token, encoder["cls_token"])
            run, args = tiny_run("--loss", "mse", "--init", str(out / "checkpoint.pt"))
            with contextlib.redirect_stdout(io.StringIO()):
                train.initialise(run, args)
            assert torch.equal(run.mae.norm.weight, encoder["norm.weight"])
            decoder = torch.equal(run.mae.mask_token, encoder.get("mask_token", torch.zeros(0)))
            assert decoder == (loss == "r_mae")
        none = root / "none.pt"
        feature = [*SIBLING, "--loss", "feature_mae"]
        sibling_refused(*feature, names=["--teacher FILE"])
        sibling_refused(*feature, "--teacher", none, names=["none.pt"])
        r_mae = root / "r_mae" / "checkpoint.pt"
        flags = [*feature, "--teacher", r_mae]
        sibling_refused(*flags, "--patch-size", 4, names=["8 px", "4"])
        few = ["--limit-images", 8, "--out", root / "feature_mae"]
        sibling_refused(*flags, *few, names=["--teacher", "mae.pth (now"])
        c_mae = [*SIBLING, "--loss", "c_mae"]
        sibling_refused(*c_mae, "--batch-size", 1, names=["--batch-size 1", "c_mae"])
        sibling_refused(*c_mae, "--norm-pix-loss", names=["c_mae", "rows that paint"])
        other = [*SIBLING, "--loss", "r_mae", "--out", root / "r_mae", "--second", "whole"]
        sibling_refused(*other, "--limit-images", 8, names=["--second complement (now whole)"])


def test_every_sibling_stopped_in_mid_epoch_continues_bit_for_bit():
    for loss in siblings.SIBLINGS:
        with scratch() as root:
            flags = [*SIBLING, "--loss", loss, "--limit-images", 8, "--epochs", 2]
            flags += ["--teacher", published_mae()]
            assert sibling_command(*flags, "--out", root / "once")[0] == 0
            assert sibling_command(*flags, "--out", root / "twice", "--steps", 3)[0] == 0
            assert sibling_command(*flags, "--out", root / "twice")[0] == 0
            same_weights(root / "once", root / "twice")
            once, twice = log_of(root / "once"), log_of(root / "twice")
            figure = "psnr" if loss in siblings.PAINTS else "val_loss"
            assert [row[figure] for row in once] == [row[figure] for row in twice]


def test_the_last_epoch_of_a_sibling_is_measured():
    flags = [*SIBLING, "--loss", "boot_mae", "--limit-images", 4, "--epochs", 3]
    with scratch() as root:
        assert command(*flags, "--eval-every", 2, "--out", root, script=siblings)[0] == 0
        assert ["psnr" in row for row in log_of(root)] == [False, True, True]


def test_two_processes_give_the_gradients_of_one_for_every_sibling_in_two_steps():
    with scratch() as folder:
        in_two_processes(gloo_siblings, folder)()
        parts = [torch.load(f"{folder}/rank{r}.pt", weights_only=True) for r in range(2)]
    one, *two = sibling_scores(), *(part.pop() for part in parts)
    for row in two:  # of three images, which do not share out evenly
        assert row.keys() == one.keys() and "psnr" in one
        close(list(row.values()), list(one.values()), 1e-3)
    for loss, first, second in zip(siblings.SIBLINGS, *parts, strict=True):
        whole = sibling_gradients(loss, slice(None), 1)
        for expected, a, b in zip(whole, first, second, strict=True):
            assert torch.equal(a, b), loss  # the processes agree
            close(a, expected, 2e-4 * expected.abs().max().item())


def sibling_gradients(loss, part, accum):
    """For `part` (a slice) of a batch: the network's gradients in two steps, plain SGD between."""
    run, args = tiny_sibling("--loss", loss)
    images, noise, seeds = (x[part] for x in sibling_batch(loss, 16))
    batches = zip(*(x.chunk(accum) for x in ((images * 255).byte(), noise, seeds)), strict=True)
    batches, results = [(*batch, []) for batch in batches], []
    run.opt = torch.optim.SGD(run.network.parameters(), lr=1e-3)
    for _ in range(2):  # in the second, DistributedDataParallel has rearranged its buckets
        finetune.step_gradients(run, batches, train.new_progress(), args)
        results.append(gradients(run.network).clone())
        finetune.update(run, apply=True)
    return results


def gloo_siblings(folder):
    """One process of the test above: this rank's half of the batch, for every sibling."""
    train.start_processes()
    rank, results = int(os.environ["RANK"]), []
    for loss in siblings.SIBLINGS:  # accumulated, too, where images are not compared
        results.append(sibling_gradients(loss, slice(rank, None, 2), 1 if loss == "c_mae" else 2))
    torch.save([*results, sibling_scores()], f"{folder}/rank{rank}.pt")
    train.stop_processes()


def sibling_scores():
    """What this process, or both, measure on three validation images."""
    run, args = tiny_sibling("--loss", "boot_mae", "--val-images", "3", "--out", os.devnull)
    run.epoch, args.picture_every = 1, 2
    _, val_set = siblings.build_data(args)
    return run.evaluate(run, finetune.shard(val_set, args), [], args)


# ---- CKA -----------------------------------------------------------------------------------------


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
        close(cka.hsic(K, L), slow_hsic(K, L), 1e-12)
        close(
            cka.hsic(torch.stack([K, K]), torch.stack([L, K])),
            [slow_hsic(K, L), slow_hsic(K, K)],
            1e-12,
        )
        close(cka.cka_sums(x + 7, y)[0], n * slow_hsic(K, L), 1e-12)  # shifts change nothing


def test_cka_weighs_batches_by_their_images():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(13, 3, generator=generator).double() for _ in range(2))
    parts = [(x[:8], y[:8]), (x[8:], y[8:])]
    sums = sum(cka.cka_sums(*part) for part in parts)
    of = [[slow_hsic(a @ a.T, b @ b.T) for a, b in ((p, q), (p, p), (q, q))] for p, q in parts]
    both, own, other = (8 * a + 5 * b for a, b in zip(*of, strict=True))
    close(cka.cka(sums), both / (own * other) ** 0.5, 1e-9)


def test_cka_is_1_of_features_turned_shifted_and_scaled_and_0_of_unrelated_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, 300, generator=generator)  # five batches of 64, 300 channels
    turn = torch.linalg.qr(torch.randn(300, 300, generator=generator))[0]
    same = cka.cka(cka.cka_sums(x, 3 * x @ turn + 2).sum(dim=0))
    close(same, 1, 1e-5)
    sums = cka.cka_sums(*torch.randn(2, 50, 64, 300, generator=generator))
    assert sums.shape == (50, 3) and sums.dtype == torch.float64
    close(cka.cka(sums.sum(dim=0)), 0, 0.01)

    def biased(x, y):  # the plain formula
        x, y = x - x.mean(dim=0), y - y.mean(dim=0)
        return (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())

    assert biased(*torch.randn(2, 64, 300, generator=generator)) > 0.75
    assert not cka.cka(torch.zeros(3)).isfinite() and not cka.cka(-torch.ones(3)).isfinite()


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
        assert cka_command(*given, "--checkpoint", *files, "--out", root / "out")[0] == 0
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
        assert cka_command(*mean)[0] == 0
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
                with mock.patch.object(cka, "is_main", place["is_main"]):
                    assert cka_command(*flags, "--out", root / "two")[0] == 0
        found = json.loads((root / "two" / "cka.json").read_text())
        assert found["images"] == 19 and [count for _, count in parts] in ([10, 9], [9, 10])
        total = parts[0][0]["random weights"] + parts[1][0]["random weights"]
        close(found["cka"]["random weights"], cka.cka(total), 0)
        status, errors = cka_command(*flags, "--out", root / "one")
        assert status == 0 and errors.count("left out: ") == 1 and "b/3.png" in errors, errors
        one = json.loads((root / "one" / "cka.json").read_text())
        assert one["images"] == 19 and one["unreadable"] == 1 and one["seed"] == 3


def test_cka_refuses_what_it_cannot_compare_in_one_line():
    with scratch() as root:
        small, large = root / "small.pt", root / "large.pt"
        save_autoencoder(small)
        save_autoencoder(large, "--image-size", "64")
        given = [*CKA, "--val-images", 8, "--out", root / "out", "--checkpoint"]
        cka_refused(*given, small, large, names=["large.pt", "(64, 8)", "(32, 8)", "apart"])

        cka_refused(*given, small, "--val-images", 3, names=["3 images", "too few"])
        cka_refused(*given, small, "--patch-size", 4, names=["--patch-size 4", "has 8"])
        few = ["--model", "nano", "--image-size", 32, "--patch-size", 16]
        cka_refused(*given, "none", *few, names=["none of 4 patches"])
        cka_refused(*given, root / "no.pt", "none", names=["no.pt does not exist"])
        assert not (root / "out").exists()
