"""The toy world: coloured shapes, prompts for them, a teacher who writes verdicts. toy.py writes it
to files; the pixel oracle is toy_oracle.py.

All that the stages need to run on a laptop without weights or data from elsewhere. An image is
48 x 48 pixels, a grid of 3 x 3 cells that each hold at most one shape.

    prompt    "a red circle above a blue square"      sample_prompt: five types, a quarter held out
    scene     what one image shows, faults included   sample_scene: wrong, missing, surplus, ghost
              and blended objects, blur, noise, exposure, tinted or tiled backgrounds
    teacher   scene, scene -> hierarchical verdict    judge_pair; sometimes dazzled by looks
    Records   all of these as a function of (split, kind, seed, index)
"""
import json
import random
import sys
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

from toy_oracle import CELL, COLORS, NUMBERS, PAIR_TYPES, RELATIONS, SHAPES, SIZE, mask

MEDIUM, FRAMES = "Image", 1
PLAIN = (238, 238, 238)
CLASHING = [(225, 60, 205), (120, 235, 235)]


# ------------------------------------------------------------------------------------------------
# prompts

KINDS = ["single", "count", "two", "binding", "spatial"]
HARD_KINDS = ["binding", "spatial"]


def sample_prompt(rng, held_out=False, kinds=KINDS):
    """A prompt: {type, objects [(color or None, shape)], count, relation or None, text}.

    A quarter of the combinations of each type is held out, in the manner of a Latin square: every
    word occurs in training.
    """
    while True:
        kind = rng.choice(kinds)
        c1, c2 = rng.sample(list(COLORS), 2)
        s1, s2 = rng.sample(SHAPES, 2)
        objects = [(c1, s1)]
        count = 1
        relation = None
        if kind == "single":
            text = f"a {c1} {s1}"
        elif kind == "count":
            count = rng.choice([2, 3, 4])
            text = f"{NUMBERS[count]} {c1} {s1}s"
        elif kind == "two":
            objects = [(None, s1), (None, s2)]
            text = f"a {s1} and a {s2}"
        else:
            objects = [(c1, s1), (c2, s2)]
            relation = rng.choice(list(RELATIONS)) if kind == "spatial" else None
            text = f"a {c1} {s1} {RELATIONS.get(relation, 'and')} a {c2} {s2}"
        place = SHAPES.index(s1)
        if kind == "two":
            place += 2 * SHAPES.index(s2)
        else:
            place += count + list(COLORS).index(c1)
        if kind in ("binding", "spatial"):
            place += list(COLORS).index(c2) + 2 * SHAPES.index(s2)
        if relation:
            place += list(RELATIONS).index(relation)
        if (place % 4 == 0) == held_out:
            return {"type": kind, "objects": objects, "count": count, "relation": relation,
                    "text": text}


# ------------------------------------------------------------------------------------------------
# scenes

@dataclass
class Scene:
    """What one image shows. `objects` are the main ones (color, shape), None where one is missing;
    `relation` is of the second object's place to the first's, used for two objects."""
    objects: list
    relation: str
    seed: int                                        # places, jitter, noise, background
    surplus: list = field(default_factory=list)      # (color, shape) in free cells
    ghosts: list = field(default_factory=list)       # the same, nearly transparent, or white
    blend: tuple = None                              # (index of an object, what is drawn over it)
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


def random_object(rng):
    return rng.choice(list(COLORS)), rng.choice(SHAPES)


def unlike(rng, item):
    """An object of another color and another shape."""
    return other(rng, COLORS, item[0]), other(rng, SHAPES, item[1])


CONTENT_FAULTS = {
    "single": "color shape missing surplus",
    "count": "color shape count count surplus",
    "two": "shape missing surplus",
    "binding": "color shape missing swap swap surplus",
    "spatial": "color shape missing swap relation relation surplus"}


def sample_scene(prompt, rng, num_faults=None, defects=True):
    """A candidate image for `prompt`: `num_faults` faults of content (drawn if None), and, with
    defects, faults of looks."""
    pair = prompt["type"] in PAIR_TYPES
    free = rng.sample(list(COLORS), 2)
    if pair:
        objects = [(c or free[i], s) for i, (c, s) in enumerate(prompt["objects"])]
    else:
        objects = prompt["objects"] * prompt["count"]
    relation = prompt["relation"] or rng.choice(list(RELATIONS))
    scene = Scene(list(objects), relation, rng.getrandbits(32))
    if num_faults is None:
        num_faults = rng.choices([0, 1, 2], [.4, .45, .15])[0]
    faults = rng.choices(CONTENT_FAULTS[prompt["type"]].split(), k=num_faults)
    for fault in sorted(set(faults)):
        add_content_fault(scene, fault, prompt, objects, rng)
    scene.surplus = draw_surplus(scene, objects, pair, rng)
    if defects:
        add_defects(scene, prompt, rng)
    return scene


def add_content_fault(scene, fault, prompt, objects, rng):
    """Change what the scene shows; `objects` are those of a faultless one."""
    pair = prompt["type"] in PAIR_TYPES
    here = scene.objects
    i = rng.randrange(len(here))
    one = pair or rng.random() < .3                  # of several equal objects, all or one is wrong
    if fault in ("color", "shape") and here[i]:
        color, shape = here[i]
        if fault == "color":
            color = other(rng, COLORS, *[o[0] for o in here if o])
        else:
            shape = other(rng, SHAPES, *[o[1] for o in here if o])
        for j, o in enumerate(list(here)):
            if o and (j == i or not one):
                here[j] = (color, shape)
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


def draw_surplus(scene, objects, pair, rng):
    """Objects for the scene's empty places of surplus ones: copies of intact objects, or strangers
    that no eye can take for a main object."""
    taken = objects + [o for o in scene.objects if o]
    strangers = []
    for c in COLORS:
        for s in SHAPES:
            if not pair or all(c != o[0] and s != o[1] for o in taken):
                strangers.append((c, s))
    copies = objects if scene.objects == objects or not pair else []
    surplus = []
    for _ in scene.surplus:
        if copies and (rng.random() < .6 or not strangers):
            surplus.append(rng.choice(copies))
        elif strangers:
            surplus.append(rng.choice(strangers))
    return surplus


def add_defects(scene, prompt, rng):
    """Add faults of looks. Half of the ghosts are paler than the ground: a policy whose judge never
    saw such ones learns to remove ghosts until white ones stand in every empty cell."""
    if rng.random() < .1:
        scene.ghosts = [random_object(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
    elif rng.random() < .11:
        scene.ghosts = [("white", rng.choice(SHAPES)) for _ in range(rng.randint(3, 9))]
    elif rng.random() < .1 and scene.objects[0]:
        scene.blend = (0, unlike(rng, scene.objects[0]))
    if rng.random() < .45:
        fault = rng.choice(["blurry", "noisy", "exposure"])
        kind = rng.choice(["too dark", "washed out"]) if fault == "exposure" else True
        setattr(scene, fault, kind)
    if rng.random() < .5:
        fault = rng.choice(["off_center", "small", "background", "background"])
        kind = rng.choice(["clashing", "tinted", "tiled"]) if fault == "background" else True
        setattr(scene, fault, kind)
    if prompt["type"] == "spatial" and rng.random() < .35:
        scene.crowded = True


# ------------------------------------------------------------------------------------------------
# pixels

CORNERS = [[(0, 0)], [(2, 0)], [(0, 2)], [(2, 2)]]
SIDES = [[(0, 0), (0, 1), (0, 2), (1, 1), (1, 0)], [(2, 0), (2, 1), (2, 2), (1, 1), (1, 0)],
         [(0, 0), (1, 0), (2, 0), (1, 1), (0, 1)], [(0, 2), (1, 2), (2, 2), (1, 1), (0, 1)]]
SPREAD = {1: [[(1, 1)]],
          2: [[(0, 1), (2, 1)], [(1, 0), (1, 2)]],
          3: [[(1, 0), (0, 2), (2, 2)], [(0, 0), (2, 0), (1, 2)]],
          4: [[(0, 0), (2, 0), (0, 2), (2, 2)], [(1, 0), (1, 2), (0, 1), (2, 1)]],
          5: [[(0, 0), (2, 0), (0, 2), (2, 2), (1, 1)]]}


def place(prompt, scene, rng):
    """Cells (column, row) of the main objects, then of all free cells in random order."""
    n = len(scene.objects)
    if prompt["type"] in PAIR_TYPES:                 # along one axis; crowded: neighbours
        lane = rng.choice([0, 2]) if scene.off_center else 1
        a, b = rng.choice([(0, 1), (1, 2)]) if scene.crowded else (0, 2)
        cells = [(a, lane), (b, lane)]
        if scene.relation in ("above", "below"):
            cells = [(lane, a), (lane, b)]
        if scene.relation in ("right", "below"):
            cells.reverse()
    elif scene.off_center:                           # everything on one side
        side = rng.choice(SIDES)
        cells = rng.choice(CORNERS) if n == 1 else side[:n]
    else:
        cells = rng.choice(SPREAD[n])
    free = [(x, y) for x in range(3) for y in range(3) if (x, y) not in cells]
    return cells, rng.sample(free, len(free))


def paint(canvas, cover, color, x, y):
    """Lay a color over the canvas (48, 48, 3) with coverage (n, n) centred at pixel (x, y)."""
    n = len(cover)
    x -= n // 2
    y -= n // 2
    top, left = max(0, y), max(0, x)
    bottom, right = min(SIZE, y + n), min(SIZE, x + n)
    cover = cover[top - y:bottom - y, left - x:right - x, None]
    part = canvas[top:bottom, left:right]
    part += cover * (np.array(COLORS.get(color, (255, 255, 255)), np.float32) - part)


def to_image(canvas):
    return Image.fromarray(canvas.clip(0, 255).round().astype(np.uint8))


def blur(canvas):
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(2)), np.float32)


def draw_ground(scene, rng, noise):
    """The background as float32 (48, 48, 3)."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = rng.choice(CLASHING) if scene.background == "clashing" else PLAIN
    if scene.background in ("tinted", "tiled"):      # a color cast, on all cells or cell by cell
        strength = 6 * 7.5 ** rng.random()
        cast = noise.randn(1 if scene.background == "tinted" else 9, 3)
        cast = (cast - cast.max(1, keepdims=True)) / np.ptp(cast, axis=1, keepdims=True) * strength
        cast = np.broadcast_to(cast, (9, 3)).reshape(3, 3, 3)
        canvas += cast.repeat(CELL, 0).repeat(CELL, 1)
    return canvas


def render(prompt, scene):
    """The scene as a PIL image, (48, 48) RGB; the same scene gives the same pixels."""
    rng = random.Random(scene.seed)
    noise = np.random.RandomState(scene.seed)
    canvas = draw_ground(scene, rng, noise)

    def draw(item, cell, alpha=1.0):
        cover = mask(item[1], 3.5 if scene.small else 6.0) * alpha
        x, y = (k * CELL + CELL // 2 + rng.randint(-1, 1) for k in cell)
        paint(canvas, cover, item[0], x, y)

    cells, free = place(prompt, scene, rng)
    for i, (item, cell) in enumerate(zip(scene.objects, cells)):
        if item:
            draw(item, cell)
            if scene.blend and scene.blend[0] == i:
                draw(scene.blend[1], cell, rng.uniform(.4, .6))
    for item, cell in zip(scene.surplus, free):
        draw(item, cell)
    for item, cell in zip(scene.ghosts, free[len(scene.surplus):]):
        draw(item, cell, rng.uniform(*((.3, .9) if item[0] == "white" else (.25, .45))))
    if scene.exposure == "too dark":
        canvas *= .42
    elif scene.exposure == "washed out":
        canvas = canvas * .55 + 135
    if scene.blurry:
        canvas = blur(canvas)
    if scene.noisy:
        canvas = canvas + noise.randn(SIZE, SIZE, 3) * rng.uniform(12, 40)
    return to_image(canvas)


# ------------------------------------------------------------------------------------------------
# the teacher

WEIGHTS = {"A": 5, "D": 4, "B": 3, "C": 1.5}         # people's; a category counts by its sign
MARKS = ["wrong", "partial", "correct"]              # of the levels 0, 1, 2


def content(prompt):
    """The criteria of category A for this prompt; each of two wanted objects is one, by name."""
    if prompt["type"] in PAIR_TYPES:
        names = [" ".join(["the", *filter(None, wanted)]) for wanted in prompt["objects"]]
        if prompt["type"] == "binding":
            names.append("Attribute binding")
        return [*names, "Object count"]
    names = ["Object shape", "Color accuracy"]
    return [*names, "Object count"] if prompt["type"] == "single" else ["Object count", *names]


def rubric(prompt):
    """[(category, its criteria)] for this prompt: the three anchors, and a self-added D where it
    asks for a relation."""
    spread = "Centering" if prompt["type"] == "single" else "Balance"
    categories = [("A. Semantic Alignment", content(prompt)),
                  ("B. Image Quality", ["Clarity", "Exposure", "Artifacts"]),
                  ("C. Aesthetics", [spread, "Background", "Object scale"])]
    if prompt["type"] == "spatial":
        criteria = ["Relation accuracy", "Separation", "Completeness"]
        categories.append(("D. Spatial Relation", criteria))
    return categories


def count_level(num, wanted):
    miss = abs(num - wanted)
    if miss == 0:
        return 2
    return 1 if miss == 1 and num else 0


def facts_of_pair(prompt, scene, blended):
    """[(criterion, text, level)] of category A where two objects are wanted."""
    wanted = prompt["objects"]
    facts = []
    for name, want, got in zip(content(prompt), wanted, scene.objects):
        if got is None:
            facts.append((name, "missing", 0))
        elif got == blended:
            facts.append((name, "unclear", 1))
        else:
            level = (want[0] in (None, got[0])) + (want[1] == got[1])
            facts.append((name, " ".join(got), level))
    kept = all(level == 2 for _, _, level in facts)
    colors = [want[0] for want in wanted]
    swapped = all(scene.objects) and [got[0] for got in scene.objects] == colors[::-1]
    text = "kept" if kept else "swapped" if swapped else "broken"
    return [*facts, ("Attribute binding", text, 2 if kept else 0)]


def facts_of_kind(prompt, scene, blended):
    """[(criterion, text, level)] of category A where objects of one kind are wanted."""
    facts = []
    for k, name in enumerate(["Color accuracy", "Object shape"]):
        kinds = {o[k] for o in scene.visible()}
        if not kinds:
            text = "none"
        elif blended:
            text = "unclear"
        else:
            text = "mixed" if len(kinds) > 1 else kinds.pop()
        facts.append((name, text, 2 if text == prompt["objects"][0][k] else 0))
    return facts


def facts(prompt, scene):
    """{criterion: (what is seen, level 0..2)} of one image."""
    num = len(scene.visible())
    blended = scene.objects[scene.blend[0]] if scene.blend else None
    if prompt["type"] in PAIR_TYPES:
        rows = facts_of_pair(prompt, scene, blended)
        level = count_level(num, 2)
        complete = all(scene.objects)
    else:
        rows = facts_of_kind(prompt, scene, blended)
        level = count_level(num, prompt["count"])
        complete = True
    rows.append(("Object count", NUMBERS[num] if num <= 5 else "many", level))
    related = complete and scene.relation == prompt["relation"]
    text = scene.relation if complete else "unclear"
    rows.append(("Relation accuracy", text, 2 if related else 0))
    out = {name: (f"{text}, {MARKS[level]}", level) for name, text, level in rows}

    def check(name, good, **faults):
        """The first of the faults that is there, else what is good."""
        text = next((text.replace("_", " ") for text, there in faults.items() if there), None)
        out[name] = (text, 0) if text else (good, 2)

    empty = not any(scene.objects)
    check("Clarity", "sharp", blurry=scene.blurry, noisy=scene.noisy)
    check("Exposure", scene.exposure, **{scene.exposure: scene.exposure != "balanced"})
    check("Artifacts", "none", ghosts=scene.ghosts, blended=blended)
    check("Centering", "centered", empty=empty, off_center=scene.off_center)
    out["Balance"] = out["Centering"]
    check("Object scale", "good", empty=empty, too_small=scene.small)
    check("Background", "plain", **{scene.background: scene.background != "plain"})
    check("Separation", "clear gap", unclear=not complete, crowded=scene.crowded)
    check("Completeness", "both present", one_missing=not complete)
    return out


def sign(x):
    return (x > 0) - (x < 0)


def judge_category(name, criteria, facts_1, facts_2, medium):
    """(the category as the verdict holds it, 1, -1 or 0: for the first image, the second, even)."""
    rows = []
    total = 0
    for criterion in criteria:
        lead = facts_1[criterion][1] - facts_2[criterion][1]
        total += lead
        rows.append({"name": criterion, "reason_1": facts_1[criterion][0],
                     "reason_2": facts_2[criterion][0],
                     "score_1": 5 + 2 * lead, "score_2": 5 - 2 * lead})
    side = sign(total)
    winner = winner_name(side, medium)
    reason = "Both are even"
    if side:
        best = max(rows, key=lambda row: (row["score_1"] - 5) * side)
        reason = f"{winner} leads on {best['name']}"
    return {"name": name, "dims": rows, "cat_reason": reason, "cat_winner": winner}, side


def winner_name(side, medium):
    return {1: f"{medium} 1", -1: f"{medium} 2", 0: "Tie"}[side]


def judge_pair(prompt, scene_1, scene_2, rng=None, facts=facts, rubric=rubric, medium=MEDIUM):
    """(verdict as the contract's dict, label) of two scenes; label 1 or 2 is what people prefer, 0
    when they are equal.

    People weigh the categories (WEIGHTS). The teacher writes the same trace, but is imperfect in
    one way, as real teachers are: where quality and aesthetics both speak against the semantically
    better image, it prefers the prettier one in 70 % of the cases (only with an rng: without one it
    agrees with people). Its category verdicts stay right, so the fault is in the last step of the
    reasoning, and traces sampled from its student hold both answers: what DPO on people's labels
    can mend.
    """
    facts_1 = facts(prompt, scene_1)
    facts_2 = facts(prompt, scene_2)
    categories = []
    sides = {}
    for name, criteria in rubric(prompt):
        category, sides[name[0]] = judge_category(name, criteria, facts_1, facts_2, medium)
        categories.append(category)
    people = sign(sum(WEIGHTS[letter] * side for letter, side in sides.items()))
    numbers = {1: 1, -1: 2, 0: "even"}
    reason = ", ".join(f"{letter} {numbers[side]}" for letter, side in sides.items())
    winner = people
    if people and -people in sides.values():
        looks_against = sides["A"] == people and sides["B"] == sides["C"] == -people
        if looks_against and rng is not None and rng.random() < .7:
            winner = -people
        content_decides = winner == people and sides["A"] == people
        reason += ": content decides" if content_decides else ": looks decide"
    verdict = {"categories": categories, "reason": reason, "winner": winner_name(winner, medium)}
    return verdict, {1: 1, -1: 2, 0: 0}[people]


def verdict_text(verdict):
    return json.dumps(verdict, separators=(",", ":"))


SCORE_INSTRUCTION = "Rate the image for: {prompt}"    # a tiny judge's score template


def score_image(prompt, scene):
    """The teacher's rating of one image as text: 1 to 5 for each anchor, from the levels of its
    criteria, and overall by people's weights."""
    levels = facts(prompt, scene)
    scores = {}
    for category, criteria in rubric(prompt):
        mean = sum(levels[name][1] for name in criteria) / len(criteria)
        scores[category[0]] = 1 + 2 * mean
    total = sum(WEIGHTS[k] * score for k, score in scores.items())
    final = total / sum(WEIGHTS[k] for k in scores)
    return (f"Alignment Score (1-5): {scores['A']:.0f}\nCoherence Score (1-5): {scores['B']:.0f}\n"
            f"Style Score (1-5): {scores['C']:.0f}\nFinal Score: {final:.1f}")


def ask_about(scene, rng):
    """(question, answer) about the shapes that are to be seen."""
    visible = scene.visible()
    color = rng.choice(list(COLORS))
    choices = SHAPES
    if visible and rng.random() < .8:
        choices = [shape for _, shape in visible]
    shape = rng.choice(choices)
    colors = [c for c, s in visible if s == shape]
    form = rng.choice(["count", "color", "presence"])
    if form == "color" and len(colors) == 1:
        return f"What color is the {shape}?", colors[0]
    if form == "presence":
        if colors and rng.random() < .5:
            color = rng.choice(colors)
        return f"Is there a {color} {shape}?", "yes" if color in colors else "no"
    return f"How many {shape}s are there?", NUMBERS[len(colors)] if len(colors) < 6 else "many"


# ------------------------------------------------------------------------------------------------
# records

class Records:
    """Toy records of data.py's kinds, media as PIL images, made when asked for: record i is a
    function of (split, kind, seed, i).

    split  train: prompts that are trained on; val, test: held-out prompts; scenes: trained prompts
           in scenes of their own
    kind   trace: the imperfect teacher's verdict as "response"; pair: people's label alone, to
           train on often a hard one; image: a captioned picture for the base generator, 30 % of
           them faulty, 5 % of poor looks; prompt: only the prompt; score, question: traces of one
           image and an "instruction", to be rated or answered in a word
    """

    def __init__(self, split, kind, num, seed=0):
        self.split = split
        self.kind = kind
        self.num = num
        self.seed = seed
        self.world = sys.modules[type(self).__module__]    # whose prompts, scenes and teacher
        kinds = ["trace", "pair", "image", "prompt"]
        if self.world.FRAMES == 1:
            kinds += ["score", "question"]
        if kind not in kinds:
            raise ValueError(f"this toy world has no {kind} records; "
                             f"expected one of {', '.join(kinds)}")

    def __len__(self):
        return self.num

    def draw(self, i):
        """(random generator, prompt) of record i."""
        if not 0 <= i < self.num:
            raise IndexError(i)
        rng = random.Random(f"{self.split} {self.kind} {self.seed} {i}")
        kinds = self.world.KINDS
        if self.kind == "trace":                     # the harder types more often to learn from
            kinds = kinds + self.world.HARD_KINDS
        return rng, self.world.sample_prompt(rng, self.split in ("val", "test"), kinds)

    def scenes(self, i):
        """(prompt, both scenes, verdict, people's label) of pair or trace i; the verdict of a trace
        is the imperfect teacher's."""
        rng, prompt = self.draw(i)
        share = .3 if self.kind == "pair" and self.split == "train" else .05
        hard = rng.random() < share                  # content speaks against looks
        ties = self.kind == "trace" and rng.random() < .1
        teacher_rng = rng if self.kind == "trace" else None
        while True:
            scenes = [self.world.sample_scene(prompt, rng), self.world.sample_scene(prompt, rng)]
            verdict, label = self.world.judge_pair(prompt, *scenes, teacher_rng)
            a, b, c = [category["cat_winner"] for category in verdict["categories"][:3]]
            if hard and not (b == c and "Tie" not in (a, b) and a != b):
                continue
            if label or ties:
                return prompt, scenes, verdict, label

    def __getitem__(self, i):
        if self.kind in ("pair", "trace"):
            return self.compared(i)
        rng, prompt = self.draw(i)
        record = {"prompt": prompt["text"], "type": prompt["type"]}
        if self.kind == "image":
            num_faults = int(rng.random() < .3)
            defects = rng.random() < .05
            scene = self.world.sample_scene(prompt, rng, num_faults, defects)
            record[f"{self.world.MEDIUM.lower()}s"] = [self.world.render(prompt, scene)]
        elif self.kind in ("score", "question"):
            scene = sample_scene(prompt, rng, defects=self.kind == "score")
            record = {"type": self.kind, "images": [render(prompt, scene)]}
            if self.kind == "score":
                record["instruction"] = SCORE_INSTRUCTION.replace("{prompt}", prompt["text"])
                record["response"] = score_image(prompt, scene)
            else:
                record["instruction"], record["response"] = ask_about(scene, rng)
        return record

    def compared(self, i):
        """Record i of a pair or a trace."""
        prompt, scenes, verdict, label = self.scenes(i)
        medium = self.world.MEDIUM
        record = {"prompt": prompt["text"], "type": prompt["type"]}
        record[f"{medium.lower()}s"] = [self.world.render(prompt, scene) for scene in scenes]
        record["winner"] = f"{medium} {label}" if label else "Tie"
        if self.kind == "trace":
            record["response"] = verdict_text(verdict)
        return record
