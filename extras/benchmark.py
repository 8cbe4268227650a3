# ---- Steps ---------------------------------------------------------------------------------------


def benchmark(args, device):
    """Time the training step on random images, eq. 3 on; print one JSON line.

    Steps with a lazy regulariser take longer: they come in rounds (see `time_steps`). ADA runs at
    p = 0.5 unless --ada-p says otherwise, since it costs nothing at the p = 0 of a start.
    """
    recipe, run = LOSSES[args.loss], build_run(args, device)
    generator = torch.Generator().manual_seed(args.seed)
    B = args.batch_size
    shape = (B, *data.sample_shape(args.image_size, recipe["views"]))
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mask_noise = torch.rand(B, unwrap(run.mae).side ** 2, generator=generator)
    progress, eq3_on = new_progress(), recipe["phi"] is not None
    set_rate(run.opt_g, args.lr)
    places = math.lcm(
        args.path_every if recipe["path"] and args.path_weight else 1,
        args.r1_every if recipe["adversary"] and args.r1_gamma else 1,
    )

    def step(number, place):
        progress["step"] = place
        batch = (images, mask_noise, torch.arange(B) + B * number)
        step_gradients(run, [batch] * args.accum, eq3_on, progress, args)
        update(run, apply=True)
        if recipe["momentum"]:
            model.move_teacher(unwrap(run.mae), teacher_momentum(1, args))

    seconds = time_steps(step, args.benchmark, places, device)
    counts = [
        sum(p.numel() for p in net.parameters() if p.requires_grad)  # teachers are not trained
        for net in (run.mae, run.disc)
        if net
    ]
    row = benchmark_row(run, seconds, args, loss=args.loss)
    row |= {"parameters_g": counts[0], "parameters_d": counts[1] if run.disc else 0}
    say(json.dumps(row))


def time_steps(step, count, places, device):
    """Seconds per step: the mean, over a round of `places` steps, of each place's median.

    step(number, place): does one. At least `count` are timed, whole rounds of them, after two
    that are not, at place 0, where a step holds all that it can.
    """
    seconds = [[] for _ in range(places)]
    for number in range(2 + math.ceil(count / places) * places):
        place = max(0, number - 2) % places
        began = time.perf_counter()
        step(number, place)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            seconds[place].append(time.perf_counter() - began)
    return statistics.mean(statistics.median(place) for place in seconds)


def benchmark_row(run, seconds, args, **first):
    """What both scripts report of a benchmark -> dict."""
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # Unix alone

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return first | {
        "model": args.model,
        "image_size": args.image_size,
        "batch_size": images_per_step(args),
        "device": run.device.type,
        "amp": str(run.dtype or torch.float32).removeprefix("torch."),
        "seconds_per_step": round(seconds, 4),
        "images_per_second": round(images_per_step(args) / seconds, 2),
        "peak_memory_mib": round(peak / 2**20),
    }


def benchmark_all(argv):
    """`--benchmark --loss all`: the paper's Table 4, a process for each row of LOSSES -> status.

    Siblings take part, with their own --arch.
    """
    say("loss             relative time  seconds/step  images/s  peak MiB  parameters G, D")
    base = None
    for loss in LOSSES:
        command = [sys.executable, __file__, *argv, "--loss", loss]
        command += ["--arch", "auto"] if loss in SIBLING_TERMS else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        row = json.loads(done.stdout.splitlines()[-1])
        seconds = row["seconds_per_step"]
        base = base or seconds
        sizes = " ".join(f"{row[f'parameters_{n}'] / 1e6:7.1f} M" for n in "gd")
        speed = f"{row['images_per_second']:8.2f}  {row['peak_memory_mib']:8}"
        say(f"{loss:15}  {seconds / base:13.2f}  {seconds:12.3f}  {speed}  {sizes}")
    return 0


# ---- Fine-tuning ---------------------------------------------------------------------------------


def random_batch(args):
    """Random images (B, 3, S, S) uint8 and targets, as a loader gives them for --task."""
    generator = torch.Generator().manual_seed(args.seed)
    B, S, classes = args.batch_size, args.image_size, len(args.classes)
    images = torch.randint(0, 256, (B, 3, S, S), generator=generator, dtype=torch.uint8)
    shape = {"detect": (B, 7), "segment": (B, S, S)}.get(args.task, (B,))  # COCO: 7 objects
    labels = torch.randint(0, classes, shape, generator=generator)
    if args.task != "detect":
        return images, labels
    corners, rows = torch.randint(0, S // 2, (B, 7, 2, 1, 1), generator=generator), torch.arange(S)
    x, y = rows - corners[:, :, 0], rows[:, None] - corners[:, :, 1]
    masks = (x >= 0) & (x < S // 4) & (y >= 0) & (y < S // 4)  # squares, (B, 7, S, S)
    return images, [data.objects_in(m, n + 1) for m, n in zip(masks, labels, strict=True)]


def benchmark(args, device):
    """Time the training step on random images, of as many classes as the paper's data sets have.

    Prints one JSON line.
    """
    weights, args = open_checkpoint(args)
    classes = range({"detect": 80, "segment": 150}.get(args.task, 1000))
    args = argparse.Namespace(**vars(args) | {"classes": list(classes)})
    run, batch = build_run(args, weights, device), random_batch(args)
    run.network.train()
    train.set_rate(run.opt, args.lr)

    def step(number, place):
        step_gradients(run, [batch] * args.accum, {"step": number}, args)
        update(run, apply=True)

    seconds = train.time_steps(step, args.benchmark, 1, device)
    row = train.benchmark_row(run, seconds, args, task=args.task)
    parameters = list(run.network.parameters())
    row["parameters"] = sum(p.numel() for p in parameters)
    row["parameters_trained"] = sum(p.numel() for p in parameters if p.requires_grad)
    say(json.dumps(row))


