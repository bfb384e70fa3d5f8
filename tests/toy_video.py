"""The toy world in motion: clips of coloured shapes, prompts for them, a teacher, a temporal oracle; built on toy_world.py.

A clip is 3 frames of 48 x 48 pixels, a grid of 3 x 3 cells as an image's. A shape moves through the three cells of its lane, or it changes
in the middle one; one shape has the middle lane, the first of two the upper or left, the second the lower or right.

    prompt    "a red circle moves left and a blue star grows"  sample_prompt: four types, a quarter of the texts held out
    scene     what one clip shows, faults included             sample_scene: faults of content, of looks and of time
    teacher   scene, scene -> hierarchical verdict             judge_pair, toy_world's
    oracle    frames -> objects, followed -> motions           success, truth; never sees a scene
"""
import functools
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

import toy_world
from toy_oracle import CELL, COLORS, SHAPES, border, detect, mask, picture_stats
from toy_world import CLASHING, NUMBERS, PLAIN, other

MEDIUM, FRAMES, SIZE = "Video", 3, 48
STEPS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
CHANGES = ["grows", "blinks"]
MOTIONS = [*STEPS, *CHANGES]
OPPOSITE = dict(zip(MOTIONS, ["moves right", "moves left", "moves down", "moves up", "shrinks", "stays"]))
# faults alone, never wanted: shrinks, stays, appears, vanishes
KINDS, HARD_KINDS = ["move", "change", "both", "mixed"], ["both", "mixed"]


def along(motion):
    """The motions along the axis of a moving one: itself and its opposite."""
    return [motion, OPPOSITE[motion]]


def sample_prompt(rng, held_out=False, kinds=KINDS):
    """A prompt as a dict: type, objects [(color, shape)], motions, text. move: one shape moves; change: one changes in its place; both: two
    move along one axis; mixed: one moves, one changes. A quarter of the combinations of each type is held out, as in toy_world."""
    while True:
        kind = rng.choice([*kinds, "move", "move", "change"])                   # two shapes are hard, and rarer
        num = 1 if kind in ("move", "change") else 2
        objects = list(zip(rng.sample(list(COLORS), num), rng.sample(SHAPES, num)))
        moving = rng.choice(list(STEPS))
        motions = [rng.choice(CHANGES)] if kind == "change" else [moving] + [rng.choice(along(moving) if kind == "both" else CHANGES)] * (num - 1)
        motions = rng.sample(motions, num)
        places = [(list(COLORS).index(c) + SHAPES.index(s) * (1 + i) + MOTIONS.index(m) * (1 + i)) for i, ((c, s), m) in enumerate(zip(objects, motions))]
        if (sum(places) % 4 == 0) == held_out:
            return dict(type=kind, objects=objects, motions=motions, text=" and ".join(f"a {c} {s} {m}" for (c, s), m in zip(objects, motions)))


# ---------------------------------------------------------------- scenes

@dataclass
class Scene:
    """What one clip shows. `objects` are the main ones (color, shape), None where one is missing, each with its motion."""
    objects: list
    motions: list
    seed: int                                        # places, jitter, noise, background
    doubled: int = None                              # index of a moving object whose copy stands where it goes to and where it came from
    surplus: list = field(default_factory=list)      # (color, shape) in free cells
    ghosts: list = field(default_factory=list)       # the same, nearly transparent
    blend: tuple = None                              # (index of a main object, the (color, shape) that it is blended with)
    morph: tuple = None                              # (index, the (color, shape) that it turns into halfway)
    flow: str = "smooth"                             # smooth, jerky (frames out of order), cut (to another ground)
    light: str = "balanced"                          # balanced, too dark, washed out, flickering
    background: str = "plain"                        # plain, clashing, tinted
    blurry: bool = False
    noisy: bool = False
    small: bool = False

    def num_visible(self):
        return sum(map(bool, self.objects)) + len(self.surplus) + (self.doubled is not None)


def sample_scene(prompt, rng, num_faults=None, defects=True):
    """A candidate clip for `prompt`: `num_faults` faults of content (drawn if None), and, with defects, faults of looks and of time."""
    objects, motions = list(prompt["objects"]), list(prompt["motions"])
    scene, num = Scene(objects, motions, rng.getrandbits(32)), len(objects)
    if num_faults is None:
        num_faults = rng.choices([0, 1, 2], [.4, .45, .15])[0]
    for fault in sorted(set(rng.choices("color shape missing motion motion motion double surplus".split() + ["swap", "swap motions"] * (num - 1), k=num_faults))):
        i = rng.randrange(num)
        if fault in ("color", "shape") and objects[i]:
            color, shape = objects[i]
            objects[i] = (other(rng, COLORS, *[o[0] for o in objects if o]), shape) if fault == "color" else (color, other(rng, SHAPES, *[o[1] for o in objects if o]))
        elif fault == "missing":
            objects[i] = None
        elif fault == "motion":                      # of two, both stay along one axis
            kept = [m for j, m in enumerate(motions) if j != i and m in STEPS]
            motions[i] = rng.choice(["stays", "appears", "vanishes", OPPOSITE.get(motions[i], "stays"),
                                     other(rng, (along(kept[0]) if kept else list(STEPS)) + CHANGES, motions[i])])
        elif fault == "swap" and all(objects):
            objects[:] = [(objects[1][0], objects[0][1]), (objects[0][0], objects[1][1])]
        elif fault == "swap motions":
            motions.reverse()
        elif fault == "surplus":
            scene.surplus = [None] * rng.choice([1, 1, 2])
        elif fault == "double":
            scene.doubled = i
    if prompt["motions"] == motions[::-1] != motions and objects == [(b[0], a[1]) for a, b in zip(prompt["objects"], prompt["objects"][::-1])]:
        motions.reverse()                            # two swaps at once are hard to tell from none
    if scene.doubled is not None and (motions[scene.doubled] not in STEPS or not objects[scene.doubled]):
        scene.surplus, scene.doubled = scene.surplus or [None], None
    free = 3 * (3 - num)                             # cells of the lanes without a main object
    taken = [*prompt["objects"], *[o for o in objects if o]]
    strangers = [(c, s) for c in COLORS for s in SHAPES if all(c != o[0] and s != o[1] for o in taken)]
    copies = prompt["objects"] if objects == prompt["objects"] else []
    scene.surplus = [rng.choice(copies if copies and (rng.random() < .6 or not strangers) else strangers)
                     for _ in scene.surplus[:free]] if copies or strangers else []
    shown = [i for i, o in enumerate(objects) if o]
    if defects:
        kind = rng.random()
        if kind < .1 and free > len(scene.surplus):
            scene.ghosts = [(rng.choice(list(COLORS)), rng.choice(SHAPES))]
        elif kind < .25 and shown:
            i = rng.choice(shown)
            changed = (i, (other(rng, COLORS, objects[i][0]), other(rng, SHAPES, objects[i][1])))
            scene.blend, scene.morph = (changed, None) if kind < .17 else (None, changed)
        if rng.random() < .3:
            setattr(scene, rng.choice(["blurry", "noisy"]), True)
        if rng.random() < .3:
            scene.flow = rng.choice(["cut"] + ["jerky"] * any(motions[i] in STEPS for i in shown))
        if rng.random() < .5:
            fault = rng.choice(["small", "background", "light", "light"])
            setattr(scene, fault, True if fault == "small" else rng.choice(["clashing", "tinted"] if fault == "background" else ["too dark", "washed out", "flickering"]))
        scene.small = scene.small and not {"grows", "shrinks"} & set(motions)   # whose size says something else
    return scene


def place(scene, rng):
    """(start cell (column, row) of each main object, the cells of the other lanes in random order)."""
    moving = [m for m in scene.motions if m in STEPS]
    across = moving[0] in ("moves left", "moves right") if moving else rng.random() < .5
    lanes = [1] if len(scene.motions) == 1 else [0, 2]
    starts = [(1 if m not in STEPS else 2 * (min(STEPS[m]) < 0), lane) for m, lane in zip(scene.motions, lanes)]
    free = rng.sample(cells := [(a, b) for a in (0, 1, 2) for b in (0, 1, 2) if b not in lanes], len(cells))
    turn = lambda cell: cell if across else cell[::-1]
    return list(map(turn, starts)), list(map(turn, free))


def render(prompt, scene):
    """The scene as 3 PIL images, (48, 48) RGB; the same scene gives the same pixels."""
    rng, noise, frames = random.Random(scene.seed), np.random.RandomState(scene.seed), []
    grounds = [rng.choice(CLASHING) if scene.background == "clashing" else PLAIN] * 2
    if scene.background == "tinted":
        cast = noise.randn(3)
        grounds = [tuple(np.array(PLAIN) + (cast - cast.max()) / np.ptp(cast) * 6 * 7.5 ** rng.random())] * 2
    if scene.flow == "cut":
        grounds[1] = rng.choice([c for c in CLASHING if c != grounds[0]])
    starts, free = place(scene, rng)
    jitter = [(rng.randint(-1, 1), rng.randint(-1, 1)) for _ in range(8)]
    order = rng.choice([[0, 2, 1], [1, 0, 2]]) if scene.flow == "jerky" else range(FRAMES)
    seen, faint, blended, noisy, spread = rng.choice([1, 2]), rng.uniform(.25, .45), rng.uniform(.4, .6), rng.uniform(12, 40), rng.uniform(.2, .4)
    dims = [1 - spread * (t % 2) for t in range(FRAMES)] if rng.random() < .5 else 1 - spread * noise.rand(FRAMES, 3)
    for t, u in enumerate(i / (FRAMES - 1) for i in order):
        canvas = np.empty((SIZE, SIZE, 3), np.float32)
        canvas[:] = grounds[t > 0]

        def draw(item, cell, shift, radius=6.0, step=(0, 0), alpha=1.0):
            cover = mask(item[1], radius * (.62 if scene.small else 1)) * alpha
            n = len(cover)
            x, y = (round(k * CELL + CELL // 2 + s + CELL * d) - n // 2 for k, s, d in zip(cell, shift, step))
            top, left, bottom, right = max(0, y), max(0, x), min(SIZE, y + n), min(SIZE, x + n)
            cover = cover[top - y:bottom - y, left - x:right - x, None]
            canvas[top:bottom, left:right] += cover * (np.array(COLORS[item[0]], np.float32) - canvas[top:bottom, left:right])

        for i, (item, motion, cell, shift) in enumerate(zip(scene.objects, scene.motions, starts, jitter)):
            if not item or motion == "blinks" and t % 2 or motion == "vanishes" and t >= seen or motion == "appears" and t < FRAMES - seen:
                continue
            step = tuple(2 * u * d for d in STEPS.get(motion, (0, 0)))
            radius = 3 + 3.5 * (u if motion == "grows" else 1 - u) if motion in ("grows", "shrinks") else 6.0
            if scene.morph and scene.morph[0] == i and t > 0:
                item = scene.morph[1]
            draw(item, cell, shift, radius, step)
            if scene.blend and scene.blend[0] == i:
                draw(scene.blend[1], cell, shift, radius, step, blended)
            if scene.doubled == i and t in (0, FRAMES - 1):
                draw(item, cell, shift, radius, tuple(2 * d for d in STEPS[motion]) if t == 0 else (0, 0))
        for item, cell, shift in zip(scene.surplus, free, jitter[2:]):
            draw(item, cell, shift)
        for item, cell, shift in zip(scene.ghosts, free[len(scene.surplus):], jitter[4:]):
            draw(item, cell, shift, alpha=faint)
        canvas *= .42 if scene.light == "too dark" else dims[t] if scene.light == "flickering" else 1
        canvas = canvas * .55 + 135 if scene.light == "washed out" else canvas
        if scene.blurry:
            canvas = np.asarray(Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)), np.float32)
        if scene.noisy:
            canvas = canvas + noise.randn(SIZE, SIZE, 3) * noisy
        frames.append(Image.fromarray(canvas.clip(0, 255).round().astype(np.uint8)))
    return frames


# ---------------------------------------------------------------- the teacher

def content(prompt):
    """The sub-dimensions of category A for this prompt: each wanted object and each wanted motion by its name."""
    return [name for (c, s), m in zip(prompt["objects"], prompt["motions"]) for name in (f"the {c} {s}", f"{s} {m}")] + ["Object count"]


def rubric(prompt):
    """The categories and sub-dimensions for this prompt, by the anchors' short names."""
    return [("A. Semantic Alignment", content(prompt)), ("B. Video Quality", ["Clarity", "Artifacts", "Consistency"]),
            ("C. Cinematography", ["Light", "Background", "Object scale"])]


def facts(prompt, scene):
    """{sub-dimension: (what is seen, level 0..2)} of one clip."""
    out, mark, names = {}, ["wrong", "partial", "correct"], iter(content(prompt))
    unclear = {changed[0]: word for word, changed in (("unclear", scene.blend), ("changing", scene.morph)) if changed}

    def say(name, text, level):
        out[name] = (f"{text}, {mark[level]}", level)

    for i, (want, verb, got, motion) in enumerate(zip(prompt["objects"], prompt["motions"], scene.objects, scene.motions)):
        say(next(names), "missing" if not got else unclear.get(i) or " ".join(got), 0 if not got else 1 if i in unclear else (want[0] == got[0]) + (want[1] == got[1]))
        jerky = scene.flow == "jerky" and motion in STEPS
        say(next(names), "missing" if not got else "jerky" if jerky else motion, (2 - jerky) * bool(got and motion == verb))
    seen = scene.num_visible()
    miss = abs(seen - len(prompt["objects"]))
    say("Object count", NUMBERS[seen], 2 if miss == 0 else 1 if miss == 1 and seen else 0)
    out["Clarity"] = ("blurry", 0) if scene.blurry else ("noisy", 0) if scene.noisy else ("sharp", 2)
    out["Artifacts"] = ("ghosts", 0) if scene.ghosts else ("blended", 0) if scene.blend else ("morphing", 0) if scene.morph else ("none", 2)
    out["Consistency"] = (scene.flow, 2 * (scene.flow == "smooth"))
    out["Light"] = (scene.light, 2 * (scene.light == "balanced"))
    out["Background"] = (scene.background, 2 * (scene.background == "plain"))
    out["Object scale"] = ("empty", 0) if not any(scene.objects) else ("too small", 0) if scene.small else ("good", 2)
    return out


judge_pair = functools.partial(toy_world.judge_pair, facts=facts, rubric=rubric, medium=MEDIUM)


class Records(toy_world.Records):
    """toy_world.Records of clips: "videos" are lists of frames; kind image: a captioned clip."""


# ---------------------------------------------------------------- the oracle

def motion(track):
    """The motion of one object, its measurement (or None) in each of the three frames; None where it is none that has a name. Which frame an
    object passes the middle in is left to the eye."""
    if [o is not None for o in track] not in ([True] * 3, [True, False, True]):
        return None
    first, middle, last = track
    dx, dy, growth = last["x"] - first["x"], last["y"] - first["y"], last["area"] / first["area"]
    if max(abs(dx), abs(dy)) < 6:
        if middle is None:
            return "blinks"
        return "grows" if growth > 1.8 else "shrinks" if growth < 1 / 1.8 else "stays" if 1 / 1.5 < growth < 1.5 else None
    if middle is None or max(abs(dx), abs(dy)) < 24 or min(abs(dx), abs(dy)) > 6 or not 1 / 1.8 < growth < 1.8:
        return None
    return next(m for m, (x, y) in STEPS.items() if x * dx + y * dy > 10)


def success(prompt, frames):
    """True when the measured objects are the prompt's: right colors and shapes (by most of the pixels of all frames), one of each, right motions."""
    found = [detect(frame) for frame in frames]
    if {o["color"] for objects in found for o in objects} != {c for c, _ in prompt["objects"]}:
        return False
    for (color, shape), verb in zip(prompt["objects"], prompt["motions"]):
        track = [[o for o in objects if o["color"] == color] for objects in found]
        votes = {s: sum(o["area"] for objects in track for o in objects if o["shape"] == s) for s in SHAPES}
        if max(map(len, track)) > 1 or max(votes, key=votes.get) != shape or motion([o[0] if o else None for o in track]) != verb:
            return False
    return True


def truth(records, videos):
    """What the oracle measures on samples of prompt records: the share of true ones, by type too, picture_stats of all frames, and flicker,
    the mean change of the ground from frame to frame in grey levels."""
    true = [success(r["toy_prompt"], frames) for r, frames in zip(records, videos)]
    by_type = {kind: [ok for ok, r in zip(true, records) if r["type"] == kind] for kind in KINDS}
    grounds = np.array([[np.median(border(np.asarray(f, np.float32)), 0) for f in frames] for frames in videos])           # (B, F, 3)
    return {"true": sum(true) / len(true), **{f"true_{k}": sum(v) / len(v) for k, v in by_type.items() if v},
            **picture_stats([f for frames in videos for f in frames]), "flicker": round(float(np.abs(np.diff(grounds, axis=1)).mean()), 2)}
