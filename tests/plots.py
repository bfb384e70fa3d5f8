"""One picture for the benchmarks: curves of several arms, the mean over seeds thick, each seed faint."""
from PIL import Image, ImageDraw, ImageFont

INKS = [(90, 90, 90), (40, 90, 210), (30, 150, 70), (215, 60, 40), (150, 70, 190), (200, 140, 0)]


def plot(panels, path, width=460, height=320):
    """Writes a PNG of one panel for each entry of {label of x: {arm: [curve of a seed, ...]}}; a curve is a list of (x, y), all seeds of an arm
    at the same places in the list, and panels share the y axis."""
    sheet, font = Image.new("RGB", (len(panels) * width, height), "white"), ImageFont.load_default(13)
    pen, ys = ImageDraw.Draw(sheet), [y for arms in panels.values() for curves in arms.values() for curve in curves for _, y in curve]
    low, high = min(ys), max(max(ys), min(ys) + 1e-9)
    for column, (label, arms) in enumerate(panels.items()):
        most, left = max((x for curves in arms.values() for curve in curves for x, _ in curve), default=1), column * width + 46
        place = lambda x, y: (left + x / most * (width - 62), height - 40 - (y - low) / (high - low) * (height - 70))
        pen.rectangle([left, 30, column * width + width - 16, height - 40], outline=(160, 160, 160))
        for row, ((name, curves), ink) in enumerate(zip(arms.items(), INKS)):
            for curve in filter(None, curves):       # an arm may have measured nothing
                pen.line([place(*point) for point in curve], fill=tuple((c + 3 * 255) // 4 for c in ink))
            mean = [[sum(values) / len(values) for values in zip(*at)] for at in zip(*curves)]
            pen.line([place(*point) for point in mean], fill=ink, width=2)
            pen.text((left + 8, 34 + 15 * row), name, fill=ink, font=font)
        pen.text((left, height - 24), f"{label} (to {most:{',.0f' if most > 9 else '.2g'}})", fill="black", font=font)
        pen.text((left - 42, 26), f"{high:.2f}", fill="black", font=font)
        pen.text((left - 42, height - 50), f"{low:.2f}", fill="black", font=font)
    sheet.save(path)
