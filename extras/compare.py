# ---- Reading -------------------------------------------------------------------------------------


# What --compare looks for in logs, and how its picture calls it.
SCORES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "top1": "top-1, %",
    "ap": "box AP, %",
    "miou": "mIoU, %",
}


def read_runs(folder):
    """Runs in FOLDER/ROW/SEED -> {"TASK score": {row: {seed: value}}}, from the ends of their logs.

    TASK is where a log lies below the run, such as knn; nothing for pre-training. A log that ends
    without a score, as an unfinished run's may, is named and left out.
    """
    found, ends = {}, {}
    rows = sorted(p.name for p in folder.glob("*/") if p.is_dir())
    order = [*(name for name in losses.LOSSES if name in rows), *rows]
    for row in dict.fromkeys(order):
        logs = (folder / row).glob("*/**/log.jsonl")
        for log in sorted(logs, key=lambda log: (len(log.parts), log)):
            seed, *task = log.parent.relative_to(folder / row).parts
            if not seed.isdigit():
                fail(f"{log} is not of ROW/SEED/, SEED a number; --compare looks for no other logs")
            *_, last = data.read_log(log) or [{}]
            scores = [name for name in SCORES if name in last]
            if not scores:
                say(f"{log} is left out: it does not end with any of {', '.join(SCORES)}")
            for score in scores:
                name = " ".join([*task, score])
                found.setdefault(name, {}).setdefault(row, {})[seed] = last[score]
                ends.setdefault(name, set()).add(last.get("epoch"))
    for name, epochs in ends.items():
        if len(epochs) > 1:
            epochs = sorted(epochs, key=str)
            say(f"{name}: logs end at different epochs, {epochs}; are some runs unfinished?")
    return found


def mean_and_error(values):
    """Mean of a list and its standard error, deviation / sqrt(n); None for a single value."""
    values = torch.tensor(values, dtype=torch.float64)
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return values.mean().item(), error


def summary(rows, first):
    """{row: {seed: value}} -> {row: {values, mean, error, difference, difference_error}}.

    Differences are to the row `first`, in pairs of one seed; errors are standard errors.
    """
    found = {}
    for row, seeds in rows.items():
        mean, error = mean_and_error(list(seeds.values()))
        found[row] = dict(values=seeds, mean=mean, error=error)
        pairs = [value - rows[first][seed] for seed, value in seeds.items() if seed in rows[first]]
        if row != first and pairs:
            found[row]["difference"], found[row]["difference_error"] = mean_and_error(pairs)
    return found


def compare(folder):
    """Means over seeds, and differences to the first row in pairs of one seed: a table, a picture.

    Pairs share what a seed fixes: the order of the images; between rows of one kind of mask, their
    crops and the masks; between rows whose networks are the same, the weights at the start.
    """
    found = read_runs(folder)
    if not found:
        fail(f"{folder} has no results: --compare takes logs in {folder}/ROW/SEED/ and below")
    results = {score: summary(rows, next(iter(rows))) for score, rows in found.items()}
    say(
        "mean +- standard error (runs); difference to the first row +- its own, * = above two of it"
    )

    def with_error(value, error, digits):
        return f"{value:{digits}}" + ("" if error is None else f" +- {error:6.2g}")

    for score, rows in results.items():
        say(f"\n{score}")
        for row, entry in rows.items():
            text = with_error(entry["mean"], entry["error"], "8.4g")
            text = f"{row:16} {text} ({len(entry['values'])})"
            if "difference" in entry:
                more, error = entry["difference"], entry["difference_error"]
                text += "   " + with_error(more, error, "+8.3g")
                text += " *" * (error is not None and abs(more) > 2 * error)
            say(text)
    charts = {}
    for name, rows in found.items():
        *task, score = name.split()
        title = " ".join([*task, SCORES[score]])
        charts[title] = {row: list(seeds.values()) for row, seeds in rows.items()}
    with train.writing(folder):
        (folder / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
        data.save_dots(folder / "compare.png", charts)
    say(f"done: {folder}/compare.json, {folder}/compare.png")


# ---- Picture -------------------------------------------------------------------------------------


def round_ticks(low, high):
    """Two to six multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    least = (high - low) / 5  # between two ticks
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * part for part in (1, 2, 5, 10) if power * part >= least * (1 - 1e-9))
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def save_dots(path, charts, across=3):
    """Write a PNG of values by row: a dot for each, and where there are two or more their mean, in
    a bar of one standard error to either side.

    charts: {title: {row: [value, ...]}}, each chart with its own axis. across: charts in a row.
    """
    fine, width, line = 3, 260, 20  # drawn as in `save_charts`
    names = list(dict.fromkeys(name for rows in charts.values() for name in rows))
    left = 20 + int(max(map(ImageFont.load_default(size=11).getlength, names)))  # for the names
    across, high = min(across, len(charts)), line * len(names) + 62
    size = (left + width * across, high * math.ceil(len(charts) / across))
    canvas = Image.new("RGB", tuple(fine * side for side in size), "white")
    draw = ImageDraw.Draw(canvas)
    big, small = (ImageFont.load_default(size=points * fine) for points in (14, 11))
    for place, (title, rows) in enumerate(charts.items()):
        x0, y0 = (left + place % across * width) * fine, (place // across * high + 34) * fine
        x1, y1 = x0 + (width - 50) * fine, y0 + line * len(names) * fine
        values = [value for row in rows.values() for value in row]
        low, span = min(values), max(values) - min(values)
        margin = span / 12 if span > 1e-5 * abs(low) else 0.5  # equal values: in the middle
        low, span = low - margin, span + 2 * margin
        draw.text((x0, y0 - 10 * fine), title, "black", big, anchor="ls")
        for tick in round_ticks(low, low + span):
            x = x0 + (x1 - x0) * (tick - low) / span
            draw.line([(x, y0), (x, y1)], "#dddddd", fine)
            draw.text((x, y1 + 4 * fine), f"{tick:.6g}", "#555555", small, anchor="mt")
        for number, name in enumerate(names):
            y, colour = (
                y0 + line * (number + 0.5) * fine,
                CURVE_COLOURS[number % len(CURVE_COLOURS)],
            )
            if place % across == 0:
                draw.text((x0 - 10 * fine, y), name, colour, small, anchor="rm")
            row = np.array(rows.get(name, []))
            if len(row) > 1:
                error = row.std(ddof=1) / len(row) ** 0.5
                ends = [
                    x0 + (x1 - x0) * (row.mean() + sign * error - low) / span for sign in (-1, 1)
                ]
                draw.rectangle([ends[0], y - 5 * fine, ends[1], y + 5 * fine], fill="#e2e2e2")
                middle = sum(ends) / 2
                draw.line([(middle, y - 5 * fine), (middle, y + 5 * fine)], colour, 2 * fine)
            for value in row:
                x, radius = x0 + (x1 - x0) * (value - low) / span, 3 * fine
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)
    canvas.reduce(fine).save(path)


