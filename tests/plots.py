"""Pictures of curves with PIL alone: of a run's log, and of the arms of a benchmark.

    python tests/plots.py out/judge-sft/log.jsonl        writes out/judge-sft/curves.png
    python tests/plots.py out/grpo/before_after.html     writes out/grpo/before_after.png
"""
import argparse
import base64
import html
import io
import json
import math
import re
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent))
import toy_oracle

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
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def format_tick(value):
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
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


def read_pairs(page):
    """[(prompt, image before, image after), ...] of a stage's before_after.html."""
    pairs = []
    for figure in Path(page).read_text().split("<figcaption>")[1:]:
        prompt = html.unescape(figure.split("</figcaption>")[0])
        images = re.findall('<img src="data:image/png;base64,([^"]+)"', figure)
        if not images or len(images) % 2:
            raise ValueError(f"{page}: {len(images)} images of {prompt!r}; expected pairs of them, "
                             "before and after")
        ends = [images[0], images[len(images) // 2]]                # the first frames of clips
        decoded = [Image.open(io.BytesIO(base64.b64decode(data))) for data in ends]
        pairs.append((prompt, *[image.convert("RGB") for image in decoded]))
    return pairs


def is_true(prompt, image):
    """Whether the toy world's oracle finds the prompt's objects in the image, None for others."""
    try:
        return toy_oracle.success(toy_oracle.parse_prompt(prompt), image)
    except ValueError:
        return None


def headline(page):
    """What the last row of the log beside the page says of true samples, before and after."""
    log = Path(page).with_name("log.jsonl")
    lines = log.read_text().splitlines() if log.exists() else []
    ends = [json.loads(line) for line in lines if line.startswith('{"before"')]
    if not ends or "true" not in ends[-1]["before"]:
        return "before | after"
    before, after = [100 * ends[-1][column]["true"] for column in ("before", "after")]
    return (f"before | after.  Green: true to its prompt, of all held-out samples {before:.1f} % "
            f"before and {after:.1f} % after")


def draw_pairs(page, columns=4, size=88, num=16):
    """A picture of a stage's before_after.html: two samples of one seed beside each other, before
    and after, above their prompt, in a green frame where the toy oracle finds them true."""
    pairs = read_pairs(page)[:num]
    font = ImageFont.load_default(11)
    width = 2 * size + 20
    height = size + 38
    rows = math.ceil(len(pairs) / columns)
    sheet = Image.new("RGB", (columns * width, 22 + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 4), headline(page), "black", font)
    for i, (prompt, *images) in enumerate(pairs):
        left = i % columns * width + 6
        top = 22 + i // columns * height
        for k, image in enumerate(images):
            x = left + k * (size + 4)
            frame = {True: (30, 170, 60), False: (225, 225, 225), None: "white"}
            pen.rectangle((x, top, x + size, top + size), frame[is_true(prompt, image)])
            inner = image.resize((size - 5, size - 5), Image.NEAREST)
            sheet.paste(inner, (x + 3, top + 3))
        for line, text in enumerate(textwrap.wrap(prompt, 32)[:2]):
            pen.text((left, top + size + 2 + 13 * line), text, "black", font)
    path = Path(page).with_suffix(".png")
    sheet.save(path)
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="log.jsonl or before_after.html of runs")
    for file in parser.parse_args(argv).files:
        try:
            print(draw_pairs(file) if file.endswith(".html") else draw_curves(file))
        except (OSError, ValueError) as error:
            raise SystemExit(f"plots.py: {error}") from error


if __name__ == "__main__":
    main()
