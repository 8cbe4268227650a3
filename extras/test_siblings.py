"""Tests of extras/siblings.py and cka.py."""

import atexit
import contextlib
import functools
import io
import itertools
import json
import math
import os
import tempfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

import data
import finetune
import losses
import model
import train
from extras import cka, siblings
from test_smoke import (
    PROBE,
    RANDOM,
    close,
    command,
    finish,
    gradients,
    kept_in,
    launch_pair,
    log_of,
    opened_run,
    refused,
    same_weights,
    save_autoencoder,
    scratch,
    tiny_batch,
    tiny_run,
    write_folder,
)

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


def test_two_processes_give_the_gradients_of_one_for_every_sibling_in_two_steps():
    with scratch() as folder:
        finish(launch_pair("-m", "extras.test_extras", "--siblings", folder))
        parts = [torch.load(f"{folder}/rank{r}.pt", weights_only=True) for r in range(2)]
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
    torch.save(results, f"{folder}/rank{rank}.pt")
    train.stop_processes()


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
