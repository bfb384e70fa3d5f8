"""The pixel oracle of the toy world: what is in an image, measured in its pixels. It never sees a scene.

    detect         pixels -> objects        knows the palette and the shapes
    success        does the image show what the prompt asks for?
    picture_stats  what an eye calls drift: cast, tiles, noise, sharpness
"""
import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE, CELL = 48, 16
SHAPES = ["circle", "square", "triangle", "star"]
COLORS = {"red": (215, 40, 40), "green": (30, 160, 60), "blue": (45, 80, 220), "yellow": (240, 205, 30)}
PAIR_TYPES = ("two", "binding", "spatial")


@functools.lru_cache(None)
def mask(shape, radius):
    """Coverage in 0..1 of one shape, (n, n) with n odd, anti-aliased."""
    n = int(2 * radius + 3) | 1
    image = Image.new("L", (n * 8, n * 8))
    draw, c, r = ImageDraw.Draw(image), n * 4, radius * 8
    if shape == "circle":
        draw.ellipse([c - r, c - r, c + r, c + r], fill=255)
    elif shape == "square":
        draw.rectangle([c - .9 * r, c - .9 * r, c + .9 * r, c + .9 * r], fill=255)
    elif shape == "triangle":
        draw.polygon([(c, c - r), (c - r, c + .9 * r), (c + r, c + .9 * r)], fill=255)
    else:
        spikes = [(1.2 * r if i % 2 == 0 else .5 * r, i * np.pi / 5 - np.pi / 2) for i in range(10)]
        draw.polygon([(c + q * np.cos(a), c + q * np.sin(a)) for q, a in spikes], fill=255)
    return np.asarray(image.resize((n, n), Image.BOX), np.float32) / 255


@functools.lru_cache(None)
def templates(n=23):
    """(names, masks (K, n*n)) of all shapes at several sizes, blurs and offsets."""
    names, masks = [], []
    for shape in SHAPES:
        for radius in (3.0, 3.5, 4.0, 5.0, 5.5, 6.0, 6.5):
            cover, padded = mask(shape, radius), np.zeros((n, n), np.float32)
            o = (n - len(cover)) // 2
            padded[o:o + len(cover), o:o + len(cover)] = cover
            for blur in (0, 1.0, 1.6, 2.2):
                soft = Image.fromarray((padded * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
                soft = np.asarray(soft, np.float32) / 255 if blur else padded
                names += [shape] * 9
                masks += [np.roll(soft, (dy, dx), (0, 1)).ravel() for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return names, np.stack(masks)


def neighbours(x, reduce):
    """`reduce` over each pixel's 3 x 3 neighbourhood (edges repeated)."""
    p = np.pad(x, ((1, 1), (1, 1)) + ((0, 0),) * (x.ndim - 2), mode="edge")
    return reduce(np.stack([p[i:i + len(x), j:j + x.shape[1]] for i in range(3) for j in range(3)]), 0)


def components(on):
    """Connected areas (4-neighbours) of a boolean (48, 48) map, as boolean maps."""
    paper = Image.fromarray(on.astype(np.uint8))
    while (spots := np.argwhere(np.asarray(paper) == 1)).size:
        ImageDraw.floodfill(paper, tuple(spots[0, ::-1].tolist()), 2)
        area = np.asarray(paper) == 2
        paper.paste(0, mask=Image.fromarray(area))
        yield area


def border(x):
    """The outermost pixels of an image, (N, 3)."""
    return np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])


def detect(image, min_area=14):
    """Objects measured in the pixels, as dicts color, shape, x, y, area, iou. Knows the palette and the shapes, not the scene."""
    x = np.asarray(image, np.float32)
    ground = np.median(border(x), 0)
    spread = np.median(np.abs(border(x) - ground))
    for _ in range(int(spread > 12) + int(spread > 20)):                        # noise: average before looking
        x = neighbours(x, np.mean)
    if np.ptp(ground) < 45:                          # undo the exposure, judged by the ground
        gain, lift = (230 / max(ground.mean(), 1), 0) if ground.mean() < 170 else (1 / .55, 135) if ground.mean() > 248 else (1, 0)
    else:
        gain, lift = (228 / ground.max(), 0) if ground.max() < 140 else (1 / .55, 135) if ground.min() > 150 else (1, 0)
    x, ground = ((v - lift) * gain for v in (x, ground))
    x = x.clip(0, 255)
    rays = np.array(list(COLORS.values()), np.float32) - ground                 # pixel = ground + alpha * ray
    alpha = ((x - ground) @ rays.T / (rays ** 2).sum(1)).clip(0, 1.25)          # (48, 48, colors)
    rest = ((x[:, :, None] - ground - alpha[..., None] * rays) ** 2).sum(-1) + 400 * (1 - alpha.clip(0, 1)) ** 2
    best = rest.argmin(-1)
    best[np.take_along_axis(alpha, best[..., None], -1)[..., 0] <= .5] = -1
    found, (names, shapes), half = [], templates(), 11
    for k, color in enumerate(COLORS):
        for area in components(best == k):
            if area.sum() < min_area:
                continue
            ys, xs = np.nonzero(area)
            near = neighbours(neighbours(area, np.max), np.max) & (area | (best == -1))
            cover = np.pad(alpha[..., k].clip(0, 1) * near, 23)
            y, x0 = int(round((ys.min() + ys.max()) / 2)) + 23, int(round((xs.min() + xs.max()) / 2)) + 23
            window = cover[y - half:y + half + 1, x0 - half:x0 + half + 1].ravel()
            iou = np.minimum(shapes, window).sum(1) / (np.maximum(shapes, window).sum(1) + 1e-6)
            found.append(dict(color=color, shape=names[iou.argmax()], x=xs.mean(), y=ys.mean(), area=len(ys), iou=float(iou.max())))
    return found


def success(prompt, image):
    """True when the measured objects are the prompt's: right kinds, right number, right relation. In the manner of GenEval."""
    found = detect(image)
    if prompt["type"] not in PAIR_TYPES:
        return len(found) == prompt["count"] and all((o["color"], o["shape"]) == prompt["objects"][0] for o in found)
    if len(found) != 2:
        return False
    fits = lambda want, got: want[0] in (None, got["color"]) and want[1] == got["shape"]
    first, second = found if fits(prompt["objects"][0], found[0]) else found[::-1]
    if not (fits(prompt["objects"][0], first) and fits(prompt["objects"][1], second)):
        return False
    dx, dy = first["x"] - second["x"], first["y"] - second["y"]
    seen = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    return prompt["relation"] in (None, seen)


def picture_stats(images):
    """Means over images of four measures in grey levels (0..255) that content does not move: what an eye calls drift.

    cast   spread of the channels of the ground color; 0 for the plain ground
    tiles  standard deviation between the ground colors of the nine cells, the colour steps of a patchwork
    noise  mean distance of a ground pixel from the mean of its neighbours
    edge   strongest steps between neighbouring pixels (98th percentile): sharpness
    """
    rows = []
    for image in images:
        x = np.asarray(image, np.float32)
        ground = np.median(border(x), 0)
        on = neighbours(np.abs(x - ground).max(-1), np.max) < 60                # away from objects
        cells = [x[i:i + CELL, j:j + CELL][on[i:i + CELL, j:j + CELL]] for i in range(0, len(x), CELL) for j in range(0, len(x), CELL)]
        medians = np.array([np.median(c, 0) for c in cells if len(c) > 20] or [ground])
        grain = np.abs(x - neighbours(x, np.mean)).mean(-1)[on]
        rows.append([np.ptp(ground), medians.std(0).mean(), grain.mean() if grain.size else 0,
                     np.percentile(np.abs(np.diff(x, axis=0)).max(-1), 98)])
    return dict(zip(("cast", "tiles", "noise", "edge"), np.mean(rows, 0).round(2).tolist()))
