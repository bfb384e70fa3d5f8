"""The toy world: coloured shapes, prompts for them, a teacher who writes verdicts. The pixel oracle is toy_oracle.py.

Everything the stages need to run on a laptop without weights or data from elsewhere. Loaded only when a stage is asked for
`toy`. An image is 48 x 48 pixels, a grid of 3 x 3 cells that each hold at most one shape.

    prompt    "a red circle above a blue square"               sample_prompt: five types, a quarter of the texts held out
    scene     what one candidate image shows, faults included  sample_scene: wrong, missing, surplus, ghost and blended objects,
                                                               blur, noise, exposure, tinted or tiled backgrounds
    teacher   scene, scene -> hierarchical verdict             judge_pair; sometimes dazzled by looks, see there
    oracle    pixels -> objects -> does it match the prompt?   truth; never sees a scene
"""
import importlib
import json
import random
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageFilter

from toy_oracle import CELL, COLORS, PAIR_TYPES, SHAPES, SIZE, mask, picture_stats, success

MEDIUM, FRAMES = "Image", 1
PLAIN, CLASHING = (238, 238, 238), [(225, 60, 205), (120, 235, 235)]
NUMBERS = ["none", "one", "two", "three", "four", "five"]
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


# ---------------------------------------------------------------- prompts

KINDS, HARD_KINDS = ["single", "count", "two", "binding", "spatial"], ["binding", "spatial"]


def sample_prompt(rng, held_out=False, kinds=KINDS):
    """A prompt as a dict: type, objects [(color or None, shape)], count, relation or None, text.

    A quarter of the combinations of each type is held out, in the manner of a Latin square: every word occurs in training.
    """
    while True:
        kind = rng.choice(kinds)
        (c1, c2), (s1, s2) = rng.sample(list(COLORS), 2), rng.sample(SHAPES, 2)
        objects, count, relation = [(c1, s1)], 1, None
        if kind == "single":
            text = f"a {c1} {s1}"
        elif kind == "count":
            count = rng.choice([2, 3, 4])
            text = f"{NUMBERS[count]} {c1} {s1}s"
        elif kind == "two":
            objects, text = [(None, s1), (None, s2)], f"a {s1} and a {s2}"
        else:
            objects, relation = [(c1, s1), (c2, s2)], rng.choice(list(RELATIONS)) if kind == "spatial" else None
            text = f"a {c1} {s1} {RELATIONS.get(relation, 'and')} a {c2} {s2}"
        colors, shapes, relations = list(COLORS), SHAPES, list(RELATIONS)
        places = [shapes.index(s1), count] if kind != "two" else [shapes.index(s1), 2 * shapes.index(s2)]
        places += [colors.index(c1)] if kind != "two" else []
        places += [colors.index(c2), 2 * shapes.index(s2)] if kind in ("binding", "spatial") else []
        places += [relations.index(relation)] if relation else []
        if (sum(places) % 4 == 0) == held_out:
            return dict(type=kind, objects=objects, count=count, relation=relation, text=text)


# ---------------------------------------------------------------- scenes

@dataclass
class Scene:
    """What one image shows. `objects` are the main ones (color, shape), None where one is missing."""
    objects: list
    relation: str                                    # of the second object's place to the first's, used for two objects
    seed: int                                        # places, jitter, noise, background
    surplus: list = field(default_factory=list)      # (color, shape) in free cells
    ghosts: list = field(default_factory=list)       # the same, nearly transparent
    blend: tuple = None                              # (index of a main object, the (color, shape) that it is blended with)
    background: str = "plain"                        # plain, clashing, tinted, tiled
    exposure: str = "balanced"                       # balanced, too dark, washed out
    blurry: bool = False
    noisy: bool = False
    small: bool = False
    off_center: bool = False
    crowded: bool = False

    def visible(self):
        return [o for o in self.objects if o] + self.surplus


def other(rng, values, *taken):
    return rng.choice([v for v in values if v not in taken])


def sample_scene(prompt, rng, num_faults=None, defects=True):
    """A candidate image for `prompt`: `num_faults` faults of content (drawn if None), and, with defects, faults of looks."""
    kind, pair = prompt["type"], prompt["type"] in PAIR_TYPES
    free = rng.sample(list(COLORS), 2)
    objects = [(c or free[i], s) for i, (c, s) in enumerate(prompt["objects"])] if pair else prompt["objects"] * prompt["count"]
    scene = Scene(list(objects), prompt["relation"] or rng.choice(list(RELATIONS)), rng.getrandbits(32))
    faults = {"single": "color shape missing surplus", "count": "color shape count count surplus", "two": "shape missing surplus",
              "binding": "color shape missing swap swap surplus", "spatial": "color shape missing swap relation relation surplus"}[kind].split()
    if num_faults is None:
        num_faults = rng.choices([0, 1, 2], [.4, .45, .15])[0]
    for fault in sorted(set(rng.choices(faults, k=num_faults))):
        here = scene.objects
        i = rng.randrange(len(here))
        one = pair or rng.random() < .3              # of several equal objects, all are wrong or one is
        if fault in ("color", "shape") and here[i]:
            color, shape = here[i]
            color = other(rng, COLORS, *[o[0] for o in here if o]) if fault == "color" else color
            shape = other(rng, SHAPES, *[o[1] for o in here if o]) if fault == "shape" else shape
            scene.objects = [(color, shape) if o and (j == i or not one) else o for j, o in enumerate(here)]
        elif fault == "missing":
            scene.objects = [o if pair and j != i else None for j, o in enumerate(here)]
        elif fault == "count":
            scene.objects = [objects[0]] * other(rng, [1, 2, 3, 4, 5], prompt["count"])
        elif fault == "swap" and all(here):
            scene.objects = [(here[1][0], here[0][1]), (here[0][0], here[1][1])]
        elif fault == "relation":
            scene.relation = other(rng, RELATIONS, prompt["relation"])
        elif fault == "surplus":
            scene.surplus = [None] * rng.choices([1, 2, 3, 4], [.5, .25, .15, .1])[0]
    # surplus objects: copies of intact ones, or strangers that no eye can take for a main object
    taken = objects + [o for o in scene.objects if o]
    strangers = [(c, s) for c in COLORS for s in SHAPES if not pair or all(c != o[0] and s != o[1] for o in taken)]
    copies = objects if scene.objects == objects or not pair else []
    if copies or strangers:
        scene.surplus = [rng.choice(copies if copies and (rng.random() < .6 or not strangers) else strangers) for _ in scene.surplus]
    else:
        scene.surplus = []
    if defects:
        if rng.random() < .12:
            scene.ghosts = [(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in range(rng.choice([1, 1, 2, 3]))]
        elif rng.random() < .1 and scene.objects[0]:
            scene.blend = (0, (other(rng, COLORS, scene.objects[0][0]), other(rng, SHAPES, scene.objects[0][1])))
        if rng.random() < .45:
            fault = rng.choice(["blurry", "noisy", "exposure"])
            setattr(scene, fault, rng.choice(["too dark", "washed out"]) if fault == "exposure" else True)
        if rng.random() < .5:
            fault = rng.choice(["off_center", "small", "background", "background"])
            setattr(scene, fault, rng.choice(["clashing", "tinted", "tiled"]) if fault == "background" else True)
        if kind == "spatial" and rng.random() < .35:
            scene.crowded = True
    return scene


def place(prompt, scene, rng):
    """Cells (column, row) of the main objects, then of all free cells in random order."""
    n = len(scene.objects)
    if prompt["type"] in PAIR_TYPES:                 # along one axis by the relation; crowded: neighbours
        lane = rng.choice([0, 2]) if scene.off_center else 1
        a, b = rng.choice([(0, 1), (1, 2)]) if scene.crowded else (0, 2)
        cells = [(a, lane), (b, lane)] if scene.relation in ("left", "right") else [(lane, a), (lane, b)]
        cells = cells[::-1] if scene.relation in ("right", "below") else cells
    elif scene.off_center:                           # everything on one side
        side = rng.choice([[(0, 0), (0, 1), (0, 2), (1, 1), (1, 0)], [(2, 0), (2, 1), (2, 2), (1, 1), (1, 0)],
                           [(0, 0), (1, 0), (2, 0), (1, 1), (0, 1)], [(0, 2), (1, 2), (2, 2), (1, 1), (0, 1)]])
        cells = rng.choice([[(0, 0)], [(2, 0)], [(0, 2)], [(2, 2)]]) if n == 1 else side[:n]
    else:
        cells = rng.choice({1: [[(1, 1)]], 2: [[(0, 1), (2, 1)], [(1, 0), (1, 2)]],
                            3: [[(1, 0), (0, 2), (2, 2)], [(0, 0), (2, 0), (1, 2)]],
                            4: [[(0, 0), (2, 0), (0, 2), (2, 2)], [(1, 0), (1, 2), (0, 1), (2, 1)]],
                            5: [[(0, 0), (2, 0), (0, 2), (2, 2), (1, 1)]]}[n])
    free = [(x, y) for x in range(3) for y in range(3) if (x, y) not in cells]
    return cells, rng.sample(free, len(free))


def render(prompt, scene):
    """The scene as a PIL image, (48, 48) RGB; the same scene gives the same pixels."""
    rng = random.Random(scene.seed)
    noise = np.random.RandomState(scene.seed)
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = rng.choice(CLASHING) if scene.background == "clashing" else PLAIN
    if scene.background in ("tinted", "tiled"):      # a colour cast, on the whole or cell by cell
        strength, cast = 6 * 7.5 ** rng.random(), noise.randn(1 if scene.background == "tinted" else 9, 3)
        cast = (cast - cast.max(1, keepdims=True)) / np.ptp(cast, axis=1, keepdims=True) * strength
        canvas += np.broadcast_to(cast, (9, 3)).reshape(3, 3, 3).repeat(CELL, 0).repeat(CELL, 1)

    def draw(item, cell, alpha=1.0):
        cover = mask(item[1], 3.5 if scene.small else 6.0) * alpha
        n = len(cover)
        x, y = (k * CELL + CELL // 2 + rng.randint(-1, 1) - n // 2 for k in cell)
        top, left, bottom, right = max(0, y), max(0, x), min(SIZE, y + n), min(SIZE, x + n)
        cover = cover[top - y:bottom - y, left - x:right - x, None]
        canvas[top:bottom, left:right] += cover * (np.array(COLORS[item[0]], np.float32) - canvas[top:bottom, left:right])

    cells, free = place(prompt, scene, rng)
    for i, (item, cell) in enumerate(zip(scene.objects, cells)):
        if item:
            draw(item, cell)
            if scene.blend and scene.blend[0] == i:
                draw(scene.blend[1], cell, rng.uniform(.4, .6))
    for item, cell in zip(scene.surplus, free):
        draw(item, cell)
    for item, cell in zip(scene.ghosts, free[len(scene.surplus):]):
        draw(item, cell, rng.uniform(.25, .45))
    canvas *= .42 if scene.exposure == "too dark" else 1
    canvas = canvas * .55 + 135 if scene.exposure == "washed out" else canvas
    if scene.blurry:
        canvas = np.asarray(Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)), np.float32)
    if scene.noisy:
        canvas = canvas + noise.randn(SIZE, SIZE, 3) * rng.uniform(12, 40)
    return Image.fromarray(canvas.clip(0, 255).round().astype(np.uint8))


# ---------------------------------------------------------------- the teacher

WEIGHTS = {"A": 5, "D": 4, "B": 3, "C": 1.5}         # people's weights; a category counts by its sign


def content(prompt):
    """The sub-dimensions of category A for this prompt; each of two wanted objects is one, by its name."""
    if prompt["type"] in PAIR_TYPES:
        names = [" ".join(["the", *filter(None, wanted)]) for wanted in prompt["objects"]]
        return names + ["Attribute binding"] * (prompt["type"] == "binding") + ["Object count"]
    names = ["Object shape", "Color accuracy"]
    return [*names, "Object count"] if prompt["type"] == "single" else ["Object count", *names]


def rubric(prompt):
    """The categories and sub-dimensions for this prompt: the three anchors, and a self-added D where it asks for a relation."""
    spread = "Centering" if prompt["type"] == "single" else "Balance"
    added = [("D. Spatial Relation", ["Relation accuracy", "Separation", "Completeness"])] * (prompt["type"] == "spatial")
    return [("A. Semantic Alignment", content(prompt)), ("B. Image Quality", ["Clarity", "Exposure", "Artifacts"]),
            ("C. Aesthetics", [spread, "Background", "Object scale"])] + added


def facts(prompt, scene):
    """{sub-dimension: (what is seen, level 0..2)} of one image."""
    out, seen, mark = {}, scene.visible(), ["wrong", "partial", "correct"]
    blended = scene.objects[scene.blend[0]] if scene.blend else None
    pair = scene.objects if prompt["type"] in PAIR_TYPES else []

    def say(name, text, level):
        out[name] = (f"{text}, {mark[level]}", level)

    if pair:
        levels = []
        for name, want, got in zip(content(prompt), prompt["objects"], pair):
            level = 0 if got is None else 1 if got == blended else (want[0] in (None, got[0])) + (want[1] == got[1])
            say(name, "missing" if got is None else "unclear" if got == blended else " ".join(got), level)
            levels.append(level)
        swapped = all(pair) and [o[0] for o in pair] == [o[0] for o in prompt["objects"]][::-1]
        say("Attribute binding", "kept" if levels == [2, 2] else "swapped" if swapped else "broken", 2 * (levels == [2, 2]))
        wanted = 2
    else:
        for k, name in enumerate(["Color accuracy", "Object shape"]):
            kinds = {o[k] for o in seen}
            text = "none" if not kinds else "unclear" if blended else "mixed" if len(kinds) > 1 else kinds.pop()
            say(name, text, 2 * (text == prompt["objects"][0][k]))
        wanted = prompt["count"]
    miss = abs(len(seen) - wanted)
    say("Object count", NUMBERS[len(seen)] if len(seen) <= 5 else "many", 2 if miss == 0 else 1 if miss == 1 and seen else 0)
    out["Clarity"] = ("blurry", 0) if scene.blurry else ("noisy", 0) if scene.noisy else ("sharp", 2)
    out["Exposure"] = (scene.exposure, 2 if scene.exposure == "balanced" else 0)
    out["Artifacts"] = ("ghosts", 0) if scene.ghosts else ("blended", 0) if blended else ("none", 2)
    out["Centering"] = out["Balance"] = ("off center", 0) if scene.off_center else ("centered", 2)
    out["Object scale"] = ("too small", 0) if scene.small else ("good", 2)
    if not any(scene.objects):
        out["Centering"] = out["Balance"] = out["Object scale"] = ("empty", 0)
    out["Background"] = (scene.background, 2 if scene.background == "plain" else 0)
    whole = all(pair)
    say("Relation accuracy", scene.relation if whole else "unclear", 2 * (whole and scene.relation == prompt["relation"]))
    out["Separation"] = ("crowded", 0) if scene.crowded else ("clear gap", 2)
    out["Completeness"] = ("both present", 2) if whole else ("one missing", 0)
    if not whole:
        out["Separation"] = ("unclear", 0)
    return out


def judge_pair(prompt, scene_1, scene_2, rng=None, facts=facts, rubric=rubric, medium=MEDIUM):
    """(verdict as the contract's dict, label) of two scenes; label 1 or 2 is what people prefer, 0 when they are equal.

    People weigh the categories (WEIGHTS). The teacher writes the same trace, but is imperfect in one way, as real teachers are:
    where quality and aesthetics both speak against the semantically better image, it lets looks decide in 70 % of the cases
    (only with an rng: without one it agrees with people). Its category verdicts stay right, so the fault is in the last step of
    the reasoning, and traces sampled from its student hold both answers: what DPO on people's labels can mend.
    """
    facts_1, facts_2, signs, categories = facts(prompt, scene_1), facts(prompt, scene_2), {}, []
    names = {1: f"{medium} 1", 2: f"{medium} 2", 0: "Tie"}
    for category, dims in rubric(prompt):
        rows = [dict(name=d, reason_1=facts_1[d][0], reason_2=facts_2[d][0], score_1=5 + 2 * (facts_1[d][1] - facts_2[d][1]),
                     score_2=5 - 2 * (facts_1[d][1] - facts_2[d][1])) for d in dims]
        total = sum(r["score_1"] - 5 for r in rows)
        signs[category[0]] = winner = 1 if total > 0 else 2 if total < 0 else 0
        best = max(rows, key=lambda r: (r["score_1"] - 5) * (1 if winner == 1 else -1))
        reason = f"{names[winner]} leads on {best['name']}" if winner else "Both are even"
        categories.append(dict(name=category, dims=rows, cat_reason=reason, cat_winner=names[winner]))
    vote = sum(WEIGHTS[k] * {1: 1, 2: -1, 0: 0}[w] for k, w in signs.items())
    label = winner = 1 if vote > 0 else 2 if vote < 0 else 0
    reason = ", ".join(f"{k} {w or 'even'}" for k, w in signs.items())
    if label and 3 - label in signs.values():
        dazzled = signs["A"] == label and signs["B"] == signs["C"] == 3 - label and rng is not None and rng.random() < .7
        winner = 3 - label if dazzled else label
        reason += ": looks decide" if dazzled or signs["A"] != label else ": content decides"
    return dict(categories=categories, reason=reason, winner=names[winner]), label


SCORE_INSTRUCTION = "Rate the image for: {prompt}"    # a tiny judge's score template


def score_image(prompt, scene):
    """The teacher's rating of one image as text: 1 to 5 for each anchor, from the levels of its sub-dimensions, and overall by people's weights."""
    seen, scores = facts(prompt, scene), {}
    for category, dims in rubric(prompt):
        scores[category[0]] = 1 + 2 * sum(seen[name][1] for name in dims) / len(dims)
    final = sum(WEIGHTS[k] * score for k, score in scores.items()) / sum(WEIGHTS[k] for k in scores)
    lines = [f"{name} Score (1-5): {scores[k]:.0f}" for name, k in (("Alignment", "A"), ("Coherence", "B"), ("Style", "C"))]
    return "\n".join([*lines, f"Final Score: {final:.1f}"])


def ask_about(scene, rng):
    """(question, answer) about the shapes that are to be seen."""
    seen, color = scene.visible(), rng.choice(list(COLORS))
    shape = rng.choice([shape for _, shape in seen] if seen and rng.random() < .8 else SHAPES)
    colors, form = [c for c, s in seen if s == shape], rng.choice(["count", "color", "presence"])
    if form == "color" and len(colors) == 1:
        return f"What color is the {shape}?", colors[0]
    if form == "presence":
        color = rng.choice(colors) if colors and rng.random() < .5 else color
        return f"Is there a {color} {shape}?", "yes" if color in colors else "no"
    return f"How many {shape}s are there?", NUMBERS[len(colors)] if len(colors) < 6 else "many"


class Records:
    """Toy records of data.py's kinds, made when asked for: record i of a split is a function of (split, kind, seed, i).

    split  train: prompts that are trained on; val, test: held-out prompts; scenes: trained prompts in scenes of their own
    kind   trace: the imperfect teacher's verdict as "response"; pair: people's label alone, to train on often a hard one;
           image: a captioned picture for the base generator, 30 % of them faulty, 5 % of poor looks; prompt: only the prompt;
           score, question: traces of one image and an "instruction", to be rated or answered in a word
    """

    def __init__(self, split, kind, num, seed=0):
        self.split, self.kind, self.num, self.seed = split, kind, num, seed
        self.world = sys.modules[type(self).__module__]                         # whose prompts, scenes and teacher they are
        kinds = ["trace", "pair", "image", "prompt"] + ["score", "question"] * (self.world.FRAMES == 1)
        if kind not in kinds:
            raise ValueError(f"this toy world has no {kind} records; expected one of {', '.join(kinds)}")

    def __len__(self):
        return self.num

    def scenes(self, i):
        """(prompt, both scenes, verdict, people's label) of pair or trace i; the verdict of a trace is the imperfect teacher's."""
        rng, prompt = self.draw(i)
        hard = rng.random() < (.3 if self.kind == "pair" and self.split == "train" else .05)
        ties = self.kind == "trace" and rng.random() < .1
        while True:                                  # a share of hard pairs: content against looks; ties only to train on
            scenes = [self.world.sample_scene(prompt, rng), self.world.sample_scene(prompt, rng)]
            verdict, label = self.world.judge_pair(prompt, *scenes, rng if self.kind == "trace" else None)
            signs = [c["cat_winner"] for c in verdict["categories"]]
            if (label or ties) and (not hard or signs[1] == signs[2] != "Tie" != signs[0] != signs[1]):
                return prompt, scenes, verdict, label

    def draw(self, i):
        if not 0 <= i < self.num:
            raise IndexError(i)
        rng = random.Random(f"{self.split} {self.kind} {self.seed} {i}")
        kinds = self.world.KINDS + self.world.HARD_KINDS * (self.kind == "trace")                   # the harder types more often where judges learn
        return rng, self.world.sample_prompt(rng, self.split in ("val", "test"), kinds)

    def __getitem__(self, i):
        rng, prompt = self.draw(i)
        world, media = self.world, f"{self.world.MEDIUM.lower()}s"
        record = dict(prompt=prompt["text"], type=prompt["type"], toy_prompt=prompt)
        if self.kind == "prompt":
            return record
        if self.kind == "image":
            record[media] = [world.render(prompt, world.sample_scene(prompt, rng, int(rng.random() < .3), defects=rng.random() < .05))]
            return record
        if self.kind in ("score", "question"):
            scene = sample_scene(prompt, rng, defects=self.kind == "score")
            asked = (SCORE_INSTRUCTION.replace("{prompt}", prompt["text"]), score_image(prompt, scene)) if self.kind == "score" else ask_about(scene, rng)
            return dict(type=self.kind, images=[render(prompt, scene)], **dict(zip(("instruction", "response"), asked)))
        prompt, scenes, verdict, label = self.scenes(i)
        record["toy"] = dict(world=world.__name__, split=self.split, kind=self.kind, seed=self.seed, index=i, swapped=False)          # what the teacher sees it by
        record[media] = [world.render(prompt, s) for s in scenes]
        record["winner"] = f"{world.MEDIUM} {label}" if label else "Tie"
        if self.kind == "trace":
            record["response"] = json.dumps(verdict, separators=(",", ":"))
        return record


def teacher(records, temperature=0.0):
    """The imperfect teacher's verdicts on pair records, as texts: a judge that takes records, whose scenes it makes anew from "toy". It is
    dazzled by looks or not at the toss of a coin: one coin for each pair at temperature 0, else torch's. ValueError: a record that is not toy."""
    texts = []
    for record in records:
        if "toy" not in record:
            raise ValueError(f"{record.get('where', 'a record')}: no 'toy' in it. The toy teacher knows the pairs of `data.py toy FILE --kind pair` alone.")
        toy = dict(record["toy"])
        world, swapped, i = importlib.import_module(toy.pop("world")), toy.pop("swapped"), toy.pop("index")
        prompt, scenes, _, _ = world.Records(num=i + 1, **toy).scenes(i)
        coin = random.Random(f"{toy} {i} {torch.randint(2 ** 31, ()).item() if temperature else 'first'}")
        texts.append(json.dumps(world.judge_pair(prompt, *(scenes[::-1] if swapped else scenes), coin)[0], separators=(",", ":")))
    return texts


# ---------------------------------------------------------------- what the oracle says of samples

def truth(records, media):
    """What the oracle measures on samples of prompt records, lists of one frame: the share of true ones, by type too, and picture_stats."""
    images = [frame for frame, in media]
    true = [success(r["toy_prompt"], image) for r, image in zip(records, images)]
    by_type = {kind: [ok for ok, r in zip(true, records) if r["type"] == kind] for kind in KINDS}
    return {"true": sum(true) / len(true), **{f"true_{k}": sum(v) / len(v) for k, v in by_type.items() if v}, **picture_stats(images)}
