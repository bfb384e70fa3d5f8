"""The toy world in motion: clips of coloured shapes, prompts for them, a teacher, a temporal
oracle; built on toy_world.py.

A clip is 3 frames of 48 x 48 pixels, a grid of 3 x 3 cells as an image's. A shape moves through the
three cells of its lane, or it changes in the middle one; one shape has the middle lane, the first
of two the upper or left, the second the lower or right.

    prompt    "a red circle moves left and a blue star grows"  sample_prompt: four types
    scene     what one clip shows, faults included             sample_scene: of content, looks, time
    teacher   scene, scene -> hierarchical verdict             judge_pair, toy_world's
    oracle    frames -> objects, followed -> motions           true, for --watch; sees no scene
"""
import functools
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FOLDER = str(Path(__file__).resolve().parent)
if FOLDER not in sys.path:                           # loaded by a stage's --watch
    sys.path.append(FOLDER)

import toy_world
from toy_oracle import (CELL, COLOR, COLORS, NUMBERS, SHAPE, SHAPES, SIZE, border, detect, mask,
                        measure_all, picture_stats)
from toy_world import (CLASHING, MARKS, PLAIN, blur, count_level, other, paint, random_object,
                       to_image, unlike)

MEDIUM, FRAMES = "Video", 3
STEPS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
CHANGES = ["grows", "blinks"]
MOTIONS = [*STEPS, *CHANGES]
OPPOSITE = {"moves left": "moves right", "moves right": "moves left", "moves up": "moves down",
            "moves down": "moves up", "grows": "shrinks", "blinks": "stays"}
# faults alone, never wanted: shrinks, stays, appears, vanishes
KINDS = ["move", "change", "both", "mixed"]
HARD_KINDS = ["both", "mixed"]


# ------------------------------------------------------------------------------------------------
# prompts

def along(motion):
    """The motions along the axis of a moving one: itself and its opposite."""
    return [motion, OPPOSITE[motion]]


def sample_prompt(rng, held_out=False, kinds=KINDS):
    """A prompt: {type, objects [(color, shape)], motions, text}. move: one shape moves; change: one
    changes in its place; both: two move along one axis; mixed: one moves, one changes. A quarter of
    the combinations of each type is held out, as in toy_world."""
    while True:
        kind = rng.choice([*kinds, "move", "move", "change"])          # two shapes are rarer
        num = 1 if kind in ("move", "change") else 2
        objects = list(zip(rng.sample(list(COLORS), num), rng.sample(SHAPES, num)))
        moving = rng.choice(list(STEPS))
        if kind == "change":
            motions = [rng.choice(CHANGES)]
        elif kind == "move":
            rng.choice(CHANGES)                      # drawn in vain: keeps the sequence of old
            motions = [moving]
        else:
            motions = [moving, rng.choice(along(moving) if kind == "both" else CHANGES)]
        motions = rng.sample(motions, num)
        place = 0
        for i, ((color, shape), motion) in enumerate(zip(objects, motions)):
            place += list(COLORS).index(color)
            place += (1 + i) * (SHAPES.index(shape) + MOTIONS.index(motion))
        if (place % 4 == 0) == held_out:
            clauses = [f"a {c} {s} {m}" for (c, s), m in zip(objects, motions)]
            return {"type": kind, "objects": objects, "motions": motions,
                    "text": " and ".join(clauses)}


def parse_prompt(text):
    """{type, objects, motions} of a prompt's text. ValueError: it is none of this world."""
    clause = f"a ({COLOR}) ({SHAPE}) ({'|'.join(MOTIONS)})"
    if not re.fullmatch(f"{clause}( and {clause})?", text):
        raise ValueError(f"{text!r} is no prompt of the toy world in motion, and this oracle reads "
                         "no other: pass --watch with a reward of your own, or --watch none")
    objects = []
    motions = []
    for color, shape, verb in re.findall(clause, text):
        objects.append((color, shape))
        motions.append(verb)
    num_moving = sum(verb in STEPS for verb in motions)
    if len(motions) == 1:
        kind = "move" if num_moving else "change"
    else:
        kind = "both" if num_moving == 2 else "mixed"
    return {"type": kind, "objects": objects, "motions": motions}


# ------------------------------------------------------------------------------------------------
# scenes

@dataclass
class Scene:
    """What one clip shows. `objects` are the main ones (color, shape), None where one is missing,
    each with its motion."""
    objects: list
    motions: list
    seed: int                                        # places, jitter, noise, background
    doubled: int = None                              # index of a moving object whose copy stands
                                                     # where it goes to and where it came from
    surplus: list = field(default_factory=list)      # (color, shape) in free cells
    ghosts: list = field(default_factory=list)       # the same, nearly transparent
    blend: tuple = None                              # (index of an object, what is drawn over it)
    morph: tuple = None                              # (index, what it turns into halfway)
    flow: str = "smooth"                             # smooth, jerky (frames out of order), cut (to
                                                     # another ground)
    light: str = "balanced"                          # balanced, too dark, washed out, flickering
    background: str = "plain"                        # plain, clashing, tinted
    blurry: bool = False
    noisy: bool = False
    small: bool = False

    def num_visible(self):
        num_main = sum(item is not None for item in self.objects)
        return num_main + len(self.surplus) + (self.doubled is not None)


CONTENT_FAULTS = "color shape missing motion motion motion double surplus".split()


def sample_scene(prompt, rng, num_faults=None, defects=True):
    """A candidate clip for `prompt`: `num_faults` faults of content (drawn if None), and, with
    defects, faults of looks and of time."""
    scene = Scene(list(prompt["objects"]), list(prompt["motions"]), rng.getrandbits(32))
    num = len(scene.objects)
    if num_faults is None:
        num_faults = rng.choices([0, 1, 2], [.4, .45, .15])[0]
    faults = CONTENT_FAULTS + ["swap", "swap motions"] * (num - 1)
    for fault in sorted(set(rng.choices(faults, k=num_faults))):
        add_content_fault(scene, fault, rng)
    two_swaps = False
    if num == 2:
        (c1, s1), (c2, s2) = prompt["objects"]
        two_swaps = scene.objects == [(c2, s1), (c1, s2)]
        two_swaps = two_swaps and prompt["motions"] == scene.motions[::-1] != scene.motions
    if two_swaps:                                    # at once they are hard to tell from none
        scene.motions.reverse()
    i = scene.doubled
    if i is not None and (scene.motions[i] not in STEPS or not scene.objects[i]):
        scene.surplus = scene.surplus or [None]
        scene.doubled = None
    scene.surplus = draw_surplus(scene, prompt, rng)
    if defects:
        add_defects(scene, rng)
    return scene


def add_content_fault(scene, fault, rng):
    """Change what the scene shows."""
    objects = scene.objects
    motions = scene.motions
    i = rng.randrange(len(objects))
    if fault in ("color", "shape") and objects[i]:
        color, shape = objects[i]
        if fault == "color":
            color = other(rng, COLORS, *[o[0] for o in objects if o])
        else:
            shape = other(rng, SHAPES, *[o[1] for o in objects if o])
        objects[i] = (color, shape)
    elif fault == "missing":
        objects[i] = None
    elif fault == "motion":                          # of two, both stay along one axis
        kept = [m for j, m in enumerate(motions) if j != i and m in STEPS]
        axis = along(kept[0]) if kept else list(STEPS)
        another = other(rng, axis + CHANGES, motions[i])
        opposite = OPPOSITE.get(motions[i], "stays")
        motions[i] = rng.choice(["stays", "appears", "vanishes", opposite, another])
    elif fault == "swap" and all(objects):
        objects[:] = [(objects[1][0], objects[0][1]), (objects[0][0], objects[1][1])]
    elif fault == "swap motions":
        motions.reverse()
    elif fault == "surplus":
        scene.surplus = [None] * rng.choice([1, 1, 2])
    elif fault == "double":
        scene.doubled = i


def num_free(scene):
    """Cells of the lanes without a main object."""
    return 3 * (3 - len(scene.objects))


def draw_surplus(scene, prompt, rng):
    """Objects for the scene's empty places of surplus ones, as toy_world.draw_surplus."""
    taken = [*prompt["objects"], *[o for o in scene.objects if o]]
    strangers = []
    for c in COLORS:
        for s in SHAPES:
            if all(c != o[0] and s != o[1] for o in taken):
                strangers.append((c, s))
    copies = prompt["objects"] if scene.objects == prompt["objects"] else []
    surplus = []
    for _ in scene.surplus[:num_free(scene)]:
        if copies and (rng.random() < .6 or not strangers):
            surplus.append(rng.choice(copies))
        elif strangers:
            surplus.append(rng.choice(strangers))
    return surplus


def add_defects(scene, rng):
    """Add faults of looks and of time."""
    present = [i for i, o in enumerate(scene.objects) if o]
    kind = rng.random()
    if kind < .1 and num_free(scene) > len(scene.surplus):
        scene.ghosts = [random_object(rng)]
    elif kind < .25 and present:
        i = rng.choice(present)
        changed = (i, unlike(rng, scene.objects[i]))
        if kind < .17:
            scene.blend = changed
        else:
            scene.morph = changed
    if rng.random() < .3:
        setattr(scene, rng.choice(["blurry", "noisy"]), True)
    if rng.random() < .3:
        moves = any(scene.motions[i] in STEPS for i in present)
        scene.flow = rng.choice(["cut", "jerky"] if moves else ["cut"])
    if rng.random() < .5:
        fault = rng.choice(["small", "background", "light", "light"])
        if fault == "background":
            scene.background = rng.choice(["clashing", "tinted"])
        elif fault == "light":
            scene.light = rng.choice(["too dark", "washed out", "flickering"])
        elif not {"grows", "shrinks"} & set(scene.motions):     # whose size says something else
            scene.small = True


# ------------------------------------------------------------------------------------------------
# pixels

def place(scene, rng):
    """(start cell (column, row) of each main object, the cells of the other lanes in random
    order)."""
    moving = [m for m in scene.motions if m in STEPS]
    if moving:
        across = moving[0] in ("moves left", "moves right")
    else:
        across = rng.random() < .5
    lanes = [1] if len(scene.motions) == 1 else [0, 2]
    starts = []
    for motion, lane in zip(scene.motions, lanes):
        start = 1
        if motion in STEPS:
            start = 2 if min(STEPS[motion]) < 0 else 0
        starts.append((start, lane))
    free = [(a, b) for a in (0, 1, 2) for b in (0, 1, 2) if b not in lanes]
    free = rng.sample(free, len(free))
    if across:
        return starts, free
    return [cell[::-1] for cell in starts], [cell[::-1] for cell in free]


def is_visible(motion, t, num_seen):
    """Whether an object of that motion is in frame t; one that appears or vanishes is in num_seen
    frames."""
    if motion == "blinks":
        return t % 2 == 0
    if motion == "vanishes":
        return t < num_seen
    return motion != "appears" or t >= FRAMES - num_seen


def draw_grounds(scene, rng, noise):
    """The colors of the ground in the first and in the later frames."""
    first = rng.choice(CLASHING) if scene.background == "clashing" else PLAIN
    if scene.background == "tinted":
        cast = noise.randn(3)
        strength = 6 * 7.5 ** rng.random()
        first = tuple(np.array(PLAIN) + (cast - cast.max()) / np.ptp(cast) * strength)
    later = first
    if scene.flow == "cut":
        later = rng.choice([c for c in CLASHING if c != first])
    return first, later


def render(prompt, scene):
    """The scene as 3 PIL images, (48, 48) RGB; the same scene gives the same pixels."""
    rng = random.Random(scene.seed)
    noise = np.random.RandomState(scene.seed)
    grounds = draw_grounds(scene, rng, noise)
    starts, free = place(scene, rng)
    jitter = [(rng.randint(-1, 1), rng.randint(-1, 1)) for _ in range(8)]
    order = rng.choice([[0, 2, 1], [1, 0, 2]]) if scene.flow == "jerky" else range(FRAMES)
    num_seen = rng.choice([1, 2])
    faint = rng.uniform(.25, .45)
    blended = rng.uniform(.4, .6)
    strength = rng.uniform(12, 40)                   # of the noise
    spread = rng.uniform(.2, .4)                     # of the light
    if rng.random() < .5:
        light = [1 - spread * (t % 2) for t in range(FRAMES)]
    else:
        light = 1 - spread * noise.rand(FRAMES, 3)
    frames = []
    for t, moment in enumerate(order):
        canvas = np.empty((SIZE, SIZE, 3), np.float32)
        canvas[:] = grounds[t > 0]
        u = moment / (FRAMES - 1)

        def draw(item, cell, shift, radius=6.0, step=(0, 0), alpha=1.0):
            cover = mask(item[1], radius * (.62 if scene.small else 1)) * alpha
            x, y = (round(k * CELL + CELL // 2 + s + CELL * d)
                    for k, s, d in zip(cell, shift, step))
            paint(canvas, cover, item[0], x, y)

        main = zip(scene.objects, scene.motions, starts, jitter)
        for i, (item, motion, cell, shift) in enumerate(main):
            if not item or not is_visible(motion, t, num_seen):
                continue
            end = [2 * d for d in STEPS.get(motion, (0, 0))]
            step = [u * d for d in end]
            radius = {"grows": 3 + 3.5 * u, "shrinks": 3 + 3.5 * (1 - u)}.get(motion, 6.0)
            if scene.morph and scene.morph[0] == i and t > 0:
                item = scene.morph[1]
            draw(item, cell, shift, radius, step)
            if scene.blend and scene.blend[0] == i:
                draw(scene.blend[1], cell, shift, radius, step, blended)
            if scene.doubled == i and t in (0, FRAMES - 1):
                draw(item, cell, shift, radius, end if t == 0 else (0, 0))
        for item, cell, shift in zip(scene.surplus, free, jitter[2:]):
            draw(item, cell, shift)
        for item, cell, shift in zip(scene.ghosts, free[len(scene.surplus):], jitter[4:]):
            draw(item, cell, shift, alpha=faint)
        if scene.light == "too dark":
            canvas *= .42
        elif scene.light == "flickering":
            canvas *= light[t]
        elif scene.light == "washed out":
            canvas = canvas * .55 + 135
        if scene.blurry:
            canvas = blur(canvas)
        if scene.noisy:
            canvas = canvas + noise.randn(SIZE, SIZE, 3) * strength
        frames.append(to_image(canvas))
    return frames


# ------------------------------------------------------------------------------------------------
# the teacher

def content(prompt):
    """The criteria of category A for this prompt: each wanted object and motion by its name."""
    names = []
    for (color, shape), motion in zip(prompt["objects"], prompt["motions"]):
        names += [f"the {color} {shape}", f"{shape} {motion}"]
    return [*names, "Object count"]


def rubric(prompt):
    """[(category, its criteria)] for this prompt."""
    return [("A. Semantic Alignment", content(prompt)),
            ("B. Video Quality", ["Clarity", "Artifacts", "Consistency"]),
            ("C. Cinematography", ["Light", "Background", "Object scale"])]


def facts_of_object(prompt, scene, i):
    """[(text, level)] of the i-th object and of its motion."""
    want = prompt["objects"][i]
    got = scene.objects[i]
    motion = scene.motions[i]
    if not got:
        return [("missing", 0), ("missing", 0)]
    if scene.blend and scene.blend[0] == i:
        look = ("unclear", 1)
    elif scene.morph and scene.morph[0] == i:
        look = ("changing", 1)
    else:
        look = (" ".join(got), (want[0] == got[0]) + (want[1] == got[1]))
    right = motion == prompt["motions"][i]
    if scene.flow == "jerky" and motion in STEPS:
        return [look, ("jerky", 1 if right else 0)]
    return [look, (motion, 2 if right else 0)]


def facts(prompt, scene):
    """{criterion: (what is seen, level 0..2)} of one clip."""
    rows = []
    for i in range(len(prompt["objects"])):
        rows += facts_of_object(prompt, scene, i)
    num = scene.num_visible()
    rows.append((NUMBERS[num], count_level(num, len(prompt["objects"]))))
    out = {}
    for name, (text, level) in zip(content(prompt), rows):
        out[name] = (f"{text}, {MARKS[level]}", level)
    looks = {"Clarity": "blurry" if scene.blurry else "noisy" if scene.noisy else "sharp",
             "Artifacts": "none", "Consistency": scene.flow, "Light": scene.light,
             "Background": scene.background, "Object scale": "too small" if scene.small else "good"}
    if scene.ghosts:
        looks["Artifacts"] = "ghosts"
    elif scene.blend:
        looks["Artifacts"] = "blended"
    elif scene.morph:
        looks["Artifacts"] = "morphing"
    if not any(scene.objects):
        looks["Object scale"] = "empty"
    for name, text in looks.items():
        good = text in ("sharp", "none", "smooth", "balanced", "plain", "good")
        out[name] = (text, 2 if good else 0)
    return out


judge_pair = functools.partial(toy_world.judge_pair, facts=facts, rubric=rubric, medium=MEDIUM)


class Records(toy_world.Records):
    """toy_world.Records of clips: "videos" are lists of frames; kind image: a captioned clip."""


# ------------------------------------------------------------------------------------------------
# the oracle

def motion_of(track):
    """The motion of one object, its measurement (or None) in each of the three frames; None where
    it has no name. Which frame an object passes the middle in is left to the eye."""
    first, middle, last = track
    if first is None or last is None:
        return None
    dx = last["x"] - first["x"]
    dy = last["y"] - first["y"]
    growth = last["area"] / first["area"]
    if max(abs(dx), abs(dy)) < 6:
        if middle is None:
            return "blinks"
        if growth > 1.8:
            return "grows"
        if growth < 1 / 1.8:
            return "shrinks"
        return "stays" if 1 / 1.5 < growth < 1.5 else None
    straight = max(abs(dx), abs(dy)) >= 24 and min(abs(dx), abs(dy)) <= 6
    if middle is None or not straight or not 1 / 1.8 < growth < 1.8:
        return None
    return next(motion for motion, (x, y) in STEPS.items() if x * dx + y * dy > 10)


def success(prompt, frames):
    """True when the measured objects are the prompt's: right colors and shapes (by most of the
    pixels of all frames), one of each, right motions."""
    detected = [detect(frame) for frame in frames]
    colors = set()
    for objects in detected:
        colors |= {o["color"] for o in objects}
    if colors != {color for color, _ in prompt["objects"]}:
        return False
    for (color, shape), motion in zip(prompt["objects"], prompt["motions"]):
        areas = dict.fromkeys(SHAPES, 0)
        track = []
        for objects in detected:
            matching = [o for o in objects if o["color"] == color]
            for o in matching:
                areas[o["shape"]] += o["area"]
            if len(matching) > 1:
                return False
            track.append(matching[0] if matching else None)
        if max(areas, key=areas.get) != shape or motion_of(track) != motion:
            return False
    return True


def true(media, prompts):
    """{name: [a number an item]} of clips and their prompts' texts: "true" is 1.0 or 0.0,
    "true_TYPE" the same of the prompts of a type, picture_stats are means over the frames, and
    "flicker" is the mean change of the ground from frame to frame in grey levels."""
    parsed = [parse_prompt(text) for text in prompts]
    values = []
    for prompt, frames in zip(parsed, media):
        row = {"true": float(success(prompt, frames))}
        stats = [picture_stats(frame) for frame in frames]
        for name in stats[0]:
            row[name] = float(np.mean([stat[name] for stat in stats]))
        grounds = [np.median(border(np.asarray(frame, np.float32)), 0) for frame in frames]
        row["flicker"] = float(np.abs(np.diff(grounds, axis=0)).mean())
        values.append(row)
    return measure_all(KINDS, values, parsed)
