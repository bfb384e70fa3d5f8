"""reward.py: reading verdicts, win rates, advantages, the local judge, the command. CPU, no network."""
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reward
from reward import (Category, Comparison, LocalJudge, Verdict, WinRates, build_messages, format_verdict, group_advantages,
                    instruction, leave_out_video, load_processor, parse_score, parse_verdict, sample_pairs, win_rates)

NAMES = ("A. Semantic Alignment", "B. Image Quality", "C. Aesthetics")


def category(name="A. Semantic Alignment", winner="Image 1", scores=((7, 3), (6, 4), (8, 2))):
    dims = [{"name": f"dim {i}", "reason_1": "red", "reason_2": "blue", "score_1": a, "score_2": b} for i, (a, b) in enumerate(scores)]
    return {"name": name, "dims": dims, "cat_reason": "so", "cat_winner": winner}


def answer(winner="Image 1", **changes):
    return {"prompt": "p", "categories": [category(name) for name in NAMES], "reason": "since", "winner": winner, **changes}


GOOD, OTHER = json.dumps(answer()), json.dumps(answer("Image 2"))
BODY = GOOD[:GOOD.index(', "reason": "since"')]      # everything before the overall reason and winner; the root is still open


# ------------------------------------------------------------------------------------------------ the question

def test_question_fills_only_its_placeholders_and_puts_images_first():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue", "white")]
    messages, images = build_messages(Comparison("a {medium} of {x}", frames[:2], frames[2:]))
    assert images == frames
    assert [part["type"] for part in messages[0]["content"]] == ["image"] * 4 + ["text"]
    text = messages[0]["content"][-1]["text"]
    assert "a {medium} of {x}" in text and "Video 1" in text and "Cinematography" in text and "Image" not in text
    assert "Image Quality" in instruction("p") and '"dims": [{' in instruction("p")
    assert instruction("b", "Image", "{medium}: {prompt} {c}") == "Image: b {c}"
    with pytest.raises(ValueError, match="the text '  ' is empty"):
        instruction("  ")
    with pytest.raises(ValueError, match="no {prompt}"):
        instruction("p", template="judge these")


# ------------------------------------------------------------------------------------------------ the answer

TEXTS = [   # (what the judge said, the winner, categories read)
    (GOOD, 1, 3), (OTHER, 2, 3), (json.dumps(answer("Tie")), 0, 3), (json.dumps(answer(), indent=2), 1, 3),
    # text around
    (f"```json\n{GOOD}\n```", 1, 3), (f"```json\n{OTHER}", 2, 3), (f"Here is it:\n{OTHER}\nThanks.", 2, 3),
    (f"<think>hm, {{maybe}} [1]</think>{GOOD}", 1, 3), (GOOD + "}]", 1, 3), ('He said "see ' + GOOD, 1, 3),
    # commas, raw newlines
    (GOOD[:-1] + ",}", 1, 3), (GOOD.replace("}]", "},]"), 1, 3), (GOOD.replace("so", "so\nand so"), 1, 3),
    (GOOD.replace('"since",', '"since"'), None, 0), (GOOD.replace('}, {"name": "B.', '} {"name": "B.'), None, 0),
    # truncated
    (GOOD[:-1], None, 0), (f"```json\n{OTHER[:-1]}\n```", None, 0), (GOOD[:-2], None, 0), (GOOD[:-11], None, 0), (BODY, None, 0), (BODY[:-40], None, 0),
    (GOOD[:300], None, 0), ('{"winner": "Image 2", "categories": [{"name": "A. Sem', None, 0), ('{"winner": "Ima', None, 0), (BODY + ', "winner": "1', None, 0),
    # the winner's wording
    (json.dumps(answer("1")), 1, 3), (json.dumps(answer(2)), 2, 3), (json.dumps(answer("A")), 1, 3), (json.dumps(answer("b")), 2, 3),
    (json.dumps(answer("image_2")), 2, 3), (json.dumps(answer("**Image 2**.")), 2, 3), (json.dumps(answer("Video 1")), 1, 3),
    (json.dumps(answer("image 1 is better")), 1, 3), (json.dumps(answer("Image 2 is better than Image 1")), 2, 3),
    (json.dumps(answer("The second image")), 2, 3), (GOOD[:-10] + "Image 2}", None, 0), (json.dumps(answer("a tie")), 0, 3),
    # no clear winner
    (instruction("p"), None, 1), (json.dumps(answer("Image 1/2")), None, 3), (json.dumps(answer("not Image 1")), None, 3), (json.dumps(answer("Image 3")), None, 3),
    (json.dumps(answer("Image 1 is worse")), None, 3), (json.dumps(answer("Image 1 is better than Image 1")), None, 3),
    (json.dumps(answer("Image 12")), None, 3), (json.dumps(answer("Image 1 and Image 2")), None, 3), (json.dumps(answer(None)), None, 3),
    (json.dumps(answer(True)), None, 3), (json.dumps(answer(["Image 1"])), None, 3), (json.dumps(answer({"winner": "Image 1"})), None, 3),
    (json.dumps({"prompt": "p", "categories": []}), None, 0), ("Image 1", None, 0), ("", None, 0), ("{}", None, 0), ("null", None, 0),
    # two winners
    (GOOD + "\n" + OTHER, None, 3), (GOOD + GOOD, 1, 3), (GOOD[:-1] + ', "winner": "Image 2"}', None, 3),
    (GOOD[:-1] + ', "winner": "Image 1"}', 1, 3), (GOOD + BODY, None, 0), (GOOD + "\n" + json.dumps(answer(categories=[category()])), 1, 1),  # the last
    # a nested winner is never the root's
    (json.dumps({"verdict": answer()}), None, 0), (json.dumps([answer()]), None, 0), (json.dumps([answer(), answer()]), None, 0), (json.dumps(category()), None, 0),
    (json.dumps({**category(), "winner": "Image 1"}), None, 0), (BODY.replace("cat_winner", "winner") + "}", None, 3),
    (json.dumps({"categories": [{"name": "A", "winner": "Image 1"}], "reason": {"winner": "Image 2"}}), None, 1),
    (json.dumps(answer(reason='so "winner": "Image 2", yes')), 1, 3), (GOOD.replace("since", 'he said "winner": "Image 2" and'), None, 0),
    ('{prompt: x, categories: [{"name": "A", "winner": "Image 1"}], winner: "Image 2"}', None, 0),
    ('{"prompt": "p", categories: [], "winner": "Image 1"}', None, 0), ("{'winner': 'Image 1'}", None, 0), (f"[{GOOD}, {OTHER}]", None, 0),
    ('{verdict: {"winner": "Image 1"}, winner: "Image 2"}', None, 0), ("""{'a': {"winner": "Image 1"}, 'winner': "Image 2"}""", None, 0),
    ("{note} {a b: c} " + GOOD, 1, 3),
    # brackets that do not match: after them a nested winner could pass for the root's
    ('{"categories": [{"name": "A"}}, {"name": "B", "winner": "Image 1"}], "winner": "Image 2"}', None, 0),
    ('{"categories": [{"name": "A", "dims": [{}]], "winner": "Image 1"}', None, 0),
    ('{"categories": [{"name": "A"}}, "winner": "Image 1"}', None, 0), ('{"winner": "Image 1", "categories": [}, "winner": "Image 2"}', None, 0),
    # malformed categories cost themselves only
    (json.dumps(answer(categories=None)), 1, 0), (json.dumps(answer(categories="A")), 1, 0), (json.dumps(answer("Image 2", categories={})), 2, 0),
    (json.dumps(answer(categories=[None, 3, [], {}, {"name": 4}, category(), {"name": "B. x", "dims": [None, "x", {}]}])), 1, 2),
    (GOOD.replace('"since"', "NaN"), 1, 3), (GOOD.replace("7", "1e999"), 1, 3), (GOOD.replace("7", "9" * 5000), 1, 3),
    # UnifiedReward's ranking, image and video, generation and understanding
    ("Image 1 is better than Image 2.", 1, 0), ("**Video 2 is better than Video 1.**", 2, 0), ("Both videos are equally good.", 0, 0),
    ("Image 1 shows 1.5 stars. Image 2 is sharper.\nTherefore, Image 2 is better than Image 1.", 2, 0), ("The second response is better.", 2, 0),
    ("Answer 1 is better", 1, 0), ("Conclusion: Image 1 is slightly better than Image 2", 1, 0), ("Both images are equally bad", 0, 0),
    ("Image 1 is better than Image 2. Image 2 is better than Image 1.", None, 0), ("Image 1 is not better than Image 2.", None, 0),
    ("If the star counts, Image 1 is better than Image 2", None, 0), ("Is Image 1 better than Image 2?", None, 0), ("Image 1 is better than Image 1.", None, 0),
    ("Image 1 is better aligned, Image 2 looks better", None, 0), ("I cannot say that\nwhether Image 1 is better", None, 0),
    # UnifiedReward-Think
    ("<think>Image 2 is better than Image 1. No.</think><answer>Image 1 is better</answer>", 1, 0), ("<answer>Video 2 is better</answer>", 2, 0),
    ("<think>1. Semantic consistency:\n  Image 1 (9/10) - all there;\n  Image 2 (4/10) - no star\n2. Style: \n Image 1 (5/10) - flat;\n Image 2 (6/10) - rich\n"
     "Total score:\nImage 1: 9+5=14\nImage 2: 4+6=10\n</think>\n<answer>Image 1 is better</answer>", 1, 0),
    ("<think>Image 1 is better.", None, 0), ("<think>x</think><answer>Image 1 is bet", None, 0), ("<answer>Image 1</answer><answer>Image 2</answer>", None, 0),
    ("<answer>Image 1 or Image 2</answer>", None, 0), ("<answer></answer>Image 1 is better.", None, 0), ("<answer>2</answer>", 2, 0),
    # thinking is no answer; a section's winner is not the overall one
    ('<think>{"winner": "Image 1"} hm no</think><answer>Image 2 is better</answer>', 2, 0), ('<think>Draft: {"winner": "Image 1"} but', None, 0),
    ("<think>say <answer>Image 1 is better</answer></think>Image 2 is better.", 2, 0), (f"<think>{'[1] ' * 30}{{x}}</think>{GOOD}", 1, 3), ("[1] {x} " * 30 + GOOD, 1, 3),
    ("**Semantic**\nImage 1 is better.\n\n**Overall**\nImage 2 is better because it shows the star.", None, 0),
    ("Image 1 is better; however Image 2 is best overall", None, 0), ("Image 1 is better? No, I prefer Image 2.", None, 0),
    ('"Image 1 is better." is false.', None, 0), ("I cannot say that\nImage 1 is better.", None, 0), ("Style:\nTie\nOverall, Image 2 is a bit better.", None, 0),
    ("Image 2 fits better.\n\nOverall\nImage 1 is better than Image 2.", 1, 0),
    ('{"name": "A. Semantic", "winner": "Image 1"}\n{"name": "B", "winner": "Image 1"}\nOverall winner: Image 2', None, 0),
    ('{"name": "B", "winner": "Image 1"}], "winner": "Image 2"}', None, 0), ('{"winner": "Image 1" "x": 1, "winner": "Image 2"}', None, 0),
    ('{"winner": "Image 1', None, 0), ('{"winner": "Image 1"', None, 0),
    (reward.Failure("Image 1 is better than Image 2."), None, 0), (reward.Failure(GOOD), None, 0),
]


@pytest.mark.parametrize("text,winner,num_categories", TEXTS)
def test_parse(text, winner, num_categories):
    verdict = parse_verdict(text)
    assert (verdict.winner, len(verdict.categories)) == (winner, num_categories), verdict.issues
    assert verdict.text == text and isinstance(format_verdict(verdict, "p"), str)
    strict = text in (GOOD, OTHER, json.dumps(answer("Tie")), json.dumps(answer(), indent=2)) and not isinstance(text, reward.Failure)
    assert not verdict.issues or not strict
    assert verdict.issues or winner is not None


def damage(draw, text):
    """One thing that models and transports do to a text."""
    kind = draw(st.sampled_from(["cut", "drop", "insert", "repeat", "case", "fence", "around"]))
    i, j = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
    if kind == "cut":
        return text[:i]
    if kind == "drop":
        return text[:i] + text[min(j, i + 20):]
    if kind == "insert":
        return text[:i] + draw(st.sampled_from(['"', "{", "}", "[", "]", ",", "\\n", "\\", ":", "null", "Image", "winner", "not "])) + text[i:]
    if kind == "repeat":
        return text[:i] + text[i:min(j, i + 40)] + text[i:]
    return {"case": text.lower(), "fence": f"```json\n{text}\n```", "around": f"I think {{so}}. {text} That is all."}[kind]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_verdict_gives_the_true_winner_or_none(data):
    said = data.draw(st.sampled_from(["Image 1", "Image 2", "Video 2"]))
    others = [data.draw(st.sampled_from(["Image 1", "Image 2", "Tie"])) for _ in NAMES]
    text = json.dumps(answer(said, categories=[category(name, w) for name, w in zip(NAMES, others)]))
    for _ in range(data.draw(st.integers(1, 3))):
        text = damage(data.draw, text)
    assert parse_verdict(text).winner in (None, int(said[-1])), text


SCORES = [  # (text, value)
    ("Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 3", 3.5), ("Final Score: 4", 4), ("**Final Score:** 3.5/5", 3.5),
    ("a red circle (object): 1\nred (attribute): 0\nFinal Score: 2", 2), ("visual quality: 4\ntemporal consistency: 3\ndynamic degree: 3\nFinal Score: 6", 6),
    ("The answer is helpful.\nFinal Score: 87", 87), ("Alignment Score (1-5): 4\nCoherence (Physics) Score (1-5): 2", 3), ("final score (1-5): 3", 3),
    ("Final Score: 3\nFinal Score: 4", None), ("Final Score: 3. Indeed Final Score: 3", 3), ("Final Score: 1-5", None), ("Final Score: x", None),
    ("Final Score: 123456789", None), ("Final Score:", None), ("", None), ("Final Score: nan", None), ("4", None), ("Final Score: -1.5", -1.5),
    ("Final Score: x\nStyle Score (1-5): 3", None), ("a red circle (object): 1\nred (attribute): 0", None), ("Seed: 1999", None),
    ("Alignment Score (1-5): 4\nNumber of stars: 12", 4), ("Alignment Score (1-5): 4, good\nStyle Score (1-5): 2", None),
    ("Style Score (1-5): 2\nStyle Score (1-5): 4", None), ("Final Score: 1 to 5", None), ("Final Score: 1–5", None), ("Final Score: 3,5", None),
    ("<think>Perhaps Final Score: 2, but", None), ("<think>Final Score: 2</think>Final Score: 5", 5),
    ("<think>Final Score: 2.</think>Style Score (1-5): 5", 5), ("Final Score: 4 - good", 4), (reward.Failure("Final Score: 4"), None)]


@pytest.mark.parametrize("text,value", SCORES)
def test_scores_by_themselves(text, value):
    assert parse_score(text) == value


def test_parse_keeps_every_field():
    verdict = parse_verdict(GOOD)
    assert [c.name for c in verdict.categories] == list(NAMES) and [c.anchor for c in verdict.categories] == ["A", "B", "C"]
    dim = verdict.categories[2].criteria[1]
    assert (dim.name, dim.reason_1, dim.reason_2, dim.score_1, dim.score_2) == ("dim 1", "red", "blue", 6, 4)
    assert (verdict.categories[0].reason, verdict.categories[0].winner, verdict.reason, verdict.issues) == ("so", 1, "since", [])
    tree = format_verdict(verdict, "a red circle")
    assert all(part in tree for part in ("a red circle", *NAMES, "dim 1", "6 : 4", "red", "blue", "1 wins", "since"))


@pytest.mark.parametrize("name,anchor", [
    ("A. Semantic Alignment", "A"), ("B. Image Quality", "B"), ("C. Aesthetics", "C"), ("D. Spatial Relation", None),
    *((name, name[0]) for names in reward.ANCHORS.values() for name in names), ("D. Narrative & Interaction", None),
    ("A: Semantic", "A"), ("**B** - Quality", "B"), ("c) Looks", "C"), ("B", "B"), ("Category A: Semantics", "A"),
    ("Semantic Alignment", "A"), ("Image Quality & Realism", "B"), ("Aesthetics", "C"), ("1. Aesthetics & Artistry", "C"),
    ("Narrative & Interaction", None), ("D. Semantic Extras", None), ("Semantic Aesthetics", None), ("overall", None), ("", None)])
def test_anchor_by_letter_then_keyword(name, anchor):
    assert reward.read_anchor(name) == anchor


@pytest.mark.parametrize("issue,text", [
    ("text around", f"x {GOOD}"), ("a comma too much", GOOD[:-1] + ",}"), ("missing", json.dumps(answer(categories=[]))),
    ("are not 10", json.dumps(answer(categories=[category(scores=((7, 7),))]))),
    ("score is missing", GOOD.replace("7,", "null,")), ("against its own scores", json.dumps(answer(categories=[category(winner="Image 2")]))),
    ("cat_winner", json.dumps(answer(categories=[category(winner="Image 1/2")]))), ("comes twice", GOOD.replace("B. Image Quality", "A. again")),
    ("not an object with a name", json.dumps(answer(categories=[7]))), ("expected one", GOOD + GOOD)])
def test_issues_are_recorded_and_not_fatal(issue, text):
    verdict = parse_verdict(text)
    assert verdict.winner == 1 and any(issue in line for line in verdict.issues), verdict.issues
    assert issue in format_verdict(verdict, "p")


def test_json_that_is_not_repaired_is_undecided_and_says_why():
    for text in (GOOD.replace("since", 'a "quoted" word'), GOOD[:-1], GOOD.replace('"since",', '"since"')):
        verdict = parse_verdict(text)
        assert verdict.winner is None and verdict.issues[0].startswith("unreadable JSON: ") and "unreadable JSON" in format_verdict(verdict, "p")


def test_no_text_raises_and_time_is_linear():
    rng = random.Random(0)
    pieces = ['{', '}', '[', ']', '"', '\\', ',', ':', ' ', '"winner"', '"Image 1"', '"categories"', 'é', '\ud800', '1', 'null', "\n"]
    for _ in range(3000):
        parse_verdict("".join(rng.choices(pieces, k=rng.randrange(60))))
        spoiled = list(GOOD)
        for _ in range(rng.randrange(1, 8)):
            spoiled[rng.randrange(len(spoiled))] = rng.choice(pieces)
        parse_verdict("".join(spoiled))
    words = ["Image 1 is better ", "Image 1 is much ", "<answer>", "<think>", "</think>", "Final Score: ", "Final Score (1-5)", "1. a:\n", "a: 1\n", "a" * 60 + ":",
             "\n", ". ", "1. a:\n Image 1 (9/10)", " " * 25 + "a:", "Style Score (1-5): ", "so, "]
    for text in [word * (100_000 // len(word)) for word in words]:
        start = time.perf_counter()
        assert parse_verdict(text).winner is None and parse_score(text) is None
        assert time.perf_counter() - start < 1.0, text[:20]
    hard = ["{", "}", '"', "[", "1", "{}", '{"a":', "{1,", "[{", '\\"', '{"', "1 ", " ", '{"winner": ', ", ", "{\n\n\n", "{a", "{a ", "{aaaaaaaa\n\n"]
    for text in [piece * (100_000 // len(piece)) for piece in hard] + ["{" + "a" * 100_000, "{a" + " " * 100_000, '{"winner":' + "9" * 100_000, '{"winner": "' + "\\" * 100_001]:
        start = time.perf_counter()
        assert parse_verdict(text).winner is None
        assert time.perf_counter() - start < 1.0, text[:10]     # tens of milliseconds on an idle core; quadratic takes minutes
    assert parse_verdict('{"a": ' + "[" * 1000 + "]" * 1000 + ', "winner": "Image 1"}').winner in (None, 1)         # as deep as json goes


# ------------------------------------------------------------------------------------------------ the arithmetic

def verdict(winner, **anchors):
    return Verdict(winner, [Category(name, name if name in "ABC" else None, winner=won) for name, won in anchors.items()])


def test_sample_pairs():
    rng = random.Random(0)
    for num_items, pairs, each in [(9, "all", 8), (9, "ring:2", 4), (8, "ring:3", 6), (8, "ring:4", 7), (9, "ring:4", 8), (2, "ring:1", 1)]:
        chosen = sample_pairs(num_items, pairs, rng)
        assert len({frozenset(pair) for pair in chosen}) == len(chosen) == num_items * each / 2
        assert all(sum(i in pair for pair in chosen) == each for i in range(num_items))
    firsts = [a < b for _ in range(200) for a, b in sample_pairs(8, "all", rng)]         # 5600 coins: sd .0067
    assert abs(sum(firsts) / len(firsts) - 0.5) < 0.03
    assert sample_pairs(6, "ring:2", random.Random(3)) == sample_pairs(6, "ring:2", random.Random(3))
    assert {frozenset(p) for p in sample_pairs(9, "ring:2", rng)} != {frozenset(p) for p in sample_pairs(9, "ring:2", rng)}
    for num_items, pairs, words in [(9, "ring:5", "K from 1 to 4"), (9, "ring:0", "K from 1"), (9, "ring:-1", "expected"),
                                    (9, "some", "expected 'all', of 2 or more, or 'ring:K'"), (1, "all", "of 2 or more")]:
        with pytest.raises(ValueError, match=words):
            sample_pairs(num_items, pairs, rng)


PAIRS = [(0, 1), (2, 0), (1, 2)]
VERDICTS = [verdict(1, A=1, B=1, C=0, D=2), verdict(2, A=1, B=2, C=2), verdict(0, A=1, B=1, C=None)]


def test_win_rates_by_hand():
    rates = win_rates(PAIRS, VERDICTS, 3)
    # overall  0 beats 1, 0 beats 2, 1 ties 2:          0: 2/2        1: (0 + .5)/2     2: (0 + .5)/2
    # A        0 beats 1, 2 beats 0, 1 beats 2:         all 1/2
    # B        0 beats 1, 0 beats 2, 1 beats 2:         1, 1/2, 0
    # C        0 ties 1, 0 beats 2, 1-2 unreadable:     (.5 + 1)/2, .5/1, 0/1
    assert rates.overall.tolist() == [1, .25, .25]
    assert {name: rate.tolist() for name, rate in rates.anchors.items()} == {"A": [.5, .5, .5], "B": [1, .5, 0], "C": [.75, .5, 0]}
    assert rates.category.tolist() == pytest.approx([2.25 / 3, 1.5 / 3, .5 / 3])
    assert list(rates.counts.values()) == [3, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="3 pairs but 2 verdicts"):
        win_rates(PAIRS, VERDICTS[:2], 3)


def test_category_order_and_duplicates_do_not_matter():
    turned = [Verdict(v.winner, v.categories[::-1]) for v in VERDICTS]
    again = [Verdict(v.winner, v.categories + [Category("B. again", "B", winner=2)]) for v in VERDICTS]     # the first B counts
    for other in (turned, again):
        assert torch.equal(win_rates(PAIRS, other, 3).category, win_rates(PAIRS, VERDICTS, 3).category)


def test_undecided_is_left_out_and_not_half_a_win():
    pairs, verdicts = PAIRS + [(0, 3), (3, 1)], VERDICTS + [verdict(None, A=1), verdict(None)]
    rates = win_rates(pairs, verdicts, 4)
    assert rates.overall[:3].tolist() == [1, .25, .25] and rates.anchors["A"][0] == .5
    assert rates.overall[3].isnan() and rates.category[3].isnan() and rates.counts["undecided"] == 2
    advantages = group_advantages(rates)
    assert advantages[3] == 0 and torch.equal(advantages[:3], group_advantages(win_rates(PAIRS, VERDICTS, 3)))


def rates_of(overall, category):
    return WinRates(torch.tensor(overall), torch.tensor(category), {}, {})


def test_advantages_by_hand():
    # overall 1, .5, 0: mean .5, unbiased std sqrt((.25 + 0 + .25) / 2) = .5, z = 1, 0, -1
    # category 0, 0, 1: mean 1/3, unbiased std sqrt((1/9 + 1/9 + 4/9) / 2) = sqrt(1/3), z = -1/sqrt 3, -1/sqrt 3, 2/sqrt 3
    rates, s = rates_of([1., .5, 0.], [0., 0., 1.]), 1 / math.sqrt(3)
    for alpha, expected in [(0, [1, 0, -1]), (1, [-s, -s, 2 * s]), (.3, [.7 - .3 * s, -.3 * s, -.7 + .6 * s])]:
        assert group_advantages(rates, alpha).tolist() == pytest.approx(expected, abs=1e-6)
    assert group_advantages(rates, 0, std_floor=2.).tolist() == pytest.approx([.25, 0, -.25])
    assert group_advantages(rates).tolist() == group_advantages(rates, .7).tolist()


def test_dead_sides_are_exactly_zero_and_missing_sides_are_left_out():
    nan = math.nan
    assert group_advantages(rates_of([.3] * 8, [.1] * 8)).tolist() == [0] * 8
    assert group_advantages(rates_of([1., .5, 0.], [.1, .1, .1]), .7).tolist() == pytest.approx([.3, 0, -.3])       # one side dead
    assert group_advantages(rates_of([1., .5, 0.], [nan] * 3), .7).tolist() == pytest.approx([1, 0, -1])             # one side missing
    assert group_advantages(rates_of([nan] * 3, [nan] * 3)).tolist() == [0] * 3
    assert group_advantages(rates_of([1., nan, 0.], [1., nan, 0.])).tolist() == pytest.approx([.5 ** .5, 0, -.5 ** .5])
    # item 0 has R_A, R_B, R_C = 0, .2, 1 and item 1 has .4, .4, .4: the same mean on paper, not in floating point
    zero, one = [(2, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 1), (2, 2, 1)], [(1, 1, 1)] * 2 + [(2, 2, 2)] * 3
    rates = win_rates([(i, j) for i in (0, 1) for j in range(2, 7)], [verdict(0, A=a, B=b, C=c) for a, b, c in zero + one], 7)
    assert (0 + .2 + 1) / 3 != (.4 + .4 + .4) / 3 and rates.category[0] == rates.category[1]


def test_random_order_removes_what_position_bias_gives_to_an_index():
    rng, num_items, totals = random.Random(0), 6, {"random": torch.zeros(6), "fixed": torch.zeros(6)}
    for _ in range(300):                                        # a judge that names the first image in 3 of 4 cases, whatever it shows
        for order, total in totals.items():
            pairs = sample_pairs(num_items, "all", rng)
            pairs = pairs if order == "random" else [tuple(sorted(pair)) for pair in pairs]
            total += group_advantages(win_rates(pairs, [verdict(1 if rng.random() < .75 else 2) for _ in pairs], num_items)) / 300
    assert totals["random"].abs().max() < 0.2                   # sd of a mean of 300: .055
    assert totals["fixed"][0] > 0.7 and totals["fixed"][5] < -0.7


# ------------------------------------------------------------------------------------------------ the judge

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a random Qwen3-VL of 40k parameters with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    special = ["<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    bytes_only.pre_tokenizer, bytes_only.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytes_only.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    chat = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
            "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, rope_parameters=rope, initializer_range=.3, attention_dropout=.5),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8, temporal_patch_size=1,
                           spatial_merge_size=2, out_hidden_size=32, num_position_embeddings=9, deepstack_visual_indexes=[0]),
        **{f"{name}_token_id": special.index(f"<|{token}|>") for name, token in [
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")]})
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    pixels = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=1, size={"shortest_edge": 576, "longest_edge": 576})
    leave_out_video()
    folder = tmp_path_factory.mktemp("tiny")
    for part in (model, Qwen3VLProcessor(image_processor=pixels, tokenizer=tokenizer, chat_template=chat)):
        part.save_pretrained(folder)
    return folder


def picture(color):
    return Image.new("RGB", (24, 24), color)


QUESTIONS = [Comparison("a red circle" + " and a star" * i, [picture(("red", "blue")[i % 2])], [picture((9 * i, 80, 30))]) for i in range(5)]
QUESTIONS.append(Comparison("a video", [picture("red"), picture("blue")], [picture("green"), picture("white")]))
TEMPLATE = "{medium}: {prompt}"


def test_batched_greedy_answers_equal_single_ones_and_gradients_flow(tiny):
    judge = LocalJudge(tiny, device="cpu", template=TEMPLATE, batch_size=4, max_new_tokens=12)
    model = judge.model
    texts = judge(QUESTIONS)
    assert texts == [judge([question])[0] for question in QUESTIONS]
    assert len(set(texts)) == len(texts)                        # they depend on the question, so a lost order would show
    assert judge(QUESTIONS) == texts and judge(QUESTIONS, temperature=1.0) != texts
    inputs = judge.processor(text=["<|vision_start|><|image_pad|><|vision_end|>go"], images=[picture("red")], return_tensors="pt")
    model(**inputs).logits.sum().backward()                     # no inference tensor is left behind in the model
    assert model.model.visual.patch_embed.proj.weight.grad is not None


def test_generation_stops_at_the_tokenizers_eos(tiny):
    judge = LocalJudge(tiny, device="cpu", template=TEMPLATE, max_new_tokens=12)
    text, = judge(QUESTIONS[:1])
    judge.processor.tokenizer.eos_token = judge.processor.tokenizer.tokenize(text)[3]
    assert text.startswith(judge(QUESTIONS[:1])[0]) and len(judge(QUESTIONS[:1])[0]) < len(text)


def test_saved_judge_answers_the_same_and_keeps_its_template(tiny, tmp_path):
    first = LocalJudge(tiny, device="cpu", template=TEMPLATE, max_new_tokens=12)
    first.model.save_pretrained(tmp_path / "a")
    first.processor.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "template.txt").write_text(TEMPLATE)
    judge = LocalJudge(tmp_path / "a", device="cpu", max_new_tokens=12)
    assert judge(QUESTIONS) == first(QUESTIONS)
    saved = json.loads((tmp_path / "a" / "processor_config.json").read_text())              # what a machine with torchvision reads
    assert saved["processor_class"] == "Qwen3VLProcessor" and "video_processor" in saved


@pytest.mark.parametrize("stock,video", [("Qwen2VLProcessor", None), ("Qwen2_5_VLProcessor", None), ("Qwen3VLProcessor", {"fps": 3})])
def test_processor_folders_of_published_models_load(tiny, tmp_path, stock, video):
    """The older layout of hub repositories: preprocessor_config.json, sometimes video_preprocessor_config.json."""
    processor = load_processor(tiny)
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink(missing_ok=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))
    pixels = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": stock, "patch_size": 8, "merge_size": 2,
              "temporal_patch_size": 1, "min_pixels": 576, "max_pixels": 576}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    if video:
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    for folder in (tmp_path, tmp_path / "again"):
        loaded = load_processor(folder)
        assert type(loaded).__name__ == stock and loaded.chat_template == processor.chat_template
        text, image = "<|vision_start|><|image_pad|><|vision_end|>", picture("red")
        ours, theirs = (p(text=[text], images=[image], return_tensors="pt") for p in (processor, loaded))
        assert torch.equal(ours["input_ids"], theirs["input_ids"]) and torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
        loaded.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again" / "processor_config.json").read_text())
        assert saved["processor_class"] == stock and "video_processor" in saved


# ------------------------------------------------------------------------------------------------ the command

def test_command_and_its_errors(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture("red").save("a.png"), picture("blue").save("b.png"), Path("c.png").write_text("no image")
    for argv, words in [(["a.png", "b.png", "--prompt", "x"], "no judge in out/judge-dpo/model: train one"), (["a.png", "c.png", "--prompt", "x"], "c.png: not a readable"),
                        (["a.png", "d.png", "--prompt", "x"], "d.png"),
                        (["a.png", "b.png", "--prompt", " "], "the text ' ' is empty"),
                        (["a.png", "b.png", "--prompt", "x", "--template", "none.txt"], "none.txt")]:
        with pytest.raises(SystemExit, match=words):
            reward.main(argv)
    shutil.copytree(tiny, "out/judge-dpo/model")
    Path("t.txt").write_text(TEMPLATE)
    reward.main(["a.png", "b.png", "--prompt", "x", "--template", "t.txt", "--max-new-tokens", "4"])
    assert "overall: undecided" in capsys.readouterr().out
    monkeypatch.setattr(LocalJudge, "__call__", lambda judge, comparisons: [GOOD])
    reward.main(["a.png", "b.png", "--prompt", "x"])
    notice, said = capsys.readouterr().out.split("\n", 1)
    assert "no template.txt in out/judge-dpo/model" in notice
    assert said.strip() == format_verdict(parse_verdict(GOOD), "x")
