"""The pixel oracle of the toy world: what is in an image, measured in its pixels. It never sees a
scene, and imports nothing of ours, so that stages load it by `--watch tests/toy_oracle.py:true`.

    true           media, prompts -> is each true to its prompt?, and what an eye calls drift
    parse_prompt   "a red circle above a blue square" -> its objects and their relation
    detect         pixels -> objects; knows the palette and the shapes
    success        does the image show what the prompt asks for?
    picture_stats  cast, tiles, grain, edges
"""
import functools
import math
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE, CELL = 48, 16
SHAPES = ["circle", "square", "triangle", "star"]
COLORS = {"red": (215, 40, 40), "green": (30, 160, 60), "blue": (45, 80, 220),
          "yellow": (240, 205, 30)}
NUMBERS = ["none", "one", "two", "three", "four", "five"]
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above",
             "below": "below"}
PAIR_TYPES = ("two", "binding", "spatial")
COLOR, SHAPE, RELATION = ("|".join(words) for words in (COLORS, SHAPES, RELATIONS.values()))
FORMS = {  # the texts of each type of prompt
    "single": f"a ({COLOR}) ({SHAPE})",
    "count": f"(two|three|four) ({COLOR}) ({SHAPE})s",
    "two": f"a ({SHAPE}) and a ({SHAPE})",
    "binding": f"a ({COLOR}) ({SHAPE}) and a ({COLOR}) ({SHAPE})",
    "spatial": f"a ({COLOR}) ({SHAPE}) ({RELATION}) a ({COLOR}) ({SHAPE})"}


def parse_prompt(text):
    """{type, objects [(color or None, shape)], count, relation or None} of a prompt's text.
    ValueError: it is none of the toy world."""
    for kind, form in FORMS.items():
        match = re.fullmatch(form, text)
        if match:
            break
    else:
        raise ValueError(f"{text!r} is no prompt of the toy world, and this oracle reads no other: "
                         "pass --watch with a reward of your own, or --watch none")
    count = NUMBERS.index(match[1]) if kind == "count" else 1
    relation = None
    if kind == "spatial":
        relation = next(name for name, words in RELATIONS.items() if words == match[3])
    shapes = re.findall(SHAPE, text)
    colors = re.findall(COLOR, text) or [None, None]
    return {"type": kind, "objects": list(zip(colors, shapes)), "count": count,
            "relation": relation}


def measure_all(kinds, values, parsed):
    """{name: [a number an item]} of values [{name: number}, ...] whose "true" is counted by the
    type of the prompt too: "true_TYPE" is NaN for items of other types, absent without any."""
    columns = {name: [value[name] for value in values] for name in (values or [{}])[0]}
    for kind in kinds:
        if any(prompt["type"] == kind for prompt in parsed):
            columns[f"true_{kind}"] = [value["true"] if prompt["type"] == kind else math.nan
                                       for value, prompt in zip(values, parsed)]
    return columns


def true(media, prompts):
    """{name: [a number an item]} of items [image] and their prompts' texts: "true" is 1.0 or 0.0,
    "true_TYPE" the same of the prompts of a type, the others are those of picture_stats."""
    parsed = [parse_prompt(text) for text in prompts]
    values = []
    for prompt, frames in zip(parsed, media):
        values.append({"true": float(success(prompt, frames[0])), **picture_stats(frames[0])})
    return measure_all(FORMS, values, parsed)


# ------------------------------------------------------------------------------------------------
# what is in the pixels

@functools.lru_cache(None)
def mask(shape, radius):
    """Coverage in 0..1 of one shape, (n, n) with n odd, anti-aliased."""
    n = int(2 * radius + 3) | 1
    image = Image.new("L", (n * 8, n * 8))
    draw = ImageDraw.Draw(image)
    c = n * 4
    r = radius * 8
    if shape == "circle":
        draw.ellipse([c - r, c - r, c + r, c + r], fill=255)
    elif shape == "square":
        draw.rectangle([c - .9 * r, c - .9 * r, c + .9 * r, c + .9 * r], fill=255)
    elif shape == "triangle":
        draw.polygon([(c, c - r), (c - r, c + .9 * r), (c + r, c + .9 * r)], fill=255)
    else:
        points = []
        for i in range(10):
            q = 1.2 * r if i % 2 == 0 else .5 * r
            a = i * np.pi / 5 - np.pi / 2
            points.append((c + q * np.cos(a), c + q * np.sin(a)))
        draw.polygon(points, fill=255)
    return np.asarray(image.resize((n, n), Image.BOX), np.float32) / 255


@functools.lru_cache(None)
def templates(n=23):
    """(names, masks (K, n*n)) of all shapes at several sizes, blurs and offsets."""
    names = []
    masks = []
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    for shape in SHAPES:
        for radius in (3.0, 3.5, 4.0, 5.0, 5.5, 6.0, 6.5):
            cover = mask(shape, radius)
            padded = np.zeros((n, n), np.float32)
            o = (n - len(cover)) // 2
            padded[o:o + len(cover), o:o + len(cover)] = cover
            image = Image.fromarray((padded * 255).astype(np.uint8))
            for blur in (0, 1.0, 1.6, 2.2):
                soft = padded
                if blur:
                    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), np.float32)
                    soft = soft / 255
                for offset in offsets:
                    names.append(shape)
                    masks.append(np.roll(soft, offset, (0, 1)).ravel())
    return names, np.stack(masks)


def neighbours(x, reduce):
    """`reduce` over each pixel's 3 x 3 neighbourhood (edges repeated)."""
    p = np.pad(x, ((1, 1), (1, 1)) + ((0, 0),) * (x.ndim - 2), mode="edge")
    shifted = [p[i:i + len(x), j:j + x.shape[1]] for i in range(3) for j in range(3)]
    return reduce(np.stack(shifted), 0)


def components(on):
    """Connected areas (4-neighbours) of a boolean (48, 48) map, as boolean maps."""
    paper = Image.fromarray(on.astype(np.uint8))
    while True:
        spots = np.argwhere(np.asarray(paper) == 1)
        if len(spots) == 0:
            return
        ImageDraw.floodfill(paper, tuple(spots[0, ::-1].tolist()), 2)
        area = np.asarray(paper) == 2
        paper.paste(0, mask=Image.fromarray(area))
        yield area


def border(x):
    """The outermost pixels of an image, (N, 3)."""
    return np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])


def exposure(ground):
    """(gain, lift) that make the plain or clashing ground of an image what it was."""
    if np.ptp(ground) < 45:
        if ground.mean() < 170:
            return 230 / max(ground.mean(), 1), 0
        washed_out = ground.mean() > 248
    else:
        if ground.max() < 140:
            return 228 / ground.max(), 0
        washed_out = ground.min() > 150
    return (1 / .55, 135) if washed_out else (1, 0)


def detect(image, min_area=14):
    """Objects measured in the pixels, as dicts color, shape, x, y, area, iou. Knows the palette
    and the shapes, not the scene."""
    x = np.asarray(image, np.float32)
    ground = np.median(border(x), 0)
    spread = np.median(np.abs(border(x) - ground))
    for _ in range(int(spread > 12) + int(spread > 20)):                # noise: average first
        x = neighbours(x, np.mean)
    gain, lift = exposure(ground)
    x = ((x - lift) * gain).clip(0, 255)
    ground = (ground - lift) * gain
    rays = np.array(list(COLORS.values()), np.float32) - ground         # pixel = ground + alpha ray
    alpha = ((x - ground) @ rays.T / (rays ** 2).sum(1)).clip(0, 1.25)  # (48, 48, colors)
    rest = ((x[:, :, None] - ground - alpha[..., None] * rays) ** 2).sum(-1)
    rest = rest + 400 * (1 - alpha.clip(0, 1)) ** 2
    best = rest.argmin(-1)
    best[np.take_along_axis(alpha, best[..., None], -1)[..., 0] <= .5] = -1
    names, shapes = templates()
    half = 11
    objects = []
    for k, color in enumerate(COLORS):
        for area in components(best == k):
            if area.sum() < min_area:
                continue
            ys, xs = np.nonzero(area)
            near = neighbours(neighbours(area, np.max), np.max) & (area | (best == -1))
            cover = np.pad(alpha[..., k].clip(0, 1) * near, 23)
            y = int(round((ys.min() + ys.max()) / 2)) + 23
            x0 = int(round((xs.min() + xs.max()) / 2)) + 23
            window = cover[y - half:y + half + 1, x0 - half:x0 + half + 1].ravel()
            union = np.maximum(shapes, window).sum(1)
            iou = np.minimum(shapes, window).sum(1) / (union + 1e-6)
            objects.append({"color": color, "shape": names[iou.argmax()], "x": xs.mean(),
                            "y": ys.mean(), "area": len(ys), "iou": float(iou.max())})
    return objects


def fits(wanted, measured):
    return wanted[0] in (None, measured["color"]) and wanted[1] == measured["shape"]


def success(prompt, image):
    """True when the measured objects are the prompt's: right kinds, right number, right relation.
    In the manner of GenEval."""
    objects = detect(image)
    if prompt["type"] not in PAIR_TYPES:
        right = all(fits(prompt["objects"][0], measured) for measured in objects)
        return right and len(objects) == prompt["count"]
    if len(objects) != 2:
        return False
    first, second = objects
    if not fits(prompt["objects"][0], first):
        second, first = objects
    if not (fits(prompt["objects"][0], first) and fits(prompt["objects"][1], second)):
        return False
    dx = first["x"] - second["x"]
    dy = first["y"] - second["y"]
    if abs(dx) > abs(dy):
        relation = "left" if dx < 0 else "right"
    else:
        relation = "above" if dy < 0 else "below"
    return prompt["relation"] in (None, relation)


def picture_stats(image):
    """Four measures in grey levels (0..255) of what an eye calls drift. Objects that come or go
    move them too, most of all the last.

    cast   spread of the channels of the ground color; 0 for the plain ground
    tiles  standard deviation between the ground colors of the nine cells, steps of a patchwork
    grain  mean distance of a ground pixel from the mean of its neighbours
    edges  strongest steps between neighbouring pixels (98th percentile): sharpness, content
    """
    x = np.asarray(image, np.float32)
    ground = np.median(border(x), 0)
    on = neighbours(np.abs(x - ground).max(-1), np.max) < 60            # away from objects
    medians = []
    for i in range(0, len(x), CELL):
        for j in range(0, len(x), CELL):
            pixels = x[i:i + CELL, j:j + CELL][on[i:i + CELL, j:j + CELL]]
            if len(pixels) > 20:
                medians.append(np.median(pixels, 0))
    tiles = np.array(medians or [ground]).std(0).mean()
    grain = np.abs(x - neighbours(x, np.mean)).mean(-1)[on]
    return {"cast": float(np.ptp(ground)), "tiles": float(tiles),
            "grain": float(grain.mean()) if grain.size else 0.0,
            "edges": float(np.percentile(np.abs(np.diff(x, axis=0)).max(-1), 98))}
