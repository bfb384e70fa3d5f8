"""The toy world: what is held out, what the teacher says, what the oracle sees, what would be noticed as drift."""
import json
import random

import numpy as np
import pytest

import toy_world as W
from reward import parse_score, parse_verdict


def test_held_out_prompts_are_never_trained_on_and_every_word_is():
    rng = random.Random(0)
    train, held = ({W.sample_prompt(rng, h)["text"] for _ in range(6000)} for h in (False, True))
    assert not train & held and .15 < len(held) / len(train | held) < .35
    assert {w for t in held for w in t.split()} <= {w for t in train for w in t.split()}


def test_records_are_functions_of_their_place():
    records = W.Records("train", "trace", 5, seed=1)
    one, again, other = records[3], W.Records("train", "trace", 9, seed=1)[3], W.Records("val", "trace", 5, seed=1)[3]
    assert one["response"] == again["response"] and one["images"][0].tobytes() == again["images"][0].tobytes()
    assert one["response"] != other["response"]


def test_traces_keep_the_contract():
    dazzled = 0
    for record in W.Records("train", "trace", 200):
        verdict, raw = parse_verdict(record["response"]), json.loads(record["response"])
        people = {"Image 1": 1, "Image 2": 2, "Tie": 0}[record["winner"]]
        assert not [i for i in verdict.issues if "sum" in i] and {c.anchor for c in verdict.categories} >= {"A", "B", "C"}
        assert all(3 <= len(c.dims) <= 5 and all(d.score_1 + d.score_2 == 10 for d in c.dims) for c in verdict.categories)
        assert ("D. Spatial Relation" in [c.name for c in verdict.categories]) == (record["type"] == "spatial")
        if verdict.winner != people:                 # the teacher's one fault, by its description
            signs = [c["cat_winner"] for c in raw["categories"]]
            assert signs[1] == signs[2] == raw["winner"] and signs[0] == record["winner"] and "looks decide" in raw["reason"]
            dazzled += 1
    assert .02 < dazzled / 200 < .15


def test_people_prefer_content_over_looks():
    prompt = dict(type="single", objects=[("red", "circle")], count=1, relation=None, text="a red circle")
    right = W.Scene([("red", "circle")], "left", 0, blurry=True, small=True)
    wrong = W.Scene([("blue", "star")], "left", 0)
    assert W.judge_pair(prompt, right, wrong)[1] == 1 and W.judge_pair(prompt, wrong, right)[1] == 2
    assert W.judge_pair(prompt, right, right)[1] == 0


def test_oracle_agrees_with_the_scenes():
    rng, hits, n = random.Random(3), 0, 300
    for _ in range(n):
        prompt = W.sample_prompt(rng)
        scene = W.sample_scene(prompt, rng, defects=rng.random() < .5)
        seen = W.facts(prompt, scene)
        names = W.content(prompt) + ["Relation accuracy"] * (prompt["type"] == "spatial")
        hits += W.success(prompt, W.render(prompt, scene)) == all(seen[name][1] == 2 for name in names)
    assert hits / n > .95


@pytest.mark.parametrize("change, measure", [(dict(background="tinted"), "cast"), (dict(background="tiled"), "tiles"),
                                             (dict(noisy=True), "noise"), (dict(blurry=True), "edge")])
def test_picture_stats_notice_drift(change, measure):
    rng, plain, drifted = random.Random(1), [], []
    for _ in range(30):
        prompt = W.sample_prompt(rng)
        scene = W.sample_scene(prompt, rng, 0, defects=False)
        plain.append(W.render(prompt, scene))
        for name, value in change.items():
            setattr(scene, name, value)
        drifted.append(W.render(prompt, scene))
    before, after = W.picture_stats(plain)[measure], W.picture_stats(drifted)[measure]
    assert after < .7 * before if measure == "edge" else after > before + 2


def test_a_faint_green_patchwork_is_noticed():
    """The drift an earlier sketch fell to: cells of the ground alternate by 8 grey levels in the red and blue channels."""
    rng = random.Random(2)
    images = [W.render(p, W.sample_scene(p, rng, 0, defects=False)) for p in (W.sample_prompt(rng) for _ in range(20))]
    board = np.indices((3, 3)).sum(0) % 2
    cast = np.kron(board, np.ones((16, 16)))[..., None] * np.array([8, 0, 8])
    tiled = [np.clip(np.asarray(i, float) - cast, 0, 255).astype(np.uint8) for i in images]
    before, after = W.picture_stats(images), W.picture_stats(tiled)
    assert after["tiles"] > before["tiles"] + 2


def test_scores_and_answers_by_hand():
    """Of a green circle where a red one above a blue square was wanted: the shape is right and so is the square, the relation holds."""
    prompt = dict(type="spatial", objects=[("red", "circle"), ("blue", "square")], count=1, relation="above", text="a red circle above a blue square")
    scene = W.Scene([("green", "circle"), ("blue", "square")], "above", 0, blurry=True)
    # levels A: 1, 2, 2 of 2; B: 0, 2, 2; C: 2, 2, 2; D: 2, 2, 2, so 4.33, 3.67, 5, 5, and (5 * 4.33 + 3 * 3.67 + 1.5 * 5 + 4 * 5) / 13.5 = 4.457
    text = W.score_image(prompt, scene)
    assert text == "Alignment Score (1-5): 4\nCoherence Score (1-5): 4\nStyle Score (1-5): 5\nFinal Score: 4.5" and parse_score(text).value == 4.5
    said = {W.ask_about(scene, random.Random(i)) for i in range(300)}
    assert {("How many circles are there?", "one"), ("How many stars are there?", "none"), ("What color is the square?", "blue"),
            ("Is there a green circle?", "yes"), ("Is there a red circle?", "no")} <= said
    assert len(dict(said)) == len(said)              # a question has one answer
    with pytest.raises(ValueError, match="this toy world has no preference records; expected one of trace, pair"):
        W.Records("train", "preference", 1)
