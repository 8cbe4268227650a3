# ---- Inception -----------------------------------------------------------------------------------


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


# ---- IS and FID ----------------------------------------------------------------------------------


def inception_sums(features, logits, split, splits=10):
    """What IS and FID need of a batch, as sums to be added up over batches and processes.

    features: (B, C), pooled Inception features. logits: (B, K). split: (B,), to which of the
    `splits` parts of IS each image belongs. Returns {name: float64 tensor}, whose sizes do not
    depend on the number of images.
    """
    features, log_p = features.double(), logits.double().log_softmax(dim=1)
    p = log_p.exp()
    member = F.one_hot(split, splits).T.to(p)  # (splits, B)
    return {
        "images": member.sum(dim=1),  # (splits,)
        "features": features.sum(dim=0),  # (C,)
        "products": features.T @ features,  # (C, C)
        "p": member @ p,  # (splits, K)
        "p_log_p": member @ (p * log_p).sum(dim=1),  # (splits,)
    }


def inception_score(sums):
    """Inception Score (Salimans et al. 2016) -> (mean, standard deviation) over its splits.

    exp of the mean KL divergence of p(class | image) from its mean over the split's images: 1 at
    the worst, the number of classes at the best. sums: from `inception_sums`.
    """
    kept = sums["images"] > 0
    images, mean_p = sums["images"][kept], sums["p"][kept] / sums["images"][kept, None]
    divergence = sums["p_log_p"][kept] / images - torch.xlogy(mean_p, mean_p).sum(dim=1)
    scores = divergence.exp()
    return scores.mean().item(), scores.std(correction=0).item()


def mean_and_covariance(sums):
    """`inception_sums` -> mean (C,) and unbiased covariance (C, C) of the features, float64."""
    n = sums["images"].sum()
    mean = sums["features"] / n
    return mean, (sums["products"] - n * torch.outer(mean, mean)) / (n - 1)


def frechet_distance(mean_x, cov_x, mean_y, cov_y):
    """Fréchet distance of two Gaussians, the D of FID (Heusel et al. 2017) -> float.

    |mean_x - mean_y|^2 + Tr(cov_x + cov_y - 2 (cov_x cov_y)^(1/2)), float64. The root's trace is
    taken from the eigenvalues of R^T cov_y R with cov_x = R R^T: real and symmetric, where a root
    of the product itself is neither. Directions without variance, which any set of fewer images
    than features has, are dropped: the root would magnify their rounding errors.
    """

    def positive(eigenvalues):
        return eigenvalues > eigenvalues.max() * len(cov_x) * torch.finfo(cov_x.dtype).eps

    values, vectors = torch.linalg.eigh(cov_x)
    kept = positive(values)
    root = vectors[:, kept] * values[kept].sqrt()  # R, (C, r)
    products = torch.linalg.eigvalsh(root.T @ cov_y @ root)
    trace = products[positive(products)].sqrt().sum()
    distance = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * trace
    return distance.item()


# ---- Pictures ------------------------------------------------------------------------------------


HEAT_COLOURS = ((5, 3, 25), (85, 20, 110), (190, 55, 85), (248, 145, 30), (252, 250, 180))


def heat(maps):
    """Maps (B, h, w), each stretched to its range -> colours (B, 3, h, w), dark is low."""
    colours = torch.tensor(HEAT_COLOURS).T / 255  # (3, anchors)
    low, high = (f(maps, dim=(1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    position = (maps - low) / (high - low).clamp(min=1e-12) * (colours.shape[1] - 1)
    left = position.floor().clamp(max=colours.shape[1] - 2).long()
    mixed = torch.lerp(colours[:, left], colours[:, left + 1], position - left)  # (3, B, h, w)
    return mixed.transpose(0, 1)


# ---- Reconstructions -----------------------------------------------------------------------------


def open_autoencoders(args, device):
    """--checkpoint's autoencoders -> ({name of the row: run}, args with what they settle).

    run: mae, device, dtype and its autocast, its own args, path. Sizes must agree; the seed is the
    first checkpoint's.
    """
    runs, first = {}, None
    sizes = ("image_size", "patch_size", "mask_ratio")
    for path in args.checkpoints:
        with train.refusals():
            checkpoint = model.load_file(path, "a checkpoint of train.py")
        if not train.made_by("train.py", checkpoint, "mae"):
            fail(f"{path} is not a checkpoint of train.py: reconstructions need its decoder")
        own = argparse.Namespace(**checkpoint["arguments"])
        first = first or own
        for what in sizes:
            flag, here = "--" + what.replace("_", "-"), getattr(own, what)
            if here != getattr(first, what):
                there = getattr(first, what)
                fail(f"{path} has {flag} {here}, {args.checkpoint} {there}: evaluate them apart")
            if getattr(args, what, None) not in (None, here):
                fail(f"{path} has {flag} {here}, not {getattr(args, what)}; leave {flag} off")
        if not losses.LOSSES[own.loss]["pixel"]:
            fail(f"{path} is of --loss {own.loss}, which paints nothing: see --task knn, linear")
        mae = train.build_autoencoder(own)
        with train.refusals():
            model.load_whole(mae, checkpoint["mae"], path)
        name = own.loss
        if own.arch != losses.LOSSES[own.loss]["arch"]:
            name += f" ({own.arch})"
        if own.norm_pix_loss:
            name += " (true contrast)"  # see train.py's `reconstruct`
        if name in runs:
            name += f" {len(runs) + 1}"
        dtype, mae = train.choose_precision(args.amp, device), mae.to(device).eval()
        runs[name] = SimpleNamespace(mae=mae, device=device, dtype=dtype, args=own, path=path)
        on = dtype is not None
        runs[name].autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=on)
    settled = {what: getattr(first, what) for what in (*sizes, "seed")}
    return runs, argparse.Namespace(**vars(args) | settled)


def load_inception(args, device):
    """-> (`InceptionFeatures` or None, what it is or why there is none)."""
    source = args.inception_weights
    get = "give --inception-weights pt_inception-2015-12-05-6726825d.pth, a release of "
    get += "github.com/mseitzer/pytorch-fid (fid_weights)"
    if source == "none":
        return None, "none, so neither IS nor FID"
    if source == "torchvision":
        weights = reason = None
        try:
            with train.first_of_a_node_first():
                weights = Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(
                    progress=False, check_hash=True, weights_only=True
                )
        except (OSError, RuntimeError) as error:  # no network, or half a download
            reason = error
        if train.sum_over_processes({"missing": weights is None}, device)["missing"]:
            why = reason or "on another process"
            return None, f"none, so neither IS nor FID (cannot be downloaded: {why}); {get}"
        what = f"torchvision's, not those of published FIDs; for these {get}"
    else:
        with train.refusals():
            weights = model.load_file(source, "a file of Inception weights")
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
        what = f"{source}, those of published FIDs"
        if not digest.startswith("6726825d"):
            what = f"{source}, not the file of published FIDs; for these {get}"
    try:
        inception = model.InceptionFeatures(weights)
    except ValueError as error:
        fail(f"{source} is not a file of Inception weights: {error}; {get}")
    return inception.to(device), what


@torch.no_grad()
def measure_reconstructions(args, device):
    """Table 1 and Figures 2 and 3 of --checkpoint's autoencoders, on the whole validation set.

    The same random masks for all, also for `boot_mae`, whose log has the PSNR of masks in blocks.
    """
    runs, args = open_autoencoders(args, device)
    out = Path(args.out)
    with train.writing(out):
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    _, source = train.open_data(args, args.image_size)
    patches = (args.image_size // args.patch_size) ** 2
    common = dict(image_size=args.image_size, num_patches=patches, seed=args.seed)
    val_set = data.PretrainSet(source, augment=False, limit=args.val_images, **common)
    seeds = {run.args.seed for run in runs.values()}
    if len(seeds) > 1 and getattr(source, "held_out", False):
        fail(
            f"the checkpoints held out different images (seeds {seeds}): evaluate them apart, or "
            f"put validation images into {args.data}/val"
        )
    inception, what = load_inception(args, device)
    say(f"Inception weights: {what}")
    totals, sums, unread = measure(runs, val_set, inception, args, device)
    if not is_main():  # the sums are all processes', what follows is not shared
        return

    count = totals.pop("images")
    results = {"real": {}} if inception else {}
    results |= {name: {} for name in runs}
    for (name, metric), total in totals.items():
        results[name][metric] = total / count
    for (name, kind), part in sums.items():
        end = f"_{kind}" if kind else ""
        results[name]["is" + end], results[name]["is_std" + end] = losses.inception_score(part)
        if kind and count > 1:
            both = (
                *losses.mean_and_covariance(part),
                *losses.mean_and_covariance(sums["real", ""]),
            )
            results[name]["fid" + end] = losses.frechet_distance(*both)
    about = {"data": args.data, "images": int(count), "unreadable": unread}
    about |= {k: getattr(args, k) for k in ("image_size", "patch_size", "mask_ratio", "seed")}
    about |= {"inception": what, "checkpoints": {name: str(r.path) for name, r in runs.items()}}
    with train.writing(out):
        text = json.dumps(about | {"results": results}, indent=1)
        (out / "eval.json").write_text(text + "\n")
        draw_figures(out / "pictures", runs, val_set, device)
    print_table(results, runs, int(count))
    say(f"done: {out}/eval.json, {out}/pictures/")


def measure(runs, val_set, inception, args, device):
    """One pass over the images -> (totals, sums for IS and FID, unreadable images left out).

    totals: {"images": number, (run's name, metric): sum}. sums: {(run's name, kind):
    `inception_sums`}, ("real", "") for the originals. Both over all processes.
    """
    splits = min(10, len(val_set))  # of IS
    totals = {"images": 0} | {(name, metric): 0 for name in runs for metric in losses.METRICS}
    sums, unread, found = {}, [], {}

    def count_features(name, kind, images, split):
        if inception is None:
            return
        features, logits = inception(images)
        for key, value in losses.inception_sums(features, logits, split, splits).items():
            sums[name, kind][key] += value

    if inception is not None:  # sums of no images, so that every process has them all
        features = torch.zeros(0, inception.classify.in_features, device=device)
        logits = torch.zeros(0, inception.classify.out_features, device=device)
        for name, kind in [("real", ""), *((name, kind) for name in runs for kind in losses.KINDS)]:
            nothing = torch.zeros(0, dtype=torch.long, device=device)
            sums[name, kind] = losses.inception_sums(features, logits, nothing, splits)
    rank = train.rank()
    indices = torch.arange(rank, len(val_set), train.world_size())
    loader, done = shard(val_set, args), 0
    for images, mask_noise, _, bad in tqdm(
        loader, disable=None if is_main() else True, unit="batches"
    ):
        index = indices[done : done + len(images)]
        done += len(images)
        found |= dict(bad)
        kept = readable(index, bad)
        split = (index[kept] * splits // len(val_set)).to(device)
        real = data.to_float(images[kept].to(device))
        if not len(real):
            continue
        totals["images"] += len(real)
        count_features("real", "", real, split)
        for name, run in runs.items():
            fake, hidden = train.reconstruct(run, real, mask_noise[kept].to(device), run.args)
            values, fakes = losses.image_quality(fake, real, hidden)
            for metric, value in values.items():
                totals[name, metric] += value
            for kind, fake in fakes.items():
                count_features(name, kind, fake, split)
    train.note_bad_images(found, unread, val_set, fate="left out")
    if dist.is_initialized():
        for part in sums.values():
            for tensor in part.values():
                dist.all_reduce(tensor)
    return train.sum_over_processes(totals, device), sums, len(unread)


def print_table(results, runs, count):
    """Table 1 on the screen: a line for each checkpoint and kind of reconstruction."""
    width = max(len(name) for name in [*runs, "original"])

    def line(name, kind, pixels, row):
        end = f"_{kind}" if kind else ""
        score = distance = "-"
        if "is" + end in row:
            score = f"{row['is' + end]:.2f} +- {row['is_std' + end]:.2f}"
        if "fid" + end in row:
            distance = f"{row['fid' + end]:.2f}"
        say(f"{name:{width}}  {kind:6}  {pixels:20}  {score:>15}  {distance:>8}")

    say(f"{count} images; L1 of pixels in [0, 1], PSNR in dB")
    say(f"{'':{width}}              L1   PSNR   SSIM               IS       FID")
    if "real" in results:
        line("original", "", "", results["real"])
    for name in runs:
        for kind in losses.KINDS:
            l1, decibels, similarity = (
                results[name][f"{m}_{kind}"] for m in ("l1", "psnr", "ssim")
            )
            pixels = f"{l1:.4f}  {decibels:5.2f}  {similarity:.3f}"
            line(name if kind == losses.KINDS[0] else "", kind, pixels, results[name])


def draw_figures(folder, runs, val_set, device, rows=8):
    """Figures 2 and 3 of the first images, and every checkpoint's curves, as PNG files.

    reconstruction.png: a column for each checkpoint, its hidden part pasted into the visible
    patches (PAPER SILENT: whether Figure 2's are; MSE trains nothing else). attention.png: the
    last layer's attention of CLS, each head and their mean; of several checkpoints the means side
    by side, and the heads in attention_NAME.png each.
    """
    images, mask_noise = data.collate([val_set[0, i] for i in range(min(rows, len(val_set)))])[:2]
    real, mask_noise = data.to_float(images.to(device)), mask_noise.to(device)
    figure_2, figure_3 = {"original": real}, {"original": real}
    for name, run in runs.items():
        fake, hidden = train.reconstruct(run, real, mask_noise, run.args)
        figure_2["masked"] = data.grey_out(real, hidden)
        figure_2[name] = torch.where(hidden > 0, fake, real)
        maps = run.mae.cls_attention(real).cpu()  # (B, heads, side, side)
        heads = {f"head {n + 1}": data.heat(maps[:, n]) for n in range(maps.shape[1])}
        mean = data.heat(maps.mean(dim=1))
        figure_3[name] = mean
        end = "" if len(runs) == 1 else "_" + re.sub(r"\W+", "_", name).strip("_")
        data.save_picture(
            folder / f"attention{end}.png", {"original": real, "mean of heads": mean} | heads
        )
        data.draw_curves(folder / f"curves{end}.png", Path(run.path).parent / "log.jsonl")
    data.save_picture(folder / "reconstruction.png", figure_2)
    if len(runs) > 1:
        data.save_picture(folder / "attention.png", figure_3)


