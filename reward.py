"""Verdicts as rewards: ask a vision-language judge which of two images or videos is better, read its JSON verdict, and turn the
verdicts on a group into win rates and advantages (UnifiedReward-Flex, arXiv 2602.02380). It imports nothing of ours: copy it anywhere.

    python reward.py A.png B.png --prompt "a red circle above a blue square"      the verdict as a tree; seconds on a CPU
    python reward.py rank 1.png 2.png 3.png --prompt "..." --html report.html     a group: win rates and advantages
    python reward.py eval pairs.jsonl --judge http://localhost:8000               a judge's exam on labelled pairs
    python reward.py score A.png B.png --prompt "..."                             each by itself

Shapes: G items of one prompt, B items in all, D anchors (A, B, C), T tokens.
"""
import argparse
import base64
import contextlib
import html
import inspect
import io
import json
import math
import os
import random
import re
import runpy
import sys
import threading
import time
import urllib.request
from collections import namedtuple
from concurrent import futures
from pathlib import Path

import torch
from PIL import Image, ImageSequence
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------ the question
ANCHORS = {"Image": ("A. Semantic Alignment & Accuracy", "B. Image Quality & Realism", "C. Aesthetics & Artistry"),
           "Video": ("A. Semantic Alignment & Accuracy", "B. Video Quality & Dynamic Realism", "C. Narrative, Aesthetics & Cinematography")}
TEMPLATE = """\
Two candidates were generated for the same prompt. {medium} 1 is shown first, {medium} 2 second. Decide which one serves the \
prompt better, and show how you got there.

Prompt: {prompt}

Judge under these three categories, always and in this order:
{anchors}
You may add one category "D. ..." of your own when this prompt calls for a criterion that the three do not hold.

In every category pick 3 to 5 sub-dimensions that matter for this prompt and these candidates. For each, write what you see in \
{medium} 1 and in {medium} 2, then share 10 points between them: score_1 + score_2 = 10. Then say in one or two sentences who \
wins the category: "{medium} 1", "{medium} 2", or "Tie" when nothing separates them. Last, weigh the categories by what the \
prompt asks for and name one overall winner. Your winners must agree with your scores and reasons.

Answer with one JSON object and nothing else:
{"prompt": "...", "categories": [{"name": "A. ...", "dims": [{"name": "...", "reason_1": "...", "reason_2": "...", \
"score_1": 6, "score_2": 4}], "cat_reason": "...", "cat_winner": "{medium} 1, {medium} 2 or Tie"}], "reason": "...", \
"winner": "{medium} 1 or {medium} 2"}"""
SCORE_TEMPLATE = """\
Rate this {medium} that was generated for a prompt. Prompt: {prompt}

Say briefly what agrees with the prompt and what does not, then end with these lines, each with one number:
Alignment Score (1-5): how well it shows what the prompt asks for
Coherence Score (1-5): how free of defects and how plausible it is
Style Score (1-5): how good it looks
Final Score: your overall rating from 1 to 5"""
# The questions to a judge. A medium is a list of PIL images: one for an image, the sampled frames for a video.
Comparison = namedtuple("Comparison", "prompt media_1 media_2")         # which one is better?
Candidate = namedtuple("Candidate", "prompt media")                     # how good is it by itself?


def instruction(prompt, medium="Image", template=TEMPLATE):
    """The text of the question. `template` holds {prompt}, and {medium} and {anchors} if it likes; other braces stay as they are,
    those of the prompt too. ValueError: an empty prompt, a template without {prompt}."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; the judge needs the text that both candidates were generated from")
    if "{prompt}" not in template:
        raise ValueError("the template has no {prompt}; put {prompt} where the text of the prompt belongs")
    return template.replace("{anchors}", "\n".join(ANCHORS[medium])).replace("{medium}", medium).replace("{prompt}", prompt)


def build_messages(question, template=None):
    """(messages, images): one user message in the chat format of transformers, all images first and the text last, and the flat list
    of its PIL images. Training and judging share it, so the wording is one. A candidate of several frames makes it a Video."""
    prompt, *media = question
    images = [image for medium in media for image in medium]
    text = instruction(prompt, "Video" if max(map(len, media)) > 1 else "Image", template or (TEMPLATE if len(media) == 2 else SCORE_TEMPLATE))
    return [{"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]}], images


def chat_text(processor, messages):
    """The prompt of the model as text, up to where its answer begins; a template that can think is told not to."""
    thinking = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **thinking)


def find_medium(item, folder):
    """The path of the medium that a record in a file in `folder` names, or its data URL as it is. ValueError: a web address, no such file."""
    if item.startswith("data:"):
        return item
    if "://" in item:
        raise ValueError(f"{item[:100]} is a URL. Download it and name the file.")
    if not os.path.exists(Path(folder, item)):
        raise ValueError(f"{Path(folder, item)} does not exist. Paths are relative to the JSONL file.")
    return Path(folder, item)


def load_media(item, num_frames=8):
    """A list of PIL images: one of an image file or a data URL; up to `num_frames`, sampled uniformly, of a GIF, an mp4 (or what else `av`
    reads), a folder of frames or a list of them in memory, where an image may be, too. ValueError names what cannot be read."""
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")

    def sample(num):                                                            # which of num frames
        return torch.linspace(0, num - 1, min(num, num_frames), dtype=torch.float64).round().int().tolist()

    if isinstance(item, (Image.Image, list)):
        return [item[i] for i in sample(len(item))] if isinstance(item, list) else [item]
    text, path, kind = str(item), Path(item), Path(item).suffix.lower()
    try:
        if text.startswith("data:"):
            text, data = f"{text[:40]}...", base64.b64decode(text.partition(",")[2], validate=True)
            frames = [Image.open(io.BytesIO(data)).convert("RGB")]
        elif path.is_dir():
            files = [file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
            files.sort(key=lambda file: re.sub(r"\d+", lambda digits: digits[0].zfill(12), file.name))      # 2 before 10
            frames = [Image.open(files[i]).convert("RGB") for i in sample(len(files))]
        elif kind in (".mp4", ".mov", ".mkv", ".webm", ".avi"):
            import av
            with av.open(text) as video:
                wanted = sample(sum(1 for _ in video.decode(video=0)))
            with av.open(text) as video:
                frames = [frame.to_image() for i, frame in enumerate(video.decode(video=0)) if i in wanted]
        else:
            image = Image.open(path)
            wanted = sample(getattr(image, "n_frames", 1) if kind in (".gif", ".webp", ".apng") else 1)
            frames = [frame.convert("RGB") for i, frame in enumerate(ImageSequence.Iterator(image)) if i in wanted]
    except ImportError:
        raise ValueError(f"{path}: reading videos needs PyAV: pip install av. Or pass a folder of frames") from None
    except (OSError, LookupError, ValueError, EOFError, Image.DecompressionBombError) as error:     # av's errors are of these kinds
        raise ValueError(f"{text}: not a readable image or video ({error})") from None
    if not frames:
        raise ValueError(f"{path}: no frames (png, jpg or webp) in it")
    return frames

# ------------------------------------------------------------------------------------------------ the answer
class Failure(str):
    """What a judge hands back where it could not ask: the reason. It never counts as an answer."""


# A winner is 1, 2, 0 for a declared tie, or None: undecided, which is not a tie. A score is a float or None. The anchor of a category
# is 'A', 'B', 'C', or None where the judge added it. Issues are what was repaired and what contradicts itself.
Verdict = namedtuple("Verdict", "winner categories reason issues text", defaults=(None, (), "", (), ""))
Category = namedtuple("Category", "name anchor dims reason winner", defaults=(None, (), "", None))
Dim = namedtuple("Dim", "name reason_1 reason_2 score_1 score_2")
Score = namedtuple("Score", "value parts issues text")      # parts: 'Alignment Score' -> 4.0, ...; the scale is the judge's
_SIDE = (r"(?:the )?(?:(?:image|video|candidate|option|answer|response)[ _#:-]*(1|2|a|b|one|two)|(1|2|a|b)"
         r"|(first|second)(?: (?:image|video|answer|response|one))?)")
_CLAIM = (r" (?:wins|(?:is|looks) (?:(?:much|slightly|clearly|the) )*(?:better|best|winner|preferred|superior)"
          r"(?: (?:image|video|answer|response|one))?(?: (?:than|to|over) " + _SIDE + ")?)")
_WINNER, _CLAIM = re.compile(f"{_SIDE}(?:{_CLAIM})?"), re.compile(_SIDE + _CLAIM)
_TIE = re.compile(r"(?:it's |it is )?(?:a )?(?:tie|tied|draw|equal)"
                  r"|(?:both|the two) (?:images|videos|answers|responses) are equal(?:ly (?:good|bad))?")
_THEREFORE = re.compile(r"(?:(?:so|thus|therefore|hence|overall|in conclusion|conclusion|final answer|final verdict|verdict)[ ,:]+){1,3}")
_CRITERION = re.compile(r"^(?:<think>)?[ \t]{0,20}(?:\d{1,2}[.)] ?)?([^\s:][^:\n]{0,80}):[ \t]{0,20}\n"
                        r"[ \t]{0,20}(?:Image|Video|Answer) 1 \((\d{1,2})/10\)([^\n]*)\n"
                        r"[ \t]{0,20}(?:Image|Video|Answer) 2 \((\d{1,2})/10\)([^\n]*)$", re.M)
_NUMBER = r"(-?\d{1,4}(?:\.\d{1,6})?)(?: ?/ ?\d{1,3})?"
_FINAL = re.compile(r"final score(?: \(\d{1,3} ?- ?\d{1,3}\))?[ *:=]{1,8}" + _NUMBER + r"(?![\d.,]*\d| ?[-/–~] ?\d| (?:to|or|through)\b)", re.I)
_PART = re.compile(r"^[ \t*-]{0,8}([A-Za-z][^:\n]{0,60}?)(?: \(\d{1,3} ?- ?\d{1,3}\))?[*]{0,2}:[* \t]{1,8}" + _NUMBER + r"[*. \t]{0,8}$", re.M)
_LETTER = re.compile(r"\W*(?:category\s+)?([a-z])\**\s*(?:[.:)\]–—-]|$)", re.I)
_KEYWORDS = {"A": r"semantic", "B": r"(?:image|video|visual) quality|realism", "C": r"aesthetic|artistry|cinematograph"}
_POINTS = re.compile(r"\s*(\d{1,3}(?:\.\d{1,20})?)\s*(?:/\s*10\s*)?")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:"]|[^\s{}\[\],:"]+', re.S)
_CLOSER = {"{": "}", "[": "]"}
_Root = namedtuple("_Root", "source repaired keys winners sound")


def _read_winner(value, pattern=_WINNER):
    """1, 2, 0 for a tie, or None. The whole value must say it: 'Image 1/2' and 'not Image 1' are None."""
    value = " ".join(str(value).removesuffix(".0").strip(" \t\r\n*`'\".!").lower().split())
    if _TIE.fullmatch(value):
        return 0
    match = pattern.fullmatch(value)
    sides = [1 if side in ("1", "a", "one", "first") else 2 for side in match.groups() if side] if match else []
    return sides[0] if sides and len(set(sides)) == len(sides) else None


def _read_anchor(name):
    """'A', 'B', 'C' or None: the leading letter decides ('A. ..', 'B: ..', '**C**'), another letter marks a category the judge
    added, and a name without a letter goes by its keyword."""
    if match := _LETTER.match(name[:200]):
        return match[1].upper() if match[1].upper() in _KEYWORDS else None
    found = [anchor for anchor, words in _KEYWORDS.items() if re.search(words, name[:200], re.I)]
    return found[0] if len(found) == 1 else None


def _scan(text, start):
    """The outermost bracket that opens at text[start], read in one pass over the tokens with a stack: linear, no recursion.
    keys and winners (the values of 'winner', as written) are the root's own. `repaired` has the commas that JSON wants and ends, if
    the text was cut, after the last complete value. At a closer that does not fit, or 50 deep (a verdict is 5 deep), sound is False
    and the source is all the rest: beyond it nobody can tell root from nested."""
    stack, out, pairs, value, sound, end = [], [], [], [], True, len(text)
    safe = 0, 0         # (tokens of out, open brackets) after which closing what is open gives JSON
    for match in _TOKEN.finditer(text, start):
        token = match[0]
        if token[0] in '"{[' and out and out[-1] not in ("{", "[", ",", ":"):
            out.append(",")
        if token in _CLOSER:
            stack.append(token)
            sound = len(stack) <= 50
        elif token in ("}", "]"):
            sound = token == _CLOSER[stack.pop()]
            if out[-1] == ",":
                out.pop()
        if stack == ["{"] and token == ":" and out[-1][0] == '"' and out[-2] in ("{", ","):
            value = []
            pairs.append((out[-1][1:-1], value))
        elif stack == ["{"] and token == ",":
            value = []                                      # what follows is no part of the value before it
        elif stack:
            value.append(token)
        if token == '"' or not sound:                       # a string without an end: the text was cut here
            break
        if token in (",", "}", "]"):
            safe = len(out) + (token != ","), len(stack)
        out.append(token)
        if not stack:
            end = match.end()
            break
    if stack and not re.fullmatch('"(Image|Video) [12]"( `+)?', " ".join(value)):
        value.append("... cut")                             # a cut winner is believed only if the contract's words are whole
    repaired = " ".join(out[:safe[0]] + [_CLOSER[bracket] for bracket in reversed(stack[:safe[1]])])
    winners = [" ".join(value) for key, value in pairs if key == "winner"]
    return _Root(text[start:end], repaired, {key for key, _ in pairs}, winners, sound)


def parse_verdict(text):
    """The Verdict in a judge's text; never raises on a str, linear time. What the judge thought is no answer."""
    winner, categories, reason, issues, said = None, [], "", [], text.rpartition("</think>")[2]
    if isinstance(text, Failure):
        issues.append(f"no answer: {text}")
    elif "<think>" in said:
        issues.append("cut while thinking")
    elif "{" in said:
        winner, categories, reason = _read_json(said, issues)
    else:
        winner, categories = _read_claims(text, said, issues)
    return Verdict(winner, categories, reason, issues, text)


def _read_json(said, issues):
    """(winner, categories, reason); appends to `issues` whatever was repaired (fences, text around, commas, a cut tail) or is
    inconsistent. The winner is the value of `winner` in the one outermost JSON object and nothing else: a category's winner is never
    taken for it, and two objects or two values that disagree are undecided. A malformed category costs that category only."""
    found, position, winner, data = [], 0, None, None
    while bracket := re.compile(r"[{\[]").search(said, position):
        found.append(_scan(said, bracket.start()))
        position = bracket.start() + len(found[-1].source)
    roots = [root for root in found if root.source[0] == "{" and {"winner", "categories"} & root.keys]
    if not roots:
        issues.append("no JSON object with a verdict")
        return None, [], ""
    written = [value for root in roots for value in root.winners or ["none given"]]
    winners = {_read_winner(value) for value in written}
    if len(roots) > 1:
        issues.append(f"{len(roots)} JSON objects, expected one")
    if any(not root.sound or {"name", "dims", "cat_winner"} & root.keys for root in roots):
        issues.append("brackets do not match, or a category stands alone")
    elif len(winners) > 1 or None in winners:
        issues.append(f"no clear overall winner: {', '.join(written)[:100]}")
    else:
        winner = winners.pop()
    if roots[0].source != said.strip():
        issues.append("text around the JSON object")
    for strict, source in ((True, roots[0].source), (False, roots[0].repaired)):
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(source, parse_int=float, strict=strict)
            break
    if data is None or not strict:
        issues.append("JSON unreadable beyond its winner" if data is None else "JSON repaired")
    listed = _get(data, "categories", list)
    categories = [_read_category(category, issues) for category in listed if _get(category, "name")]
    if len(categories) < len(listed):
        issues.append("a category is not an object with a name, skipped")
    for anchor in _KEYWORDS:
        if (num := [category.anchor for category in categories].count(anchor)) != 1:
            issues.append(f"category {anchor} comes twice, the first one counts" if num else f"category {anchor} is missing")
    return winner, categories, _get(data, "reason")


def _get(data, key, kind=str):
    """data[key] if it is of that kind, else an empty one: a judge may write anything anywhere."""
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, kind) else kind()


def _read_category(data, issues):
    """A Category from its JSON object; appends to `issues`."""
    name, winner, dims, lead = _get(data, "name"), _read_winner(data.get("cat_winner")), [], 0
    for row in _get(data, "dims", list):
        written = [_get(row, key, object) for key in ("score_1", "score_2")]
        scores = [float(match[1]) if (match := _POINTS.fullmatch(str(value))) else None for value in written]
        dims.append(Dim(*(_get(row, key) for key in ("name", "reason_1", "reason_2")), *scores))
        where = f"{name[:60]} / {dims[-1].name[:60]}"
        if None in scores:
            issues.append(f"{where}: a score is missing")
            continue
        lead += scores[0] - scores[1]
        if sum(scores) != 10:
            issues.append(f"{where}: the scores {scores[0]:g} + {scores[1]:g} are not 10")
        if str in map(type, written):
            issues.append(f"{where}: a score is text")
    if winner is None:
        issues.append(f"{name[:60]}: no readable cat_winner")
    elif winner and lead and (lead > 0) != (winner == 1):
        issues.append(f"{name[:60]}: the winner goes against its own scores")
    return Category(name, _read_anchor(name), dims, _get(data, "cat_reason"), winner)


def _read_claims(text, said, issues):
    """(winner, categories) of a text without JSON: UnifiedReward's ranking ('Image 1 is better than Image 2.', 'Both videos are equally
    good.', answers of a VLM too) and UnifiedReward-Think's <think>criteria with scores</think><answer>Image 1 is better</answer>.
    A claim counts only as a whole sentence, the last sentence must be one, and all must agree: 'if Image 1 is better', 'not', and a
    section's winner before an unclear end are undecided."""
    rows = [Dim(name, reason_1.strip(" ;-:"), reason_2.strip(" ;-:"), float(score_1), float(score_2))
            for name, score_1, reason_1, score_2, reason_2 in _CRITERION.findall(text)]
    claims = [_read_winner(answer) for answer in re.findall(r"<answer>([^<]*)</answer>", said)]
    if not claims:
        joined = re.sub(r"(?<![.!;:*>\n])\n(?!\n)", " ", said.lower())         # a line that is no end of a sentence goes on
        sentences = [sentence for part in re.split(r"[.!;\n]+", joined) if (sentence := part.strip(" *#\t\r"))]
        claims = [_read_winner(_THEREFORE.sub("", sentence, 1), _CLAIM) for sentence in sentences]
        claims = [claim for claim in claims if claim is not None] + claims[-1:]
    winner = claims[0] if len(set(claims)) == 1 else None
    issues += ["no JSON object, and no claim or claims that disagree"] if winner is None else []
    return winner, [Category("Criteria", dims=rows)] if rows else []


def parse_score(text):
    """The Score in a judge's pointwise text; never raises on a str, linear time. 'Final Score: 4' decides (UnifiedReward: 1 to 5 for
    images, 1 to 10 for videos, 0 to 100 for answers), else the mean of the lines named so, as 'Alignment Score (1-5): 3.5'. Other
    parts ('visual quality: 4') are only kept. Two final scores that differ, and a score line that cannot be read, are no score: None."""
    if isinstance(text, Failure):
        return Score(None, {}, [f"no answer: {text}"], text)
    finals, value = {float(match[1]) for match in _FINAL.finditer(text)}, None
    parts = {name: float(number) for name, number in _PART.findall(text) if name.lower() != "final score"}
    scores = [number for name, number in parts.items() if name.lower().endswith("score")]
    if "final score" in text.lower():
        value = finals.pop() if len(finals) == 1 else None
    elif scores and len(scores) == len(re.findall(r"score\b[^:\n]{0,20}:", text, re.I)):        # each such line was read, and none twice
        value = sum(scores) / len(scores)
    return Score(value, parts, ["no clear score"] * (value is None), text)

# ------------------------------------------------------------------------------------------------ the arithmetic
WinRates = namedtuple("WinRates", "overall category anchors num_decided num_ties num_undecided first_position_wins")


def schedule_pairs(groups, pairs="all", rng=random, both_orders=False):
    """Which items meet, and who is shown first: [(first, second), ...], each unordered pair at most once.
    groups is the number of items of one prompt, or one group id (a prompt) per item: pairs never cross groups. "ring:K" seats the G
    items of a group at random on a ring where each meets its next K; "all" gives all G(G-1)/2. The order within a pair is a coin flip:
    judges favour a position, and a fixed order hands that favour to the same items. `both_orders` asks every pair in either order."""
    ring = re.fullmatch(r"all|ring:(\d+)", pairs)
    if not ring:
        raise ValueError(f"pairs is '{pairs}'; expected 'all' or 'ring:K', for example 'ring:3'")
    groups, out = [0] * groups if isinstance(groups, int) else groups, []
    for group in dict.fromkeys(groups):
        seats = [i for i, other in enumerate(groups) if other == group]
        num, K = len(seats), int(ring[1] or len(seats) // 2)                    # on a ring of K = G/2 all meet all
        if num < 2:
            raise ValueError(f"group {group!r} has {num} item; a comparison needs at least 2")
        if not 1 <= K <= num // 2:
            raise ValueError(f"pairs is '{pairs}' for {num} items; K goes from 1 to {num // 2}, or use 'all'")
        seats = rng.sample(seats, num) if ring[1] else seats
        chosen = {tuple(sorted((seats[i], seats[(i + k) % num]))) for i in range(num) for k in range(1, K + 1)}
        out += [pair if rng.random() < 0.5 else pair[::-1] for pair in sorted(chosen)]
    return [p for pair in out for p in (pair, pair[::-1])] if both_orders else out


def win_rates(pairs, verdicts, num_items, count_extra=False, category_weights=None):
    """WinRates of B items, of one prompt or several; winner 1 of a verdict means that the first of its pair won.
    anchors  {d: R_d}, R_d(i) = wins of i on anchor d / comparisons of i on d (Sec. 3.3.2 of arXiv 2602.02380), a tie half a win
    category R_cat(i) = mean of R_d(i) over the anchors that have a value for i, weighted by `category_weights` ({'A': 1., ...})
    overall  R_all(i), from the overall winners. All are (B,), from 0 to 1, NaN without a comparison
    An undecided verdict is left out together with its categories, and so is a category without a readable winner. Categories the judge
    added are in no rate, as in the paper; `count_extra` makes them one more anchor, 'D'. first_position_wins are of num_decided."""
    if len(pairs) != len(verdicts):
        raise ValueError(f"{len(pairs)} pairs but {len(verdicts)} verdicts; expected one verdict per pair")
    names = ["overall", *_KEYWORDS] + ["D"] * count_extra
    wins, counts = torch.zeros(2, len(names), num_items, dtype=torch.float64)               # (1 + D, B) each
    for pair, verdict in zip(pairs, verdicts):
        votes = {category.anchor or "D": category.winner for category in reversed(verdict.categories)} | {"overall": verdict.winner}
        for row, name in enumerate(names):
            if verdict.winner is not None and votes.get(name) is not None:
                wins[row, pair] += torch.tensor({1: (1., 0.), 2: (0., 1.), 0: (.5, .5)}[votes[name]])
                counts[row, pair] += 1
    overall, *anchors = wins / counts                                                       # 0 / 0 = NaN: never compared
    rates = torch.stack(anchors)                                                            # (D, B)
    weights = torch.tensor([(category_weights or {}).get(name, 1.0) for name in names[1:]], dtype=torch.float64)
    weights = weights[:, None] * ~rates.isnan()
    category = (weights * rates.nan_to_num()).sum(0) / weights.sum(0)
    ties, firsts, seconds, undecided = ([verdict.winner for verdict in verdicts].count(winner) for winner in (0, 1, 2, None))
    # float32 out of float64: rates equal on paper become equal bit by bit, (0 + .2 + 1) / 3 and (.4 + .4 + .4) / 3 are not
    return WinRates(overall.float(), category.float(), dict(zip(names[1:], rates.float())), firsts + seconds, ties, undecided, firsts)


def normalize(values, groups=None, std_floor=0.0, normalize_std=True, eps=1e-8):
    """z = (x - mean) / (max(std, std_floor) + eps) of (B,) values inside each group (default: one group).
    The std is the unbiased one (divisor G - 1), as in the original code. A group whose values are all equal, bit by bit, gives exactly
    zero; an item without a value (NaN) gets 0 and enters neither mean nor std. `normalize_std=False` leaves the division out;
    `std_floor` keeps a nearly dead group (one decided pair among ties) quiet."""
    values, groups = values.float(), [0] * len(values) if groups is None else groups
    scores = torch.zeros_like(values)
    for group in dict.fromkeys(groups):
        on = torch.tensor([g == group for g in groups], device=values.device) & ~values.isnan()
        x = values[on]
        if len(x) > 1 and x.min() != x.max():                           # exact equality is dead, a small std is not
            scores[on] = (x - x.mean()) / (x.std().clamp(min=std_floor) + eps if normalize_std else 1.0)
    return scores


def group_advantages(rates, alpha=0.7, groups=None, blend="advantages", **options):
    """(B,) advantages A = alpha z(R_cat) + (1 - alpha) z(R_all), z as in `normalize`, which also takes the `options`.
    Each side is normalised inside its group before the blend: the paper (Sec. 3.3.2), and the original code with its GDPO flag.
    blend="rates" is the original without it: z(alpha R_cat + (1 - alpha) R_all). Where an item has a value on one side only, as with
    a judge that names no categories, that side counts alone. Worked: rates 1, .5, 0 on both sides give 1, 0, -1 for any alpha."""
    def mix(category, overall):
        both = alpha * category + (1 - alpha) * overall
        return torch.where(rates.category.isnan(), overall, torch.where(rates.overall.isnan(), category, both))

    if blend == "rates":
        return normalize(mix(rates.category, rates.overall).round(decimals=6), groups, **options)   # equal on paper, equal bit by bit
    if blend != "advantages":
        raise ValueError(f"blend is {blend!r}; expected 'advantages' or 'rates'")
    return mix(normalize(rates.category, groups, **options), normalize(rates.overall, groups, **options))


def blend_advantages(parts, normalize_batch=False, eps=1e-8):
    """(B,) sum_k w_k A_k of several rewards' advantages, [(w_k, A_k), ...]; A_k of a further reward is its `normalize`d value. The original
    scripts take 0.7 of the verdicts and 0.3 of CLIP and, with `normalize_batch`, normalise the sum once more over all prompts' items."""
    mixed = sum(weight * advantages for weight, advantages in parts)
    return normalize(mixed, eps=eps) if normalize_batch else mixed

# ------------------------------------------------------------------------------------------------ the judges
def without_video(stock):
    """The processor class `stock` (Qwen3VLProcessor, ...) less its video processor, which cannot be built without torchvision.
    Frames come as images, so nothing is lost. It saves under the stock name with the video settings written along, so that the
    folder loads as an ordinary one where torchvision is installed."""
    class Processor(stock):
        video_settings = {"video_processor_type": stock.__name__.replace("2_5_", "2").replace("Proc", "VideoProc")}

        @classmethod
        def get_attributes(cls):
            return [name for name in super().get_attributes() if name != "video_processor"]

        def to_dict(self):
            return {**super().to_dict(), "video_processor": self.video_settings}
    Processor.__name__ = Processor.__qualname__ = stock.__name__
    return Processor


def load_processor(path):
    """The processor in a folder or hub repository: AutoProcessor's, or `without_video` of it where torchvision is missing and the
    stock class insists on a video processor (Qwen2-VL, Qwen2.5-VL, Qwen3-VL). Files of transformers 4 and 5 are read."""
    import transformers
    from transformers.utils import cached_file, is_torchvision_available
    settings = {}
    for name in ("tokenizer_config", "preprocessor_config", "video_preprocessor_config", "processor_config"):
        if file := cached_file(path, f"{name}.json", _raise_exceptions_for_missing_entries=False):
            found = json.loads(Path(file).read_text(encoding="utf-8"))
            settings |= {"video_processor": found} if name == "video_preprocessor_config" else found
    stock = getattr(transformers, settings.get("processor_class", ""), None)
    if is_torchvision_available() or stock is None or "video_processor" not in stock.get_attributes():
        return transformers.AutoProcessor.from_pretrained(path)
    processor = without_video(stock).from_pretrained(path)
    processor.video_settings |= settings.get("video_processor", {})
    return processor


@contextlib.contextmanager
def share_images(model, processor, images):
    """While open, the vision tower sees each distinct one (PIL object) of a batch's `images` once and its result is repeated: in a
    group each image meets several others. For models that pack images in one row and pass on their grid (the Qwen-VL family)."""
    tower = getattr(getattr(model, "model", None), "visual", None)
    if tower is None or "image_grid_thw" not in processor.image_processor.model_input_names:
        yield
        return
    numbers, stock = {}, tower.forward
    place = [numbers.setdefault(id(image), len(numbers)) for image in images]   # of each image its number among the distinct ones
    first = [place.index(number) for number in range(len(numbers))]

    def forward(patches, grid_thw, **kwargs):
        rows = patches.split(grid_thw.prod(1).tolist())
        sizes = [len(rows[i]) for i in first]
        def repeat(x):                                                          # a row for each patch, or for each merged block of them
            parts = x.split([size * len(x) // sum(sizes) for size in sizes])
            return torch.cat([parts[number] for number in place])
        return tree_map_only(torch.Tensor, repeat, stock(torch.cat([rows[i] for i in first]), grid_thw=grid_thw[first], **kwargs))
    tower.forward = forward
    try:
        yield
    finally:
        tower.forward = stock


def roomy_cache(config):
    """A key-value cache whose full-attention layers grow by 64 tokens at a time; the stock ones copy themselves for every token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Layer(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            if not self.is_initialized:
                self.rooms = list(super().update(keys[:, :, :0], values[:, :, :0]))
            start, end = self.get_seq_length(), self.get_seq_length() + keys.shape[2]
            for k, new in enumerate((keys, values)):
                if end > self.rooms[k].shape[2]:
                    self.rooms[k] = torch.cat([self.rooms[k][:, :, :start], new.new_empty(*new.shape[:2], end - start + 64, new.shape[3])], 2)
                self.rooms[k][:, :, start:end] = new
            self.keys, self.values = (room[:, :, :end] for room in self.rooms)
            return self.keys, self.values

    cache = DynamicCache(config=config.get_text_config())
    cache.layers = [Layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class LocalJudge:
    """judge(questions) -> texts, by a transformers model: LocalJudge(path), or LocalJudge(model=, processor=) for one in memory.
    The wording that a judge was trained on lies beside its weights, as sft.py leaves it: where template is None, `template.txt` is read, else
    TEMPLATE is taken; score_template, `score_template.txt` and SCORE_TEMPLATE are the same for Candidates. The default device is the GPU,
    else the CPU, the default dtype there bfloat16 or float32."""
    def __init__(self, path=None, *, model=None, processor=None, template=None, score_template=None, device=None, dtype=None,
                 batch_size=64, max_new_tokens=2048):
        if (path is None) == (model is None) or (model is not None and processor is None):
            raise ValueError("LocalJudge takes a path, or a model and its processor")
        if path is not None:
            from transformers import AutoModelForImageTextToText
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
            model, processor = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device), load_processor(path)
            if device.type == "cpu":
                model.set_attn_implementation("eager")      # faster there, token by token
            stored = {file.name: file.read_text(encoding="utf-8") for file in Path(path).glob("*template.txt")}
            template, score_template = template or stored.get("template.txt"), score_template or stored.get("score_template.txt")
        self.model, self.processor = model, processor
        self.templates = {Comparison: template, Candidate: score_template}
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    @torch.inference_mode()
    def __call__(self, questions, temperature=0.0, progress=False):
        """One text per question, in order. Greedy at temperature 0, else sampled from the whole distribution (no top-k or top-p).
        Batches hold similar lengths, the longest first, so that memory runs out at once or never."""
        chats = [build_messages(question, self.templates[type(question)]) for question in questions]
        prompts = [chat_text(self.processor, messages) for messages, _ in chats]
        # roughly the number of tokens: one for 4 characters, one for 32 x 32 pixels
        sizes = [len(text) / 4 + sum(i.width * i.height for i in images) / 1024 for text, (_, images) in zip(prompts, chats)]
        order = sorted(range(len(chats)), key=lambda i: -sizes[i])
        tokenizer, was_training, texts = self.processor.tokenizer, self.model.training, {}
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
        cache = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"  # its name in older transformers
        self.model.eval()
        for start in tqdm(range(0, len(order), self.batch_size), desc="judge", disable=not progress):
            batch = order[start:start + self.batch_size]
            images = [chats[i][1] for i in batch]
            inputs = self.processor(text=[prompts[i] for i in batch], images=images, padding=True, padding_side="left", return_tensors="pt")
            with share_images(self.model, self.processor, sum(images, [])):
                tokens = self.model.generate(
                    **inputs.to(self.model.device), **sampling, max_new_tokens=self.max_new_tokens, repetition_penalty=1.0,
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **{cache: roomy_cache(self.model.config)})      # (B, T)
            texts.update(zip(batch, tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)))
        self.model.train(was_training)
        return [texts[i] for i in range(len(chats))]


def data_url(image):
    """The image inlined as PNG, so nothing is lost."""
    image.convert("RGB").save(file := io.BytesIO(), "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class ServerJudge:
    """judge(questions) -> texts, by OpenAI-compatible servers: ServerJudge(["http://localhost:8000", ...]); ValueError when none answers.
    `concurrency` requests are in flight, spread over the URLs; temperature 0 and a seed are sent, since servers otherwise sample. What
    takes `timeout` seconds, breaks off or gets a status of 408, 429 or 5xx is tried `retries` times more, at the next URL, after a growing
    pause; what stays without an answer is a Failure. Without a model the servers are asked for theirs. What else a request should say
    goes into `body`, as judge.body["chat_template_kwargs"] = {"enable_thinking": False}."""
    def __init__(self, urls, model=None, template=None, score_template=None, concurrency=32, timeout=300.0, retries=4,
                 max_new_tokens=2048, seed=0):
        self.urls = [re.sub(r"(/v1)?(/chat/completions)?/*$", "", url) for url in urls]
        self.templates = {Comparison: template, Candidate: score_template}
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        for url in self.urls:
            if not re.match(r"https?://\w", url):
                raise ValueError(f"judge {url!r} is no URL; expected http://HOST:PORT")
        model = model or self._ask(0, "/v1/models", ("data", 0, "id"))
        if isinstance(model, Failure):
            raise ValueError(f"no judge answers: {model}. Start one, for example: vllm serve MODEL --port 8000")
        self.body = {"model": model, "max_tokens": max_new_tokens, "seed": seed}

    def _fetch(self, url, body, timeout, answer):
        """Set the future `answer` to (status, bytes), whatever the status, or to an error. The loopback is never asked through a proxy."""
        direct = re.match(r"https?://(localhost|127[.\d]+|\[::1\])([:/]|$)", url)
        opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * bool(direct))
        opener.error = lambda scheme, request, response, *rest: response
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        try:
            with opener.open(urllib.request.Request(url, body, headers), timeout=timeout) as response:
                answer.set_result((response.status, response.read()))
        except Exception as error:
            answer.set_exception(error)

    def _ask(self, number, endpoint, path, body=None):
        """The text at `path` in the JSON that a server answers, or a Failure with the last reason."""
        timeout = self.timeout if body else min(self.timeout, 30)
        for attempt in range(self.retries + 1):
            time.sleep(min(.125 * 2 ** attempt, 8) if attempt else 0)
            reason = url = self.urls[(number + attempt) % len(self.urls)]
            answer = futures.Future()       # in a thread of its own, left behind when the server drips or hangs
            threading.Thread(target=self._fetch, args=(url + endpoint, body, timeout, answer), daemon=True).start()
            try:
                status, data = answer.result(timeout)
                reason = f"{url}: HTTP {status}: {data[:300].decode(errors='replace')}"
                if status in (408, 429) or status >= 500:
                    continue
                found = json.loads(data)
                for key in path:
                    found = found[key]
                return "" + found
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                return Failure(f"{reason} is not a chat completion or holds no text ({error!r})")
            except Exception as error:      # refused, reset, broken off, too slow
                reason = f"{url}: no whole answer within {timeout:g} s: {error!r}"
        return Failure(f"{reason} (after {self.retries + 1} tries)")

    def __call__(self, questions, temperature=0.0, progress=False):
        """One text or Failure per question, in order. Every image is encoded once."""
        chats = [build_messages(question, self.templates[type(question)]) for question in questions]
        distinct = {id(image): image for _, images in chats for image in images}
        inlined = {key: {"type": "image_url", "image_url": {"url": data_url(image)}} for key, image in distinct.items()}

        def ask(number):
            (message,), images = chats[number]
            message = {"role": "user", "content": [inlined[id(image)] for image in images] + message["content"][-1:]}
            seed = {"seed": self.body["seed"] + number} if temperature else {}    # else all samples are one
            body = json.dumps({**self.body, **seed, "messages": [message], "temperature": temperature})
            return self._ask(number, "/v1/chat/completions", ("choices", 0, "message", "content"), body.encode())

        with futures.ThreadPoolExecutor(self.concurrency) as pool:
            return list(tqdm(pool.map(ask, range(len(chats))), desc="judge", total=len(chats), disable=not progress))


def open_function(name):
    """The function of "FILE.py:function", None where the name is not of that form; ValueError: the file does not define it."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        return None
    if not callable(found := runpy.run_path(path).get(function)):
        raise ValueError(f"{path} has no function {function}")
    return found


def open_judge(judge=None, max_new_tokens=2048, batch_size=64, concurrency=32, **templates):
    """A judge by name: URLs joined by commas, with #MODEL behind them where the server serves several, FILE.py:function (from questions to
    texts), a folder, a hub id, or the newest judge trained in the current folder. A server's has `concurrency` questions in flight, a local
    one answers `batch_size` at a time."""
    if function := open_function(judge or ""):
        return lambda questions, **options: function(questions)
    if not re.match("https?://", judge or ""):
        return LocalJudge(judge or find_judge(), batch_size=batch_size, max_new_tokens=max_new_tokens, **templates)
    urls, _, model = judge.partition("#")
    return ServerJudge(urls.split(","), model, concurrency=concurrency, max_new_tokens=max_new_tokens, **templates)


def find_judge(prefix=""):
    """The newest judge trained in the current folder, in out/{prefix}judge-dpo or out/{prefix}judge-sft."""
    files = [file for stage in ("dpo", "sft") for file in Path("out").glob(f"{prefix}judge-{stage}/model/config.json")]
    if not files:
        raise ValueError(f"no judge in out/{prefix}judge-dpo/model or out/{prefix}judge-sft/model; train one with `python sft.py`, or pass --judge")
    return max(files, key=lambda file: file.stat().st_mtime).parent

# ------------------------------------------------------------------------------------------------ other rewards
# A reward is a function (media, prompts) -> one float per item, NaN where it has no opinion; a medium is a list of PIL images.
def clip_reward(path):
    """The reward by CLIP: cosine similarity of the embeddings of prompt and image, -1 to 1, the mean over the frames of a video."""
    from transformers import AutoModel, AutoProcessor
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = AutoModel.from_pretrained(path).to(device).eval(), AutoProcessor.from_pretrained(path)

    @torch.inference_mode()
    def clip(images, prompt):
        out = model(**processor(text=[prompt], images=images, return_tensors="pt", padding=True, truncation=True).to(device))
        return torch.cosine_similarity(out.image_embeds, out.text_embeds).mean().item()
    return lambda media, prompts: list(map(clip, media, prompts))


def open_rewards(text, judge=None):
    """[(weight, name, function), ...] of "flex:0.7,clip:0.3". Names: flex, the pairwise verdicts, whose function is None; score, the
    judge's pointwise scores; clip, or clip@FOLDER; FILE.py:function, called with lists of media and prompts. Weights default to 1."""
    rewards = []
    for name in map(str.strip, text.split(",")):
        weight, (rest, _, tail) = 1.0, name.rpartition(":")
        with contextlib.suppress(ValueError):
            weight, name = float(tail), rest
        if not math.isfinite(weight):
            raise ValueError(f"the weight of reward '{name}' is {weight}; expected a number")
        if name == "flex":
            found = None
        elif name == "score":
            found = lambda media, prompts: [math.nan if (score := parse_score(text)).value is None else score.value
                                            for text in judge(list(map(Candidate, prompts, map(load_media, media))))]
        elif name.partition("@")[0] == "clip":
            found = clip_reward(name.partition("@")[2] or "openai/clip-vit-large-patch14")
        elif (found := open_function(name)) is None:
            raise ValueError(f"reward '{name}' is unknown; expected flex, score, clip, clip@FOLDER or FILE.py:function")
        rewards.append((weight, name, found))
    return rewards


def asks_judge(text):
    """Whether one of the rewards in "flex:0.7,clip:0.3" needs a judge."""
    return any(part.split(":")[0].strip() in ("flex", "score") for part in text.split(","))


def reward_values(reward, media, prompts):
    """(B,) values of one entry of open_rewards; ValueError when its function returns something else."""
    said = reward[2](media, prompts)
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        values = torch.as_tensor(said, dtype=torch.float32).cpu()
        if values.shape == (len(media),) and not values.isinf().any():
            return values
    raise ValueError(f"reward {reward[1]} returned {said!r} for {len(media)} items; expected one finite number (or NaN) for each")

# ------------------------------------------------------------------------------------------------ the exam
def interval(num_right, num):
    """(low, high): Wilson's 95 % interval of a share."""
    num = num or math.nan
    z, p = 1.959964, num_right / num
    half = z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    return tuple((p + z * z / (2 * num) + way * half) / (1 + z * z / num) for way in (-1, 1))


def read_vote(vote):
    """1, 2 or 0, a tie, of 'left', 'right', 'tie' or 'both bad' (GenAI-Bench's 'leftvote' ... 'bothbad_vote' too), of a verdict's words
    ('Image 1') or of 1, 2, 0; ValueError for anything else."""
    key = re.sub(r"[\s_]|vote$", "", str(vote).lower())
    winner = {"left": 1, "right": 2, "tie": 0, "bothbad": 0, "0": 0}.get(key, _read_winner(vote))
    if winner is None:
        raise ValueError(f"vote {'of people is ' * (vote is None)}{vote!r} names no winner; expected left, right, tie or both bad, or 1, 2, 0")
    return winner


def accuracy(votes, ties=False):
    """(share right, its 95 % interval, number of pairs) of [(judge's vote, people's vote), ...], each as `read_vote` takes them; None,
    undecided, is wrong. Without ties ("diff") the pairs that people call a tie or both bad are left out; with ties ("tau") they count,
    and are right when the judge says tie or both bad."""
    votes = [(None if said is None else read_vote(said), read_vote(label)) for said, label in votes]
    right = [said == label for said, label in votes if label or ties]
    return sum(right) / (len(right) or math.nan), interval(sum(right), len(right)), len(right)


def evaluate_judge(judge, comparisons, labels, rng, types=None):
    """How good a judge is on labelled pairs, a dict of shares. labels: 1 or 2, the better candidate, or 0, a tie; types: one per pair.
    Every pair is shown in a random order from `rng` and then in the other one; winners are turned back, so that they name candidates."""
    num, turned_back = len(comparisons), {1: 2, 2: 1}
    flipped = [rng.random() < 0.5 for _ in comparisons]
    orders = flipped + [not flip for flip in flipped]
    shown = [Comparison(pair.prompt, pair.media_2, pair.media_1) if flip else pair for pair, flip in zip([*comparisons] * 2, orders)]
    verdicts = [parse_verdict(text) for text in judge(shown)]
    winners = [turned_back.get(v.winner, v.winner) if flip else v.winner for v, flip in zip(verdicts, orders)]
    votes, types = list(zip(winners[:num], labels)), types or [None] * num
    mean = lambda values: sum(values) / (len(values) or math.nan)
    diff, tau = accuracy(votes), accuracy(votes, ties=True)
    return {
        "winner_accuracy": diff[0], "winner_accuracy_95": diff[1],      # in the random order, ties of people left out ("diff")
        "tau_accuracy": tau[0], "tau_accuracy_95": tau[1],              # the same with ties, right when the judge says tie
        "parse_rate": mean([v.winner is not None and {"A", "B", "C"} <= {c.anchor for c in v.categories} for v in verdicts]),
        "sum10_rate": mean([None not in d[3:] and sum(d[3:]) == 10 for v in verdicts for c in v.categories for d in c.dims]),
        "swap_consistency": mean([a == b and a is not None for a, b in zip(winners[:num], winners[num:])]),
        "first_position_share": mean([v.winner == 1 for v in verdicts if v.winner]),            # one half without position bias
        "failures": sum(isinstance(v.text, Failure) for v in verdicts), "num_pairs": num,
        "by_type": {kind: accuracy([vote for vote, t in zip(votes, types) if t == kind])[0] for kind in dict.fromkeys(types) if kind},
        "verdicts": verdicts[:num], "flipped": flipped,                 # in the random order, and whether that was (2, 1)
    }


def read_pairs(path):
    """[(Comparison of two paths, 1 | 2 | 0, type or None), ...] of a JSONL file {"prompt", "images" or "videos", "winner", "type"}. Paths
    are relative to the file; a winner is what `read_vote` takes. ValueError names a bad line."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                row = json.loads(line)
                first, second = (find_medium(item, Path(path).parent) for item in row.get("videos") or row["images"])
                pair = Comparison(instruction(row["prompt"], template="{prompt}"), first, second)
                rows.append((pair, read_vote(row["winner"]), row.get("type") and str(row["type"])))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}:{number}: {type(error).__name__}: {error}. '
                             'Expected {"prompt": "...", "images": [first, second], "winner": "Image 1" | "Image 2" | "Tie"}') from None
    if not rows:
        raise ValueError(f"{path}: no pairs in it")
    return rows

# ------------------------------------------------------------------------------------------------ the report
_SAID = {1: "1 wins", 2: "2 wins", 0: "tie", None: "undecided"}
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}h1{font-size:1.3em}
h2{font-size:1.1em;margin:1.6em 0 .3em}table{border-collapse:collapse;width:100%;table-layout:fixed}.middle{width:150px}.won{background:#d9f0df}
td,th{padding:.35em .6em;border-bottom:1px solid #e4e4e4;vertical-align:top;text-align:left;overflow-wrap:anywhere}summary{cursor:pointer}
figure{display:inline-block;margin:.4em 1em .4em 0;padding:.3em;border-radius:6px}figcaption{font-weight:600}img{height:200px;margin-right:3px}
.bar{display:flex;justify-content:space-between;padding:0 .5em;border-radius:3px;color:#fff;font-size:.85em}
.issue{background:#fff3b0;padding:.2em .6em}"""


def format_verdict(verdict, prompt=None):
    """The verdict as a tree for the terminal: categories, sub-dimensions with both scores and reasons, winners, issues."""
    lines = [f"prompt: {prompt}"] if prompt else []
    for category in verdict.categories:
        lines.append(f"├─ {category.name}: {_SAID[category.winner]}{'' if category.anchor else '  (added by the judge)'}")
        for dim in category.dims:
            lines.append(f"│  ├─ {dim.name}  " + " : ".join("?" if score is None else f"{score:g}" for score in dim[3:]))
            lines += [f"│  │    {side}: {reason}" for side, reason in ((1, dim.reason_1), (2, dim.reason_2)) if reason]
        lines += [f"│  └─ {category.reason}"] if category.reason else []
    lines.append(f"└─ overall: {_SAID[verdict.winner]}{'. ' if verdict.reason else ''}{verdict.reason}")
    return "\n".join(lines + [f"   ! {issue}" for issue in verdict.issues])


def verdict_html(verdict):
    """The same as HTML: a table per category with both reasons and the scores as bars, what was repaired in yellow."""
    escape, page = html.escape, ""
    for category in verdict.categories:
        page += f"<h2>{escape(category.name)}: {_SAID[category.winner]}{'' if category.anchor else ' (added by the judge)'}</h2>"
        page += '<table><tr><th><th>1<th class="middle"><th>2'
        for dim in category.dims:
            share = 50 if None in dim[3:] or not any(dim[3:]) else 100 * dim.score_1 / sum(dim[3:])
            scores = "".join("<span>?</span>" if score is None else f"<span>{score:g}</span>" for score in dim[3:])
            bar = f'<div class="bar" style="background:linear-gradient(90deg,#2f6fde {share:.0f}%,#e07b2f 0)">{scores}</div>'
            page += f"<tr><td>{escape(dim.name)}<td>{escape(dim.reason_1)}<td>{bar}<td>{escape(dim.reason_2)}"
        page += f"</table><p>{escape(category.reason)}</p>"
    page += f"<h2>Overall: {_SAID[verdict.winner]}</h2><p>{escape(verdict.reason)}</p>"
    return page + "".join(f'<p class="issue">{escape(issue)}</p>' for issue in verdict.issues)


def report_html(title, figures, page):
    """A whole page that needs no network: the title, then a figure for each (caption, images, whether it won), then `page`."""
    title = html.escape(title)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>'
    for caption, images, won in figures:
        shown = "".join(f'<img src="{data_url(image)}">' for image in images)
        head += f'<figure class="{"won" * won}"><figcaption>{html.escape(caption)}</figcaption>{shown}</figure>'
    return head + page

# ------------------------------------------------------------------------------------------------ the commands
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("items", nargs="+", metavar="ITEM", help="nothing, rank, eval or score; then images, GIFs, videos, folders of frames, or a file of pairs")
    add("--prompt", default="", help="the text that the candidates were generated from")
    # judge
    add("--judge", help="folder, hub id, URLs joined by commas or FILE.py:function; default: the newest of out/judge-dpo/model and out/judge-sft/model")
    add("--template", help="file with another instruction, holding {prompt} and optionally {medium}, {anchors}")
    add("--max-new-tokens", type=int, default=2048, help="longest verdict, in tokens")
    add("--num-frames", type=int, default=8, help="frames sampled from a video")
    # rank
    add("--pairs", default="all", help="who meets whom: all, or ring:K")
    add("--both-orders", action="store_true", help="ask every pair in both orders")
    add("--alpha", type=float, default=0.7, help="weight of the category side against the overall side")
    add("--reward", default="flex", help="what is blended into the advantages, as flex:0.7,clip:0.3 or FILE.py:function")
    # run
    add("--seed", type=int, default=0, help="of the order in which candidates are shown")
    add("--json", action="store_true", help="print JSON; for one comparison the judge's text as it is")
    add("--html", help="compare and rank: write a report to this file")
    args = parser.parse_intermixed_args(argv)
    args.command = args.items.pop(0) if args.items[0] in ("rank", "eval", "score") else "compare"
    least, most = {"compare": (2, 2), "rank": (2, math.inf), "eval": (1, 1), "score": (1, math.inf)}[args.command]
    if not least <= len(args.items) <= most:
        parser.error(f"{args.command} takes {least} {'items' if least == most else 'or more items'}, not {len(args.items)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    from transformers.utils import logging
    logging.set_verbosity_error()                                               # their notices drown the verdict
    logging.disable_progress_bar()
    try:
        template = Path(args.template).read_text(encoding="utf-8") if args.template else None
        instruction(args.prompt or "-" * (args.command == "eval"), template=template or TEMPLATE)     # fails before the judge is loaded
        items = read_pairs(args.items[0]) if args.command == "eval" else [load_media(item, args.num_frames) for item in args.items]
        options = {"score_template" if args.command == "score" else "template": template}
        judge = open_judge(args.judge, args.max_new_tokens, **options) if args.command != "rank" or asks_judge(args.reward) else None
        data, text, figures, page = {"compare": compare, "rank": rank, "eval": examine, "score": score}[args.command](args, judge, items)
        if args.json:                                                           # NaN, which stands for 'no value', becomes null
            text = data if isinstance(data, str) else json.dumps(json.loads(json.dumps(data), parse_constant=lambda name: None))
        print(text.encode(errors="replace").decode())                           # a judge may write half a character
        if args.html and figures:
            Path(args.html).write_bytes(report_html(args.prompt, figures, page).encode(errors="replace"))
            print(f"report: {args.html}", file=sys.stderr)
    except (ValueError, OSError) as error:
        raise SystemExit(f"reward.py: {error}") from error


def compare(args, judge, media):
    """(what --json prints, what is printed else, the figures and the rest of the --html page), as of every command."""
    text, = judge([Comparison(args.prompt, *media)])
    if isinstance(text, Failure):
        raise ValueError(text)
    verdict = parse_verdict(text)
    figures = [(f"{i}: {item}", images, verdict.winner == i) for i, (item, images) in enumerate(zip(args.items, media), 1)]
    return text, format_verdict(verdict, args.prompt), figures, verdict_html(verdict)


def rank(args, judge, media):
    parts, columns, counts, asked = [], {}, {}, []
    for weight, name, function in open_rewards(args.reward, judge):
        if function:
            columns[name] = reward_values((weight, name, function), media, [args.prompt] * len(media))
            parts.append((weight, normalize(columns[name])))
            continue
        pairs = schedule_pairs(len(media), args.pairs, random.Random(args.seed), args.both_orders)
        verdicts = [parse_verdict(text) for text in judge([Comparison(args.prompt, media[i], media[j]) for i, j in pairs], progress=True)]
        failures = [verdict.text for verdict in verdicts if isinstance(verdict.text, Failure)]
        if failures:
            print(f"{len(failures)} of {len(pairs)} questions failed: {failures[0]}", file=sys.stderr)
        if len(failures) == len(pairs):
            raise ValueError("the judge answered nothing")
        rates = win_rates(pairs, verdicts, len(media))
        columns |= {"win rate": rates.overall, **rates.anchors}
        parts.append((weight, group_advantages(rates, args.alpha)))
        counts = {"pairs": len(pairs), "ties": rates.num_ties, "undecided": rates.num_undecided, "first_position_wins": rates.first_position_wins}
        asked = [(args.items[i], args.items[j], verdict) for (i, j), verdict in zip(pairs, verdicts)]
    columns["advantage"] = blend_advantages(parts)
    order = columns["advantage"].argsort(descending=True, stable=True).tolist()
    rows = [{"rank": place, "item": args.items[i], **{name: column[i].item() for name, column in columns.items()}}
            for place, i in enumerate(order, 1)]
    cells = [list(rows[0])] + [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]
    lines.append(", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()))
    figures = [(f"{place}. {args.items[i]}", media[i], False) for place, i in enumerate(order, 1)]
    page = "<table>" + "".join("<tr><td>" + "<td>".join(map(html.escape, row)) for row in cells) + "</table><br>"
    page += "".join(f"<details><summary>{html.escape(f'{first} (1) against {second} (2)')}: {_SAID[verdict.winner]}</summary>"
                    f"{verdict_html(verdict)}</details>" for first, second, verdict in asked)
    data = {"items": rows, **counts, "verdicts": [{"first": first, "second": second, "text": v.text} for first, second, v in asked]}
    return data, "\n".join(lines), figures, page


def examine(args, judge, rows):
    def ask(pairs, size=64):                                                    # the images of few pairs at a time are in memory
        for start in tqdm(range(0, len(pairs), size), desc="judge"):
            yield from judge([Comparison(pair.prompt, *(load_media(path, args.num_frames) for path in pair[1:]))
                              for pair in pairs[start:start + size]])

    pairs, labels, types = zip(*rows)
    result = evaluate_judge(ask, pairs, labels, random.Random(args.seed), types=types)
    texts, lines = [verdict.text for verdict in result.pop("verdicts")], []
    for name, value in [*result.items(), *result["by_type"].items()]:
        if isinstance(value, (int, float)):
            span = "  95 %: {:.3f} to {:.3f}".format(*result[name + "_95"]) if name + "_95" in result else ""
            lines.append(f"  {name:22s} " + (f"{value:.3f}" if isinstance(value, float) else f"{value}") + span)
    return {**result, "texts": texts}, "\n".join(lines), [], ""


def score(args, judge, media):
    scores, lines = [parse_score(text) for text in judge([Candidate(args.prompt, images) for images in media])], []
    for item, found in zip(args.items, scores):
        parts = "".join(f"  {name} {value:g}" for name, value in found.parts.items())
        lines.append(f"{item}: {'no score' if found.value is None else format(found.value, 'g')}{parts}")
        lines += [f"   ! {issue}" for issue in found.issues]
    return [{"item": item, **found._asdict()} for item, found in zip(args.items, scores)], "\n".join(lines), [], ""


if __name__ == "__main__":
    main()
