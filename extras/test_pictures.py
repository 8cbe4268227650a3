"""Tests of extras/reconstruct.py, export.py, compare.py and benchmark.py."""

import contextlib
import io
import json
import math
import pickle
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import model
import train
from extras import benchmark, compare, export, reconstruct
from test_smoke import (
    FAST,
    PROBE,
    TINY,
    Evil,
    close,
    command,
    finish,
    kept_in,
    launch_pair,
    log_of,
    raises_value_error,
    refused,
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
        given = [*LOOK, "--val-images", 2, "--checkpoint", mse]
        both = [*given, msg, "--inception-weights", "none", "--out", root / "both"]
        assert command(*both, script=reconstruct)[0] == 0
        both = json.loads((root / "both" / "eval.json").read_text())
        assert both["images"] == 2 and list(both["results"]) == ["mse", "msg_gan_p"]
        for row in both["results"].values():
            assert row["psnr_pasted"] > row["psnr"] and "fid_full" not in row
        names = ["attention.png", "attention_mse.png", "attention_msg_gan_p.png"]
        names += ["reconstruction.png"]
        assert {p.name for p in (root / "both" / "pictures").iterdir()} == set(names)
        # One alone, with IS and FID.
        torch.save(stand_in(), root / "inception.pth")
        given += ["--inception-weights", root / "inception.pth", "--out", root / "alone"]
        assert command(*given, script=reconstruct)[0] == 0
        alone = json.loads((root / "alone" / "eval.json").read_text())
        assert list(alone["results"]) == ["real", "mse"] and "not the file" in alone["inception"]
        row = alone["results"]["mse"]
        assert row["psnr_full"] == both["results"]["mse"]["psnr_full"] and row["fid_full"] > 0


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
        refused(*look, root / "part.pth", names=["not a checkpoint of train"], script=reconstruct)
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
        close(found["results"]["mse"]["psnr_full"], log["psnr_full"], 1e-3)
        refused(*given, one, two, names=["different images", "val"], script=reconstruct)


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
        ranks = launch_pair("-m", "extras.reconstruct", *two)
        one = [*given, "--batch-size", 4, "--out", root / "1"]
        assert command(*one, script=reconstruct)[0] == 0
        finish(ranks)
        one, two = (json.loads((root / n / "eval.json").read_text()) for n in "12")
        assert one["images"] == two["images"] == 3
        assert set(one["results"]) == {"real", "msg_gan_p"}
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
        msg = [*FAST, "--loss", "msg_gan", "--init", source, "--out", root, "--resume", "off"]
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
        with open(root / "mse" / "2" / "log.jsonl", "a") as log:
            log.write('{"epoch": 2, "ps')  # a full disk
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert not compare.main([str(root)])
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
