"""The toy world's imperfect teacher as a judge that knows the scenes behind the pixels:

    python data.py distill out/toy/pairs.jsonl --model tests/toy_teacher.py:teacher ...

It knows the pairs that `python tests/toy.py` writes with --seed 0, and makes them anew until it
comes upon those that it is shown. Whether looks dazzle it (toy_world.judge_pair) is the same every
time that it is shown a pair.
"""
import functools
import random
import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent)
if FOLDER not in sys.path:                           # loaded by data.py's --model
    sys.path.append(FOLDER)

import toy_world

PAIRS = toy_world.Records("train", "pair", 20_000)


@functools.cache
def numbers_of_prompts():
    """{prompt: the numbers of its pairs}."""
    numbers = {}
    for i in range(len(PAIRS)):
        _, prompt = PAIRS.draw(i)
        numbers.setdefault(prompt["text"], []).append(i)
    return numbers


@functools.cache
def images_of(i):
    return [image.tobytes() for image in PAIRS[i]["images"]]


def find_pair(question):
    """(number of the pair, whether its images are swapped). ValueError: it is none of them."""
    images = [question.media_1[0].tobytes(), question.media_2[0].tobytes()]
    for i in numbers_of_prompts().get(question.prompt, []):
        if images_of(i) == images:
            return i, False
        if images_of(i) == images[::-1]:
            return i, True
    raise ValueError(f"a pair for {question.prompt!r} is not in out/toy/pairs.jsonl as `python "
                     "tests/toy.py` writes it with --seed 0, and the toy teacher knows no other: "
                     "pass another --model")


def teacher(questions):
    """Verdicts on Comparisons, as texts."""
    texts = []
    for question in questions:
        i, swapped = find_pair(question)
        prompt, scenes, _, _ = PAIRS.scenes(i)
        if swapped:
            scenes.reverse()
        verdict, _ = toy_world.judge_pair(prompt, *scenes, random.Random(f"teacher {i}"))
        texts.append(toy_world.verdict_text(verdict))
    return texts
