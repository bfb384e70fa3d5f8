"""Pictures with PIL alone: curves of a run's log, which the stages draw at every save, and of the
arms of a benchmark; samples before and after a stage.

    python tests/plots.py out/judge-sft/log.jsonl        writes out/judge-sft/curves.png
    python tests/plots.py out/grpo                       writes out/grpo/before_after.png
"""
import argparse
import json
import math
import sys
import textwrap
import warnings
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

INKS = [(90, 90, 90), (40, 90, 210), (30, 150, 70), (215, 60, 40), (150, 70, 190), (200, 140, 0)]
GREY = (160, 160, 160)
LOG_SCALE = ("loss", "grad_norm", "kl", "later_kl")              # where all values are above 0
NOT_DRAWN = ("step", "time")
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 36            # margins of a panel, pixels


def ticks(low, high, log=False):
    """A few round numbers within [low, high]; on a logarithmic axis 1, 2 and 5 times powers of 10,
    or of wide ranges the powers alone."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = [1] if high / low > 1000 else [1, 2, 5]
        values = [factor * 10.0 ** power for power in powers for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) > 1:
            return inside
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def format_tick(value):
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def value_range(curves, log=False):
    """(low, high) of the y of curves, a little wider where they are constant."""
    ys = [y for curve in curves for _, y in curve]
    low = min(ys)
    high = max(ys)
    if low == high:
        margin = abs(low) / 10 or 1.0
        low -= 0 if log else margin
        high += margin
    return low, high


def draw_panel(pen, font, box, title, lines, y_range, log=False, x_label=""):
    """Draw lines [(curve, ink, width), ...] into box (left, top, right, bottom), under a title and
    with numbers on both axes. A curve is a list of (x, y)."""
    left, top, right, bottom = box[0] + LEFT, box[1] + TOP, box[2] - RIGHT, box[3] - BOTTOM
    xs = [x for curve, _, _ in lines for x, _ in curve]
    x_high = max(xs, default=1)
    low, high = y_range

    def place(x, y):
        if log:
            up = math.log(y / low) / math.log(high / low)
        else:
            up = (y - low) / (high - low)
        return left + x / x_high * (right - left), bottom - up * (bottom - top)

    pen.rectangle([left, top, right, bottom], outline=GREY)
    for value in ticks(low, high, log):
        y = place(0, value)[1]
        pen.line([(left - 4, y), (left, y)], fill=GREY)
        pen.text((left - 6, y), format_tick(value), fill="black", font=font, anchor="rm")
    for value in ticks(0, x_high):
        x = place(value, low)[0]
        pen.line([(x, bottom), (x, bottom + 4)], fill=GREY)
        pen.text((x, bottom + 6), format_tick(value), fill="black", font=font, anchor="mt")
    pen.text((left, top - 6), title, fill="black", font=font, anchor="ls")
    pen.text((right, bottom + 22), x_label, fill="black", font=font, anchor="rt")
    for curve, ink, width in lines:
        if curve:
            pen.line([place(*point) for point in curve], fill=ink, width=width)


def faint(ink):
    return tuple((c + 3 * 255) // 4 for c in ink)


def plot(panels, path, width=460, height=320):
    """Write a PNG of one panel for each entry of {label of x: {arm: [curve of a seed, ...]}}: the
    mean over seeds thick, each seed faint. All seeds of an arm have the same x; the panels share
    the y axis."""
    sheet = Image.new("RGB", (len(panels) * width, height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    measured = []
    for arms in panels.values():
        for curves in arms.values():
            measured += [curve for curve in curves if curve]     # an arm may have measured nothing
    for column, (label, arms) in enumerate(panels.items()):
        lines = []
        for curves, ink in zip(arms.values(), INKS):
            curves = [curve for curve in curves if curve]
            lines += [(curve, faint(ink), 1) for curve in curves]
            mean = []
            for points in zip(*curves):
                mean.append([sum(values) / len(values) for values in zip(*points)])
            lines.append((mean, ink, 2))
        left = column * width
        box = (left, 0, left + width, height)
        draw_panel(pen, font, box, "", lines, value_range(measured), x_label=label)
        for row, (name, ink) in enumerate(zip(arms, INKS)):
            pen.text((left + LEFT + 8, TOP + 4 + 15 * row), name, fill=ink, font=font)
    sheet.save(path)


def read_rows(log):
    """The rows of a log's steps in order; of a step that a resumed run repeated, the last one."""
    rows = {}
    for line in Path(log).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:                 # half a line of a killed run
            continue
        if "step" in row:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def running_mean(curve, width):
    """The curve of means over about `width` points around each, so that it does not lag."""
    points = []
    for i, (x, _) in enumerate(curve):
        ys = [y for _, y in curve[max(0, i - width // 2):i + width // 2 + 1]]
        points.append((x, sum(ys) / len(ys)))
    return points


def read_curves(log):
    """{name: [(step, value), ...]} of the numbers in a log's rows that change."""
    curves = {}
    for row in read_rows(log):
        for name, value in row.items():
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if is_number and name not in NOT_DRAWN:
                curves.setdefault(name, []).append((row["step"], value))
    return {name: curve for name, curve in curves.items() if len({y for _, y in curve}) > 1}


def draw_curves(log, width=360, height=230, columns=4):
    """Write curves.png beside a log, a panel for each of its numbers, and return its path. Over
    more than 100 steps the curve is faint and its running mean thick. ValueError: no curve."""
    curves = read_curves(log)
    if not curves:
        raise ValueError(f"{log} holds no number that changes from step to step")
    num_rows = math.ceil(len(curves) / columns)
    sheet = Image.new("RGB", (min(columns, len(curves)) * width, num_rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for i, (name, curve) in enumerate(curves.items()):
        left = i % columns * width
        top = i // columns * height
        is_log = name.split("/")[-1] in LOG_SCALE and min(y for _, y in curve) > 0
        lines = [(curve, INKS[1], 2)]
        if len(curve) > 100:
            lines = [(curve, faint(INKS[1]), 1),
                     (running_mean(curve, len(curve) // 50), INKS[1], 2)]
        title = f"{name} (log scale)" if is_log else name
        draw_panel(pen, font, (left, top, left + width, top + height), title, lines,
                   value_range([curve], is_log), is_log, "step")
    path = Path(log).with_name("curves.png")
    sheet.save(path)
    return path


def is_true(prompt, image):
    """Whether the toy world's oracle finds the prompt's objects in the image, None for others."""
    import toy_oracle                                # now, as stages draw curves without it
    try:
        return toy_oracle.success(toy_oracle.parse_prompt(prompt), image)
    except ValueError:
        return None


def held_out_samples(model, options):
    """[(prompt, PIL image), ...]: what the generator in a folder makes of each held-out prompt, as
    the stage with these options did; of clips the first frames."""
    import diffusers                                 # now, as stages draw curves without them
    import torch
    import transformers
    import data
    warnings.filterwarnings("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    records = data.read_records(options["eval_data"], "prompt")
    pipe = data.load_pipeline(model, torch.device("cpu"))
    call = {**pipe.call_args, **options["pipe_args"]}
    seeds = [("held out", i) for i in range(len(records))]
    with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
        media = data.sample_media(pipe, records, seeds, options["batch_size"], call)
    return [(record["prompt"], frames[0]) for record, frames in zip(records, media)]


def draw_samples(folder, columns=4, num=16, size=96):
    """Write before_after.png into a stage's folder: two samples of one seed beside each other, by
    its --model and by what it made of it, in a green frame where the toy oracle finds them true.
    Shown are the first of those that became true and of those that no longer are, in proportion."""
    log = Path(folder, "log.jsonl").read_text().split("\n")
    options = json.loads(next(line for line in log if line.startswith('{"args"')))["args"]
    sides = [held_out_samples(model, options) for model in (options["model"], f"{folder}/model")]
    pairs = [(prompt, before, after) for (prompt, before), (_, after) in zip(*sides)]
    kinds = {}
    for prompt, *images in pairs:
        kind = tuple(is_true(prompt, image) for image in images)
        kinds.setdefault(kind, []).append((prompt, *images))
    print_drift(pairs)
    became, left = [kinds.get(kind, []) for kind in ((False, True), (True, False))]
    title = (f"before | after. Of {len(pairs)} held-out samples {len(became)} became true to their "
             f"prompt, framed in green, and {len(left)} no longer are. The first of both:")
    num_became = round(num * len(became) / max(len(became) + len(left), 1))
    shown = became[:num_became] + left[:num - num_became]
    draw_pairs(title, shown or pairs[:num], columns, size).save(Path(folder, "before_after.png"))
    return Path(folder, "before_after.png")


def print_drift(pairs):
    """The means of toy_oracle.picture_stats before and after, of all pairs and of those that show
    the same objects in the same cells both times, where content does not move them."""
    import toy_oracle
    groups = {"all": [], "same objects": [], "others, as many": [], "more": [], "fewer": []}
    for _, *images in pairs:
        stats = [toy_oracle.picture_stats(image) for image in images]
        before, after = [sorted((o["color"], o["shape"], o["x"] // toy_oracle.CELL,
                                 o["y"] // toy_oracle.CELL) for o in toy_oracle.detect(image))
                         for image in images]
        change = len(after) - len(before)
        name = "more" if change > 0 else "fewer" if change < 0 else "others, as many"
        groups["all"].append(stats)
        groups["same objects" if before == after else name].append(stats)
    for name, rows in groups.items():
        cells = []
        for key in rows[0][0] if rows else []:
            before, after = [sum(row[k][key] for row in rows) / len(rows) for k in (0, 1)]
            cells.append(f"{key} {before:.2f} -> {after:.2f}")
        print(f"{name}, {len(rows)} samples: " + ", ".join(cells))


def draw_pairs(title, pairs, columns, size):
    """A sheet of pairs [(prompt, image before, image after), ...] under a title."""
    font = ImageFont.load_default(12)
    width = 2 * size + 28
    height = size + 46
    rows = math.ceil(len(pairs) / columns)
    sheet = Image.new("RGB", (columns * width, 24 + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 4), title, "black", font)
    for i, (prompt, *images) in enumerate(pairs):
        left = i % columns * width + 6
        top = 24 + i // columns * height
        for k, image in enumerate(images):
            x = left + k * (size + 8)
            frame = {True: (30, 170, 60), False: (225, 225, 225), None: "white"}
            pen.rectangle((x, top, x + size + 5, top + size + 5), frame[is_true(prompt, image)])
            sheet.paste(image.resize((size, size), Image.NEAREST), (x + 3, top + 3))
        for line, text in enumerate(textwrap.wrap(prompt, 32)[:2]):
            pen.text((left, top + size + 7 + 14 * line), text, "black", font)
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="logs, or folders of runs of a generator")
    for path in parser.parse_args(argv).paths:
        try:
            print(draw_samples(path) if Path(path).is_dir() else draw_curves(path))
        except (OSError, ValueError) as error:
            raise SystemExit(f"plots.py: {error}") from error


if __name__ == "__main__":
    main()
