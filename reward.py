"""Verdicts as rewards: ask a vision-language judge which of two images or videos is better, read its JSON verdict, and turn the
verdicts on a group into win rates and advantages (UnifiedReward-Flex, arXiv 2602.02380).

    python reward.py A.png B.png --prompt "a red circle above a blue square"      the verdict as a tree; seconds on a CPU
    python reward.py rank 1.png 2.png 3.png --prompt "..." --html report.html     a group: win rates and advantages
    python reward.py eval pairs.jsonl --judge http://localhost:8000               a judge's exam on labelled pairs
    python reward.py score A.png B.png --prompt "..."                             each by itself

Reading order: the question (TEMPLATE, build_messages), the answer (parse_verdict, parse_score), the arithmetic (schedule_pairs,
win_rates, group_advantages), the judges (LocalJudge, ServerJudge), other rewards, the exam (evaluate_judge), the commands.
The file imports nothing of ours: copy it anywhere. Shapes: G items of one prompt, B items in all, D anchors (A, B, C), T tokens.
"""
import argparse
import base64
import contextlib
import functools
import html
import http.client
import importlib.util
import io
import json
import math
import os
import random
import re
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._pytree import tree_map
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------ the question

ANCHORS = {
    "Image": ("A. Semantic Alignment & Accuracy", "B. Image Quality & Realism", "C. Aesthetics & Artistry"),
    "Video": ("A. Semantic Alignment & Accuracy", "B. Video Quality & Dynamic Realism",
              "C. Narrative, Aesthetics & Cinematography"),
}
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


class Comparison(NamedTuple):
    """One question to a judge. A medium is a list of PIL images: one for an image, the sampled frames for a video."""
    prompt: str
    media_1: list
    media_2: list


class Candidate(NamedTuple):
    """The other question to a judge: one candidate, to be scored by itself."""
    prompt: str
    media: list


def instruction(prompt, medium="Image", template=None):
    """The text of the question. `template` (default TEMPLATE) holds {prompt}, and {medium} and {anchors} if it likes; other braces
    stay as they are. The prompt goes in last, so braces in it are never read as placeholders."""
    template = TEMPLATE if template is None else template
    if not prompt.strip():
        raise ValueError("the prompt is empty; the judge needs the text that both candidates were generated from")
    if "{prompt}" not in template:
        raise ValueError("the template has no {prompt}; put {prompt} where the text of the prompt belongs")
    return template.replace("{anchors}", "\n".join(ANCHORS[medium])).replace("{medium}", medium).replace("{prompt}", prompt)


def build_messages(question, template=None):
    """(messages, images) of a Comparison or a Candidate: one user message in the chat format of transformers, all images first and
    the text last, and the flat list of its PIL images. Training and judging both call this, so they share one wording. Frames of a
    video are fed as images, as the original does; the medium is Video when a candidate has more than one frame."""
    prompt, *media = question
    images = [image for candidate in media for image in candidate]
    medium = "Video" if max(map(len, media)) > 1 else "Image"
    text = instruction(prompt, medium, template or (TEMPLATE if len(media) == 2 else SCORE_TEMPLATE))
    return [{"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]}], images


def chat_text(processor, messages):
    """The prompt of the model as text, up to where its answer begins; a template that can think is told not to."""
    thinking = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **thinking)


def load_media(item, num_frames=8):
    """A list of PIL RGB images: one for an image; `num_frames` sampled uniformly for a GIF, an mp4 (or whatever else `av` reads) or
    a folder of frames. ValueError names a file that cannot be read."""
    if isinstance(item, Image.Image):
        return [item]
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")

    def sample(num):                                        # the chosen ones of `num` frames
        return [round(i * (num - 1) / max(num_frames - 1, 1)) for i in range(num_frames)] if num > num_frames else list(range(num))

    path, frames = Path(item), []
    try:
        if path.is_dir():
            files = [p for p in path.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
            files.sort(key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name)])       # 2 before 10
            frames = [Image.open(files[i]).convert("RGB") for i in sample(len(files))]
        elif path.suffix.lower() in (".mp4", ".mov", ".mkv", ".webm", ".avi"):
            import av
            with av.open(str(path)) as video:
                wanted = sample(sum(1 for _ in video.decode(video=0)))
            with av.open(str(path)) as video:
                frames = [frame.to_image() for i, frame in enumerate(video.decode(video=0)) if i in wanted]
        else:
            image = Image.open(path)
            for i in sample(getattr(image, "n_frames", 1) if path.suffix.lower() in (".gif", ".webp", ".apng") else 1):
                image.seek(i)
                frames.append(image.convert("RGB"))
    except ImportError:
        raise ValueError(f"{path}: reading videos needs PyAV: pip install av. Or pass a folder of frames") from None
    except (OSError, LookupError, ValueError, EOFError, Image.DecompressionBombError) as error:        # av's errors are of these kinds
        raise ValueError(f"{path}: not a readable image or video ({error})") from None
    if not frames:
        raise ValueError(f"{path}: no frames (png, jpg or webp) in it")
    return frames


# ------------------------------------------------------------------------------------------------ the answer

@dataclass
class Dim:
    name: str
    reason_1: str = ""
    reason_2: str = ""
    score_1: float | None = None
    score_2: float | None = None


@dataclass
class Category:
    name: str
    anchor: str | None = None       # 'A', 'B', 'C'; None: the judge added it
    dims: list = field(default_factory=list)
    reason: str = ""
    winner: int | None = None       # 1, 2, 0: a tie, None: unreadable


@dataclass
class Verdict:
    winner: int | None = None       # 1, 2, 0: a declared tie, None: undecided, which is not a tie
    categories: list = field(default_factory=list)
    reason: str = ""
    issues: list = field(default_factory=list)      # what was repaired, what contradicts itself
    text: str = ""                  # what the judge said


@dataclass
class Score:
    value: float | None = None      # the final score, else the mean of the parts; None: unreadable
    parts: dict = field(default_factory=dict)       # 'Alignment Score' -> 4.0, ...; the scale is the judge's
    issues: list = field(default_factory=list)
    text: str = ""


class Failure(str):
    """What a judge hands back where it could not ask: the reason. It never counts as an answer."""


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
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:"]|[^\s{}\[\],:"]+', re.S)
_CLOSER = {"{": "}", "[": "]"}
_MAX_DEPTH, _MAX_OBJECTS = 50, 20       # a verdict is one object, 5 deep; json.loads gives up near 1000


def _read_winner(value, pattern=_WINNER):
    """1, 2, 0 for a tie, or None. The whole value must say it: 'Image 1/2' and 'not Image 1' are None."""
    value = f"{value:g}" if isinstance(value, float) else value
    if not isinstance(value, str) or len(value) > 200:
        return None
    value = " ".join(value.strip(" \t\r\n*`'\".!").lower().split())
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


_Root = namedtuple("_Root", "source repaired keys winners sound end")


def _scan(text, start):
    """The outermost bracket that opens at text[start], read in one pass over the tokens with a stack: linear, no recursion.

    keys and winners (the values of 'winner', as written) are those at depth 1, the root's own. `repaired` has no trailing commas,
    a comma where one is missing, and ends, if the text was truncated, after the last complete value. At a closer that does not
    fit the scan stops with sound=False: beyond it nobody can tell root from nested.
    """
    stack, out, keys, winners = [], [], [], []
    value_start, sound, end = None, True, len(text)
    safe = 0, 0         # (tokens of out, open brackets) after which closing what is open gives JSON
    for match in _TOKEN.finditer(text, start):
        token = match[0]
        if token == '"':
            break                                           # a string without an end: the text was cut here
        if token[0] in '"{[' and out and out[-1] not in ("{", "[", ",", ":"):
            out.append(",")
        if token in _CLOSER:
            stack.append(token)
            sound = len(stack) <= _MAX_DEPTH
        elif token in ("}", "]"):
            sound = token == _CLOSER[stack.pop()]
            if out[-1] == ",":
                out.pop()
        elif token == ":" and stack == ["{"] and out[-1][0] == '"' and out[-2] in ("{", ","):
            if value_start and keys[-1] == "winner":        # a comma was missing: where that value ends is a guess
                winners.append("")
            keys.append(out[-1][1:-1])
            value_start = match.end()
        if value_start and (not stack or token == "," and stack == ["{"]):
            winners += [text[value_start:match.start()]] if keys[-1] == "winner" else []
            value_start = None
        if token in (",", "}", "]"):
            safe = len(out) + (token != ","), len(stack)
        out.append(token)
        if not (stack and sound):
            end = match.end()
            break
    if value_start and keys[-1] == "winner":                # cut inside the winner: believed only if the contract's words are whole
        whole = re.fullmatch(r'\s*"(?:Image|Video) [12]"[\s`]*', text[value_start:])
        winners.append(whole[0] if whole else "")
    repaired = " ".join(out[:safe[0]] + [_CLOSER[bracket] for bracket in reversed(stack[:safe[1]])])
    return _Root(text[start:end], repaired, keys, winners, sound, end)


def parse_verdict(text):
    """The Verdict in a judge's text; never raises on a str, linear time. Older formats: see _read_claims.

    The overall winner is the value of `winner` in the one outermost JSON object and nothing else: a category's winner is never
    taken for it, and two objects or two values that disagree leave the verdict undecided (None). Whatever was repaired (fences,
    text around, missing or trailing commas, a truncated tail) or is inconsistent (scores against the winner, sums other than 10)
    is listed in `issues`. A malformed category costs that category only.
    """
    verdict, roots, position = Verdict(text=text), [], 0
    issues = verdict.issues
    if isinstance(text, Failure):
        issues.append(f"no answer: {text}")
        return verdict
    said = text.rpartition("</think>")[2]                   # what it thought is no answer
    if "<think>" in said:
        issues.append("cut while thinking")
        return verdict
    if "{" not in said:
        return _read_claims(verdict, said)
    while len(roots) < _MAX_OBJECTS and (match := re.compile(r"[{\[]").search(said, position)):
        roots.append(_scan(said, match.start()))
        position = roots[-1].end if roots[-1].sound else len(said)
    candidates = [root for root in roots if root.source[0] == "{" and {"winner", "categories"} & set(root.keys)]
    if not candidates or len(roots) == _MAX_OBJECTS:
        issues.append("no JSON object with a verdict")
        return verdict

    written = [value.strip() for root in candidates for value in root.winners or [""]]
    winners = {_read_winner(value) for value in written}
    if len(candidates) > 1:
        issues.append(f"{len(candidates)} JSON objects, expected one")
    if not all(root.sound for root in candidates):
        issues.append("brackets do not match")
    elif any({"name", "dims", "cat_winner"} & set(root.keys) for root in candidates):
        issues.append("a category without the object around it")
    elif len(winners) > 1 or None in winners:
        issues.append(f"no clear overall winner: {', '.join(written)[:100] or 'none given'}")
    else:
        verdict.winner = winners.pop()

    root, data = candidates[0], {}
    if root.source != said.strip():
        issues.append("text around the JSON object")
    try:
        data = json.loads(root.source, parse_int=float)
    except (ValueError, RecursionError):
        try:
            data = json.loads(root.repaired, parse_int=float, strict=False)
            issues.append("JSON repaired")
        except (ValueError, RecursionError):
            issues.append("JSON unreadable beyond its winner")
    verdict.reason = _get(data, "reason")
    for category in _get(data, "categories", list):
        if _get(category, "name"):
            verdict.categories.append(_read_category(category, issues))
        else:
            issues.append("a category is not an object with a name, skipped")
    anchors = [category.anchor for category in verdict.categories]
    issues += [f"category {anchor} is missing" for anchor in _KEYWORDS if anchor not in anchors]
    issues += [f"category {anchor} comes twice, the first one counts" for anchor in _KEYWORDS if anchors.count(anchor) > 1]
    return verdict


def _read_claims(verdict, said):
    """The verdict of a text without JSON: UnifiedReward's ranking ('Image 1 is better than Image 2.', 'Both videos are equally good.',
    answers of a VLM too) and UnifiedReward-Think's <think>criteria with scores out of 10</think><answer>Image 1 is better</answer>.

    A claim counts only as a whole sentence, the last sentence must be one, and all must agree: 'if Image 1 is better', 'not', and a
    section's winner before an unclear end leave the verdict undecided.
    """
    rows = [Dim(name, reason_1.strip(" ;-:"), reason_2.strip(" ;-:"), float(score_1), float(score_2))
            for name, score_1, reason_1, score_2, reason_2 in _CRITERION.findall(verdict.text)]
    if rows:
        verdict.categories.append(Category("Criteria", dims=rows))
    if answers := re.findall(r"<answer>([^<]*)</answer>", said):
        claims = [_read_winner(answer) for answer in answers]
    else:
        joined = re.sub(r"(?<![.!;:*>\n])\n(?!\n)", " ", said)                 # a line that is no end of a sentence goes on
        sentences = [sentence for part in re.split(r"[.!;\n]+", joined.lower()) if (sentence := part.strip(" *#\t\r"))]
        claims = [_read_winner(_THEREFORE.sub("", sentence, 1), _CLAIM) if len(sentence) < 200 else None for sentence in sentences]
        claims = [] if claims[-1:] == [None] else [claim for claim in claims if claim is not None]
    if len(set(claims)) == 1 and claims[0] is not None:
        verdict.winner = claims[0]
    else:
        verdict.issues.append(f"claims that disagree or say nothing: {claims[:9]}" if claims
                              else "no JSON object with a verdict, and no clear claim")
    return verdict


def parse_score(text):
    """The Score in a judge's pointwise text; never raises on a str, linear time.

    'Final Score: 4' decides (UnifiedReward: 1 to 5 for images, 1 to 10 for videos, 0 to 100 for answers); without one the mean of
    the lines named so, as 'Alignment Score (1-5): 3.5'. Other parts ('visual quality: 4', 'a red circle (object): 1') are only kept. Two
    final scores that differ, and a score line that cannot be read, are no score.
    """
    score = Score(text=text)
    if isinstance(text, Failure):
        score.issues.append(f"no answer: {text}")
        return score
    finals, found = {float(match[1]) for match in _FINAL.finditer(text)}, _PART.findall(text)
    score.parts = {name: float(number) for name, number in found if name.lower() != "final score"}
    scores = [value for name, value in score.parts.items() if name.lower().endswith("score")]
    if "final score" in text.lower():
        score.value = finals.pop() if len(finals) == 1 else None
    elif scores and len(scores) == len(re.findall(r"score\b[^:\n]{0,20}:", text, re.I)):        # each such line was read, and none twice
        score.value = sum(scores) / len(scores)
    if score.value is None:
        score.issues.append("no clear score")
    return score


def _get(data, key, kind=str):
    """data[key] if it is of that kind, else an empty one: a judge may write anything anywhere."""
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, kind) else kind()


def _read_score(value):
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*(?:/\s*10\s*)?", value)):
        value = float(match[1])
    return value if isinstance(value, float) and math.isfinite(value) else None


def _read_category(data, issues):
    """A Category from its JSON object; appends to `issues`."""
    name, winner = _get(data, "name"), _read_winner(data.get("cat_winner"))
    category = Category(name, _read_anchor(name), reason=_get(data, "cat_reason"), winner=winner)
    lead, where = 0, name[:60]
    for row in _get(data, "dims", list):
        scores = [_get(row, key, object) for key in ("score_1", "score_2")]
        score_1, score_2 = map(_read_score, scores)
        dim = Dim(_get(row, "name"), _get(row, "reason_1"), _get(row, "reason_2"), score_1, score_2)
        category.dims.append(dim)
        if score_1 is None or score_2 is None:
            issues.append(f"{where} / {dim.name[:60]}: a score is missing")
            continue
        lead += score_1 - score_2
        if score_1 + score_2 != 10:
            issues.append(f"{where} / {dim.name[:60]}: the scores {score_1:g} + {score_2:g} are not 10")
        if str in map(type, scores):
            issues.append(f"{where} / {dim.name[:60]}: a score is text")
    if winner is None:
        issues.append(f"{where}: no readable cat_winner")
    elif winner and lead and (lead > 0) != (winner == 1):
        issues.append(f"{where}: the winner goes against its own scores")
    return category


_SAID = {1: "1 wins", 2: "2 wins", 0: "tie", None: "undecided"}


def format_verdict(verdict, prompt=None):
    """The verdict as a tree for the terminal: categories, sub-dimensions with both scores and reasons, winners, issues."""
    lines = [f"prompt: {prompt}"] if prompt else []
    for category in verdict.categories:
        lines.append(f"├─ {category.name}: {_SAID[category.winner]}{'' if category.anchor else '  (added by the judge)'}")
        for dim in category.dims:
            score_1, score_2 = ("?" if score is None else f"{score:g}" for score in (dim.score_1, dim.score_2))
            lines.append(f"│  ├─ {dim.name}  {score_1} : {score_2}")
            lines += [f"│  │    {side}: {reason}" for side, reason in ((1, dim.reason_1), (2, dim.reason_2)) if reason]
        lines += [f"│  └─ {category.reason}"] if category.reason else []
    lines.append(f"└─ overall: {_SAID[verdict.winner]}{'. ' if verdict.reason else ''}{verdict.reason}")
    return "\n".join(lines + [f"   ! {issue}" for issue in verdict.issues])


# ------------------------------------------------------------------------------------------------ the arithmetic

def schedule_pairs(groups, pairs="all", rng=random, both_orders=False):
    """Which items meet, and who is shown first: [(first, second), ...], each unordered pair at most once.

    groups is the number of items of one prompt, or one group id (a prompt) per item: pairs never cross groups. "all" gives all
    G(G-1)/2 pairs of a group; "ring:K" seats its items at random on a ring where each meets its next K, so 2K each (with K = G/2
    the opposite one comes once). The order within a pair is a coin flip: judges favour a position, and a fixed order hands that
    favour to the same items every time. `both_orders` asks every pair twice, in either order.
    """
    ring = re.fullmatch(r"ring:(\d+)", pairs)
    if pairs != "all" and not ring:
        raise ValueError(f"pairs is '{pairs}'; expected 'all' or 'ring:K', for example 'ring:3'")
    members, out = {}, []
    for i, group in enumerate([0] * groups if isinstance(groups, int) else groups):
        members.setdefault(group, []).append(i)
    for group, items in members.items():
        n = len(items)
        if n < 2:
            raise ValueError(f"group {group!r} has {n} item; a comparison needs at least 2")
        chosen = combinations(items, 2)
        if ring:
            if not 1 <= int(ring[1]) <= n // 2:
                raise ValueError(f"pairs is '{pairs}' for {n} items; K goes from 1 to {n // 2}, or use 'all'")
            seat = rng.sample(items, n)
            chosen = sorted({tuple(sorted((seat[i], seat[(i + k) % n]))) for i in range(n) for k in range(1, int(ring[1]) + 1)})
        out += [pair if rng.random() < 0.5 else pair[::-1] for pair in chosen]
    return [p for pair in out for p in (pair, pair[::-1])] if both_orders else out


@dataclass
class WinRates:
    overall: torch.Tensor           # (B,) R_all; NaN: no decided comparison
    category: torch.Tensor          # (B,) R_cat; NaN: no category vote
    anchors: dict                   # anchor -> (B,) R_d
    num_decided: int                # a winner was named
    num_ties: int                   # a tie was declared
    num_undecided: int              # unreadable or contradictory; left out of every rate
    first_position_wins: int        # of num_decided; near one half for a judge without position bias


def win_rates(pairs, verdicts, num_items, count_extra=False, category_weights=None):
    """WinRates of B items, of one prompt or several; winner 1 of a verdict means that the first of its pair won.

    R_d(i) = wins of i on anchor d / comparisons of i on anchor d, a tie being half a win (Sec. 3.3.2 of arXiv 2602.02380, with
    the comparisons that took place instead of G - 1). R_cat(i) = mean of R_d(i) over the anchors that have a value for i, weighted
    by `category_weights` ({'A': 1., ...}, default equal). An undecided verdict is left out of both counts together with its
    categories, and so is a category without a readable winner. Categories the judge added are in no rate, as in the paper;
    `count_extra` makes them one more anchor, 'D'.
    """
    if len(pairs) != len(verdicts):
        raise ValueError(f"{len(pairs)} pairs but {len(verdicts)} verdicts; expected one verdict per pair")
    names = ["overall", *_KEYWORDS] + ["D"] * count_extra
    wins, counts = torch.zeros(2, len(names), num_items, dtype=torch.float64)               # (1 + D, B) each
    for (first, second), verdict in zip(pairs, verdicts):
        votes = {"overall": verdict.winner}
        for category in verdict.categories if verdict.winner is not None else []:
            votes.setdefault(category.anchor or "D", category.winner)
        for row, name in enumerate(names):
            if votes.get(name) is not None:
                share = {1: 1.0, 2: 0.0, 0: 0.5}[votes[name]]
                wins[row, first] += share
                wins[row, second] += 1 - share
                counts[row, [first, second]] += 1
    overall, *anchors = wins / counts                                                       # 0 / 0 = NaN: never compared
    rates = torch.stack(anchors)                                                            # (D, B)
    weights = torch.tensor([(category_weights or {}).get(name, 1.0) for name in names[1:]], dtype=torch.float64)
    weights = weights[:, None] * ~rates.isnan()
    category = (weights * rates.nan_to_num()).sum(0) / weights.sum(0)
    winners = [verdict.winner for verdict in verdicts]
    # float32 out of float64: rates equal on paper become equal bit by bit, (0 + .2 + 1) / 3 and (.4 + .4 + .4) / 3 are not
    return WinRates(overall.float(), category.float(), dict(zip(names[1:], rates.float())),
                    num_decided=winners.count(1) + winners.count(2), num_ties=winners.count(0),
                    num_undecided=winners.count(None), first_position_wins=winners.count(1))


def normalize(values, groups=None, std_floor=0.0, normalize_std=True, eps=1e-8):
    """z = (x - mean) / (max(std, std_floor) + eps) of (B,) values inside each group (default: one group).

    The std is the unbiased one (divisor G - 1): the paper does not say, the original code takes it. A group whose values are all
    equal, bit by bit, gives exactly zero; an item without a value (NaN) gets 0 and enters neither mean nor std.
    `normalize_std=False` leaves the division out; `std_floor` keeps a nearly dead group (one decided pair among ties) quiet.
    """
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
    a judge that names no categories, that side counts alone. Worked: rates 1, .5, 0 on both sides give 1, 0, -1 for any alpha.
    """
    if blend not in ("advantages", "rates"):
        raise ValueError(f"blend is {blend!r}; expected 'advantages' or 'rates'")
    category, overall = rates.category, rates.overall
    alpha = torch.full_like(category, alpha).masked_fill(category.isnan(), 0).masked_fill(~category.isnan() & overall.isnan(), 1)
    if blend == "rates":
        mixed = alpha.double() * category.nan_to_num() + (1 - alpha.double()) * overall.nan_to_num()
        return normalize(mixed.round(decimals=6).float().masked_fill(category.isnan() & overall.isnan(), math.nan), groups, **options)
    return alpha * normalize(category, groups, **options) + (1 - alpha) * normalize(overall, groups, **options)


def blend_advantages(parts, normalize_batch=False, eps=1e-8):
    """(B,) sum_k w_k A_k of several rewards' advantages, [(w_k, A_k), ...]; A_k of a further reward is its `normalize`d value.

    The original scripts take 0.7 of the verdicts and 0.3 of CLIP and then, with `normalize_batch`, normalise the sum once more over
    the whole batch of all ranks, which the paper does not mention.
    """
    mixed = sum(weight * advantages for weight, advantages in parts)
    return normalize(mixed, eps=eps) if normalize_batch else mixed


# ------------------------------------------------------------------------------------------------ the judges

@functools.lru_cache
def without_video(stock):
    """The processor class `stock` (Qwen3VLProcessor, ...) less its video processor, which cannot be built without torchvision.
    Frames come as images, so nothing is lost. It saves under the stock name with the video settings written along, so that the
    folder loads as an ordinary one where torchvision is installed."""
    class Processor(stock):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template)
            self.video_settings = {"video_processor_type": stock.__name__.replace("2_5_", "2").replace("Proc", "VideoProc")}

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
    for name in ("processor_config", "video_preprocessor_config", "preprocessor_config", "tokenizer_config"):
        if file := cached_file(path, f"{name}.json", _raise_exceptions_for_missing_entries=False):
            settings[name] = json.loads(Path(file).read_text(encoding="utf-8"))
    names = [values["processor_class"] for values in settings.values() if "processor_class" in values]
    stock = getattr(transformers, names[0], None) if names else None
    if is_torchvision_available() or stock is None or "video_processor" not in stock.get_attributes():
        return transformers.AutoProcessor.from_pretrained(path)
    processor = without_video(stock).from_pretrained(path)
    video_settings = settings.get("processor_config", {}).get("video_processor") or settings.get("video_preprocessor_config", {})
    processor.video_settings = {**processor.video_settings, **video_settings}
    return processor


@contextlib.contextmanager
def share_images(model, processor):
    """While open, a distinct image (one PIL object) is preprocessed and seen by the vision tower once a batch and its result repeated: in a
    group each image meets several others. For models that pack images in one row and pass on their grid (the Qwen-VL family)."""
    stock, tower = processor.image_processor, getattr(getattr(model, "model", None), "visual", None)
    if tower is None or "image_grid_thw" not in stock.model_input_names:
        yield
        return
    place, sizes = [], []                                   # of each image its number among the distinct ones; patches of these

    class Once:
        def __getattr__(self, name):
            return getattr(stock, name)

        def __call__(self, images, **kwargs):
            distinct = {id(image): image for image in images}
            out, order = stock(images=list(distinct.values()), **kwargs), list(distinct)
            grid = torch.as_tensor(out["image_grid_thw"])
            place[:], sizes[:] = [order.index(id(image)) for image in images], grid.prod(1).tolist()
            rows = torch.as_tensor(out["pixel_values"]).split(sizes)
            out["pixel_values"], out["image_grid_thw"] = torch.cat([rows[k] for k in place]), grid[place]
            return out

    def before(module, args, kwargs):
        first = [place.index(k) for k in range(len(sizes))]
        rows = args[0].split([sizes[k] for k in place])
        return (torch.cat([rows[i] for i in first]), *args[1:]), {**kwargs, "grid_thw": kwargs["grid_thw"][first]}

    def after(module, args, kwargs, output):
        def repeat(x):
            for chunks in ([size // module.spatial_merge_size ** 2 for size in sizes], sizes):
                if torch.is_tensor(x) and x.dim() and len(x) == sum(chunks):
                    parts = x.split(chunks)
                    return torch.cat([parts[k] for k in place])
            return x
        return tree_map(repeat, output)

    hooks = [tower.register_forward_pre_hook(before, with_kwargs=True), tower.register_forward_hook(after, with_kwargs=True)]
    processor.image_processor = Once()
    try:
        yield
    finally:
        processor.image_processor = stock
        for hook in hooks:
            hook.remove()


class LocalJudge:
    """judge(questions) -> texts, by a transformers model: LocalJudge(path), or LocalJudge(model=, processor=) for one in memory.

    Questions are Comparisons or Candidates. template=None reads `template.txt` in the folder (sft.py writes it, so that a judge
    keeps the wording it was trained on) and else takes TEMPLATE; score_template is the wording for Candidates. A path is loaded to
    `device` (default: the GPU, else the CPU) in `dtype` (default: bfloat16 on a GPU, float32 on a CPU). For a model in memory
    another dtype than its own means autocast, on a GPU only: on a CPU it would cast the weights anew for every token.
    """
    def __init__(self, path=None, *, model=None, processor=None, template=None, score_template=None, device=None, dtype=None,
                 batch_size=64, max_new_tokens=2048):
        if (path is None) == (model is None) or (model is not None and processor is None):
            raise ValueError("LocalJudge takes a path, or a model and its processor")
        if path is not None:
            from transformers import AutoModelForImageTextToText
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval()
            if device.type == "cpu":
                model.set_attn_implementation("eager")      # faster there, token by token
            processor = load_processor(path)
            if template is None and (Path(path) / "template.txt").is_file():
                template = (Path(path) / "template.txt").read_text(encoding="utf-8")
        self.model, self.processor, self.dtype = model, processor, dtype
        self.templates = {Comparison: template, Candidate: score_template}
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def __call__(self, questions, temperature=0.0, progress=False):
        """One text per question, in order. Greedy at temperature 0, else sampled from the whole distribution (no top-k or top-p).
        Batches hold similar lengths, the longest first, so that memory runs out at once or never."""
        chats = [build_messages(question, self.templates[type(question)]) for question in questions]
        prompts = [chat_text(self.processor, messages) for messages, _ in chats]
        rgb = {id(image): image if image.mode == "RGB" else image.convert("RGB") for _, images in chats for image in images}
        images = [[rgb[id(image)] for image in images] for _, images in chats]
        # roughly the number of tokens: one for 32 x 32 pixels, one for 4 characters
        sizes = [sum(image.width * image.height for image in row) / 1024 + len(text) / 4 for row, text in zip(images, prompts)]
        order = sorted(range(len(prompts)), key=lambda i: -sizes[i])
        texts, was_training = [None] * len(prompts), self.model.training
        self.model.eval()
        try:
            for start in tqdm(range(0, len(order), self.batch_size), desc="judge", disable=not progress):
                batch = order[start:start + self.batch_size]
                answers = self._generate([prompts[i] for i in batch], [image for i in batch for image in images[i]], temperature)
                for i, answer in zip(batch, answers):
                    texts[i] = answer
        finally:
            self.model.train(was_training)
        return texts

    @torch.inference_mode()
    def _generate(self, prompts, images, temperature):
        tokenizer, weight = self.processor.tokenizer, next(self.model.parameters())
        sampling = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        cast = torch.autocast(weight.device.type, dtype=self.dtype, enabled=weight.is_cuda and self.dtype not in (None, weight.dtype))
        with share_images(self.model, self.processor), cast:
            inputs = self.processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
            tokens = self.model.generate(
                **inputs.to(weight.device), **sampling, max_new_tokens=self.max_new_tokens, repetition_penalty=1.0, use_cache=True,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)       # (B, T)
        return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def data_url(image):
    """The image inlined as PNG, so nothing is lost."""
    image.convert("RGB").save(file := io.BytesIO(), "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hands back every answer of a server, whatever its status."""
    http_response = https_response = lambda self, request, response: response


_BROKEN, _MALFORMED = (OSError, http.client.HTTPException), (ValueError, LookupError, TypeError, RecursionError)


class ServerJudge:
    """judge(questions) -> texts, by OpenAI-compatible servers: ServerJudge(["http://localhost:8000", ...]).

    `concurrency` requests are in flight, spread over the URLs; temperature 0 and a seed are sent, since servers otherwise sample
    as the model's generation_config says. Timeouts, broken connections and the statuses 408, 429 and 5xx are tried `retries` times
    more, at the next URL, after a growing pause; whatever else is wrong is not. No request takes longer than `timeout` seconds.
    What stays without an answer comes back as a Failure. model=None asks the servers what they serve, and raises ValueError when none
    answers. `extra` is merged into the request, for example {"chat_template_kwargs": {"enable_thinking": False}}.
    """
    def __init__(self, urls, model=None, template=None, score_template=None, concurrency=32, timeout=300.0, retries=4,
                 max_new_tokens=2048, seed=0, extra=None):
        self.urls = [re.sub(r"(/v1)?(/chat/completions)?/*$", "", url) for url in urls]
        self.templates = {Comparison: template, Candidate: score_template}
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.body, reasons = {"model": model, "max_tokens": max_new_tokens, "seed": seed, **(extra or {})}, []
        for url in self.urls:
            if not re.match(r"https?://\w", url):
                raise ValueError(f"judge {url!r} is no URL; expected http://HOST:PORT")
            try:
                status, data = (0, b"") if self.body["model"] else self._open(f"{url}/v1/models", timeout=min(timeout, 30))
                if status not in (0, 200):
                    raise ConnectionError(f"HTTP {status}: {data[:300].decode(errors='replace')}")
                self.body["model"] = self.body["model"] or json.loads(data)["data"][0]["id"]
            except _BROKEN + _MALFORMED as error:
                reasons.append(f"{url}: {error!r}")
        if not self.body["model"]:
            raise ValueError("no judge answers: " + "; ".join(reasons) + ". Start one, for example: vllm serve MODEL --port 8000")

    def _open(self, url, body=None, timeout=None):
        """(status, bytes) that the server answers, or TimeoutError: a thread is left behind when a server drips or hangs. The loopback
        is never asked through a proxy."""
        host, timeout, box = urllib.parse.urlsplit(url).hostname or "", timeout or self.timeout, []
        direct = host in ("localhost", "::1") or host.startswith("127.")
        opener = urllib.request.build_opener(_AnyStatus, *[urllib.request.ProxyHandler({})] * direct)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}

        def ask():
            try:
                with opener.open(urllib.request.Request(url, body, headers), timeout=timeout) as response:
                    box.append((response.status, response.read()))
            except Exception as error:                                          # handed to the thread that waits
                box.append(error)
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout)
        if not box:
            raise TimeoutError(f"no whole answer within {timeout:g} s")
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]

    def _ask(self, number, body):
        """One answer, or a Failure with the last reason."""
        for attempt in range(self.retries + 1):
            url = self.urls[(number + attempt) % len(self.urls)]
            try:
                status, data = self._open(f"{url}/v1/chat/completions", body)
                reason = f"{url}: HTTP {status}: {data[:300].decode(errors='replace')}"
                if status == 200:
                    text = json.loads(data)["choices"][0]["message"]["content"]
                    return text if isinstance(text, str) else Failure(f"{reason} holds no text")
                if status not in (408, 429) and status < 500:
                    return Failure(reason)
            except _BROKEN as error:                                            # refused, reset, broken off, timed out
                reason = f"{url}: {error!r}"
            except _MALFORMED as error:
                return Failure(f"{reason} is not a chat completion ({error!r})")
            if attempt < self.retries:
                time.sleep(min(.25 * 2 ** attempt, 8))
        return Failure(f"{reason} (after {self.retries + 1} tries)")

    def __call__(self, questions, temperature=0.0, progress=False):
        """One text or Failure per question, in order. Every image is encoded once (PNG, so nothing is lost)."""
        chats, urls = [build_messages(question, self.templates[type(question)]) for question in questions], {}
        for image in (image for _, images in chats for image in images):
            urls[id(image)] = urls.get(id(image)) or data_url(image)

        def ask(number):
            (message,), images = chats[number]
            parts = [{"type": "image_url", "image_url": {"url": urls[id(image)]}} for image in images]
            messages = [{"role": "user", "content": parts + message["content"][len(images):]}]
            return self._ask(number, json.dumps({**self.body, "messages": messages, "temperature": temperature}).encode())

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(tqdm(pool.map(ask, range(len(chats))), desc="judge", total=len(chats), disable=not progress))


def open_judge(judge=None, max_new_tokens=2048, template=None, score_template=None, **options):
    """A judge by name: URLs joined by commas, with #MODEL behind them where the server serves several, a folder, a hub id, or the
    newest judge trained in the current folder."""
    options.update(max_new_tokens=max_new_tokens, template=template, score_template=score_template)
    if judge and judge.startswith(("http://", "https://")):
        options.pop("batch_size", None)
        urls, _, model = judge.partition("#")
        return ServerJudge(urls.split(","), model or None, **options)
    return LocalJudge(judge or find_judge(), **options)


def find_judge():
    """The newest judge trained in the current folder."""
    folders = [path.parent for stage in ("dpo", "sft") for path in Path("out").glob(f"judge-{stage}/model/config.json")]
    if not folders:
        raise ValueError("no judge in out/judge-dpo/model or out/judge-sft/model; train one with `python sft.py`, or pass --judge")
    return max(folders, key=lambda folder: (folder / "config.json").stat().st_mtime)


# ------------------------------------------------------------------------------------------------ other rewards
# A reward is a function (media, prompts) -> one float per item, NaN where it has no opinion; a medium is a list of PIL images.

class ClipScore:
    """Cosine similarity of CLIP's embeddings of prompt and image, -1 to 1, the mean over the frames of a video."""

    def __init__(self, path="openai/clip-vit-large-patch14", device=None):
        from transformers import AutoModel, AutoProcessor
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.processor = AutoModel.from_pretrained(path).to(self.device).eval(), AutoProcessor.from_pretrained(path)

    @torch.inference_mode()
    def __call__(self, media, prompts):
        scores = []
        for images, prompt in zip(media, prompts):
            inputs = self.processor(text=[prompt], images=images, return_tensors="pt", padding=True, truncation=True)
            out = self.model(**inputs.to(self.device))
            scores.append(F.cosine_similarity(out.image_embeds, out.text_embeds).mean().item())
        return scores


def score_items(judge, media, prompts):
    """Scores of each item by itself, by a judge that was trained to score."""
    return [parse_score(text) for text in judge([Candidate(prompt, images) for images, prompt in zip(media, prompts)])]


def open_rewards(text, judge=None):
    """[(weight, name, function), ...] of "flex:0.7,clip:0.3". Names: flex, the pairwise verdicts, whose function is None; score, the
    judge's pointwise scores; clip, or clip@FOLDER; FILE.py:function, called with lists of media and prompts. Weights default to 1."""
    rewards = []
    for part in text.split(","):
        name, _, weight = part.strip().rpartition(":")
        try:
            weight = float(weight)
        except ValueError:
            name, weight = part.strip(), 1.0
        if not math.isfinite(weight):
            raise ValueError(f"the weight of reward '{name}' is {weight}; expected a number")
        path, _, function = name.rpartition(":")
        if name == "flex":
            rewards.append((weight, name, None))
        elif name == "score":
            rewards.append((weight, name, lambda *x: [math.nan if s.value is None else s.value for s in score_items(judge, *x)]))
        elif name.split("@")[0] == "clip":
            rewards.append((weight, name, ClipScore(*name.split("@")[1:])))
        elif path.endswith(".py") and Path(path).is_file():
            spec = importlib.util.spec_from_file_location(Path(path).stem, path)
            spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
            if not callable(getattr(module, function, None)):
                raise ValueError(f"{path} has no function {function}")
            rewards.append((weight, name, getattr(module, function)))
        else:
            raise ValueError(f"reward '{name}' is unknown; expected flex, score, clip, clip@FOLDER or FILE.py:function, "
                             "each with :WEIGHT if you like")
    return rewards


def asks_judge(text):
    """Whether one of the rewards in "flex:0.7,clip:0.3" needs a judge."""
    return any(part.split(":")[0].strip() in ("flex", "score") for part in text.split(","))


def reward_values(reward, media, prompts):
    """(B,) values of one entry of open_rewards; ValueError when its function returns something else."""
    said = reward[2](media, prompts)
    try:
        values = torch.as_tensor(said, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError):
        values = torch.tensor(math.inf)
    if values.shape != (len(media),) or values.isinf().any():
        raise ValueError(f"reward {reward[1]} returned {said!r} for {len(media)} items; expected one finite number (or NaN) for each")
    return values


# ------------------------------------------------------------------------------------------------ the exam

def interval(num_right, num):
    """(low, high): Wilson's 95 % interval of a share."""
    if not num:
        return math.nan, math.nan
    z, p = 1.959964, num_right / num
    centre, half = p + z * z / (2 * num), z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    return (centre - half) / (1 + z * z / num), (centre + half) / (1 + z * z / num)


def _read_vote(vote, default=None):
    """1, 2, 0 or None of a vote in any of accuracy's forms; what is none of them gives `default`, or ValueError without one."""
    names = {"left": 1, "right": 2, "tie": 0, "bothbad": 0, 1: 1, 2: 2, 0: 0, None: None}
    key = re.sub(r"[\s_]|vote$", "", vote.lower()) if isinstance(vote, str) else vote
    if default is None and key not in names:
        raise ValueError(f"vote {vote!r}; expected left, right, tie or both bad, or 1, 2, 0")
    return names.get(key, default)


def accuracy(votes, ties=False):
    """(share right, its 95 % interval, number of pairs) of [(judge's vote, people's vote), ...].

    A vote is 'left', 'right', 'tie' or 'both bad' (as in GenAI-Bench, 'leftvote' ... 'bothbad_vote' too), or 1, 2, 0; None, undecided,
    is wrong. Without ties ("diff") the pairs that people call a tie or both bad are left out; with ties ("tau") they count, and
    are right when the judge says tie or both bad.
    """
    votes = [(_read_vote(a), _read_vote(b)) for a, b in votes]
    if any(b is None for _, b in votes):
        raise ValueError("a vote of people is None; expected left, right, tie or both bad, or 1, 2, 0")
    right = [a == b for a, b in votes if b or ties]
    return sum(right) / len(right) if right else math.nan, interval(sum(right), len(right)), len(right)


def evaluate_judge(judge, comparisons, labels, rng, swap=True, types=None, progress=False):
    """How good a judge is on labelled pairs, a dict. labels: 1 or 2, the better candidate, or 0, a tie.

    Every pair is shown in a random order from `rng`, the label moving along, and with `swap` in the other order too.
        winner_accuracy       share of right winners in the random order, ties of people left out ("diff"); undecided is wrong
        tau_accuracy          the same with ties, right when the judge says tie; each with its 95 % interval, *_95
        parse_rate            share of texts with an overall winner and all three anchors
        sum10_rate            share of sub-dimensions whose two scores sum to 10
        swap_consistency      share of pairs whose two orders name the same winner; undecided is inconsistent; NaN without swap
        first_position_share  share of first-position wins among decided verdicts; one half without position bias
        failures              questions that the judge could not be asked
        by_type               {type: winner_accuracy}, where `types` holds one per pair
        verdicts and flipped  the verdicts in the random order, and whether that order was (2, 1)
    """
    flipped = [rng.random() < 0.5 for _ in comparisons]
    both = [(a, Comparison(a.prompt, a.media_2, a.media_1)) for a in comparisons]
    shown = [pair[flip] for pair, flip in zip(both, flipped)] + [pair[not flip] for pair, flip in zip(both, flipped) if swap]
    verdicts = [parse_verdict(text) for text in judge(shown, **{"progress": True} if progress else {})]
    winners = [{1: 2, 2: 1}.get(verdict.winner, verdict.winner) if flip else verdict.winner         # of the content, not the place
               for verdict, flip in zip(verdicts, flipped + [not flip for flip in flipped])]
    first, second = winners[:len(both)], winners[len(both):]
    mean = lambda values: sum(values) / len(values) if values else math.nan
    by_type = {kind: [vote for vote, t in zip(zip(first, labels), types) if t == kind] for kind in dict.fromkeys(types or [])}
    diff, tau = accuracy(zip(first, labels)), accuracy(zip(first, labels), ties=True)
    return {
        "winner_accuracy": diff[0], "winner_accuracy_95": diff[1], "tau_accuracy": tau[0], "tau_accuracy_95": tau[1],
        "parse_rate": mean([verdict.winner is not None and {"A", "B", "C"} <= {c.anchor for c in verdict.categories} for verdict in verdicts]),
        "sum10_rate": mean([None not in (d.score_1, d.score_2) and d.score_1 + d.score_2 == 10
                            for v in verdicts for c in v.categories for d in c.dims]),
        "swap_consistency": mean([a == b and a is not None for a, b in zip(first, second)]),
        "first_position_share": mean([verdict.winner == 1 for verdict in verdicts if verdict.winner]),
        "failures": sum(isinstance(verdict.text, Failure) for verdict in verdicts), "num_pairs": len(both),
        "by_type": {kind: accuracy(votes)[0] for kind, votes in by_type.items()},
        "verdicts": verdicts[:len(both)], "flipped": flipped,
    }


def read_pairs(path):
    """[(prompt, [first, second], 1 | 2 | 0, type or None)] of a JSONL file {"prompt", "images" or "videos", "winner", "type"}. Paths are
    relative to the file; 'Image 1', 'Video 2', 'Tie' and GenAI-Bench's votes are winners. ValueError names a bad line."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                row = json.loads(line)
                first, second = [Path(path).parent / item for item in row.get("videos") or row["images"]]
                if (winner := _read_vote(row["winner"], _read_winner(row["winner"]))) is None:
                    raise ValueError("no winner")
                kind = None if row.get("type") is None else str(row["type"])
                rows.append((instruction(row["prompt"], template="{prompt}"), [first, second], winner, kind))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: {error!r} in {line[:200]!r}. Expected {{\"prompt\": \"...\", \"images\": [first, second], "
                             f"\"winner\": \"Image 1\" | \"Image 2\" | \"Tie\"}}") from None
    if not rows:
        raise ValueError(f"{path}: no pairs in it")
    return rows


# ------------------------------------------------------------------------------------------------ the report

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}h1{font-size:1.3em}
h2{font-size:1.1em;margin:1.6em 0 .3em}table{border-collapse:collapse;width:100%}td{padding:.35em .6em;border-bottom:1px solid #e4e4e4;vertical-align:top}
tr:first-child{font-weight:600}.rubric{table-layout:fixed}.rubric td:first-child{width:24%}.rubric td:nth-child(3){width:150px}
figure{display:inline-block;margin:.4em 1em .4em 0;padding:.3em;border-radius:6px}figure img{height:200px;margin-right:3px;border:1px solid #ccc;
image-rendering:pixelated}figcaption{font-weight:600}.won{background:#d9f0df}.bar{display:flex;width:140px;margin-top:.2em;border-radius:3px;overflow:hidden;
font-size:.8em;line-height:1.4em;color:#fff}.bar i{background:#2f6fde;padding-left:.4em;font-style:normal}.bar b{background:#e07b2f;padding-right:.4em;
text-align:right;flex:1;font-weight:400}.issue{background:#fff3b0;padding:.2em .6em;margin:.2em 0}summary{cursor:pointer;margin:.4em 0}"""


def _figure(title, images, won=False):
    """An HTML figure of one candidate, its frames side by side, inlined as PNG."""
    tags = "".join(f'<img src="{data_url(image)}" alt="">' for image in images)
    return f'<figure class="{"won" if won else ""}"><figcaption>{html.escape(str(title))}</figcaption>{tags}</figure>'


def _table(header, rows, kind=""):
    """An HTML table; cells are escaped, and a tuple's text is put in as it is."""
    cell = lambda v: v[0] if isinstance(v, tuple) else html.escape(f"{v:.3f}" if isinstance(v, float) else str(v))
    return f'<table class="{kind}">' + "".join("<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row) + "</tr>" for row in [header, *rows]) + "</table>"


def verdict_html(verdict):
    """The rubric of one verdict: a table per category with both reasons and the scores as bars, what was repaired in yellow."""
    out = []
    for category in verdict.categories:
        out.append(f"<h2>{html.escape(category.name)}: {_SAID[category.winner]}{'' if category.anchor else ' (added by the judge)'}</h2>")
        rows = []
        for dim in category.dims:
            score_1, score_2 = (None if s is None else max(s, 0) for s in (dim.score_1, dim.score_2))
            share = None if None in (score_1, score_2) or not score_1 + score_2 else 100 * score_1 / (score_1 + score_2)
            bar = "?" if share is None else (f'<div class="bar"><i style="width:{share:.0f}%">{score_1:g}</i><b>{score_2:g}</b></div>',)
            rows.append([dim.name, dim.reason_1, bar, dim.reason_2])
        out.append(_table(["", "1", "", "2"], rows, "rubric") + f"<p>{html.escape(category.reason)}</p>")
    out.append(f"<h2>Overall: {_SAID[verdict.winner]}</h2><p>{html.escape(verdict.reason)}</p>")
    return "".join(out + [f'<div class="issue">{html.escape(issue)}</div>' for issue in verdict.issues])


def write_report(path, title, body):
    """One self-contained HTML file."""
    Path(path).write_bytes((f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
                          f"<h1>{html.escape(title)}</h1>{body}</html>").encode(errors="replace"))
    print(f"report: {path}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ the commands

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("Reading order")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("items", nargs="+", metavar="ITEM", help="nothing, rank, eval or score; then images, GIFs, videos, folders of frames, or a file of pairs")
    add("--prompt", help="the text that the candidates were generated from")
    # judge
    add("--judge", help="folder, hub id or URLs joined by commas; default: the newest of out/judge-dpo/model and out/judge-sft/model")
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
    want = {"compare": (2, 2), "rank": (2, math.inf), "eval": (1, 1), "score": (1, math.inf)}[args.command]
    if not want[0] <= len(args.items) <= want[1]:
        parser.error(f"{args.command} takes {want[0]} {'items' if want[0] == want[1] else 'or more items'}, not {len(args.items)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")                                # a judge may write half a character
    from transformers.utils import logging
    logging.set_verbosity_error()                                               # their notices drown the verdict
    logging.disable_progress_bar()
    try:
        template = Path(args.template).read_text(encoding="utf-8") if args.template else None
        instruction("-" if args.command == "eval" else args.prompt or "", template=template)       # fails before the judge is loaded
        rows = read_pairs(args.items[0]) if args.command == "eval" else []
        media = [load_media(item, args.num_frames) for item in ([] if rows else args.items)]
        templates = {"score_template" if args.command == "score" else "template": template}
        judge = open_judge(args.judge, args.max_new_tokens, **templates) if args.command != "rank" or asks_judge(args.reward) else None
        commands = {"compare": compare_command, "rank": rank_command, "eval": eval_command, "score": score_command}
        commands[args.command](args, judge, media or rows)
    except (ValueError, OSError) as error:
        raise SystemExit(f"reward.py: {error}") from error


def _json(value):
    """Strict JSON: NaN, which stands for 'no value', becomes null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))


def compare_command(args, judge, media):
    text, = judge([Comparison(args.prompt, *media)])
    if isinstance(text, Failure):
        raise ValueError(text)
    verdict = parse_verdict(text)
    print(text if args.json else format_verdict(verdict, args.prompt))
    if args.html:
        figures = "".join(_figure(f"{i}: {path}", m, verdict.winner == i) for i, (path, m) in enumerate(zip(args.items, media), 1))
        write_report(args.html, args.prompt, figures + verdict_html(verdict))


def rank_command(args, judge, media):
    parts, columns, out, pairs, verdicts = [], {}, {}, [], []
    for reward in open_rewards(args.reward, judge):
        if reward[2]:
            columns[reward[1]] = reward_values(reward, media, [args.prompt] * len(media))
            parts.append((reward[0], normalize(columns[reward[1]])))
            continue
        pairs = schedule_pairs(len(media), args.pairs, random.Random(args.seed), args.both_orders)
        verdicts = [parse_verdict(text) for text in judge([Comparison(args.prompt, media[i], media[j]) for i, j in pairs], progress=True)]
        failures = [verdict.text for verdict in verdicts if isinstance(verdict.text, Failure)]
        if failures:
            print(f"{len(failures)} of {len(pairs)} questions failed: {failures[0]}", file=sys.stderr)
        if len(failures) == len(pairs):
            raise ValueError("the judge answered nothing")
        rates = win_rates(pairs, verdicts, len(media))
        columns.update({"win rate": rates.overall, **rates.anchors})
        parts.append((reward[0], group_advantages(rates, args.alpha)))
        out = {"pairs": len(pairs), "ties": rates.num_ties, "undecided": rates.num_undecided, "first_position_wins": rates.first_position_wins}
    columns["advantage"] = blend_advantages(parts)
    order = columns["advantage"].argsort(descending=True, stable=True).tolist()
    table = [[place, args.items[i], *(column[i].item() for column in columns.values())] for place, i in enumerate(order, 1)]
    header, width = ["rank", "item", *columns], max(map(len, args.items))
    if args.json:
        print(_json({"items": [dict(zip(header, row)) for row in table], **out,
                          "verdicts": [{"first": args.items[i], "second": args.items[j], "text": v.text} for (i, j), v in zip(pairs, verdicts)]}))
    else:
        print(f"rank  {'item':{width}s}" + "".join(f"{name:>12.12s}" for name in columns))
        for place, item, *values in table:
            print(f"{place:4d}  {item:{width}s}" + "".join(f"{value:12.3f}" for value in values))
        print(", ".join(f"{value} {name.replace('_', ' ')}" for name, value in out.items()))
    if args.html:
        figures = "".join(_figure(f"{place}. {args.items[i]}", media[i]) for place, i in enumerate(order, 1))
        details = "".join(
            f"<details><summary>{html.escape(args.items[i])} (1) against {html.escape(args.items[j])} (2): {_SAID[v.winner]}</summary>"
            f"{verdict_html(v)}</details>" for (i, j), v in zip(pairs, verdicts))
        write_report(args.html, args.prompt, figures + _table(header, table) + details)


def eval_command(args, judge, rows):
    prompts, media, labels, types = zip(*rows)
    comparisons = [Comparison(prompt, *(load_media(item, args.num_frames) for item in pair)) for prompt, pair in zip(prompts, media)]
    result = evaluate_judge(judge, comparisons, labels, random.Random(args.seed), types=types if any(types) else None, progress=True)
    texts = [verdict.text for verdict in result.pop("verdicts")]
    if args.json:
        print(_json(result | {"texts": texts}))
        return
    for name, value in [*result.items(), *result["by_type"].items()]:
        if isinstance(value, (int, float)):
            span = "  95 %: {:.3f} to {:.3f}".format(*result[name + "_95"]) if name + "_95" in result else ""
            print(f"  {name:22s} " + (f"{value:.3f}" if isinstance(value, float) else f"{value}") + span)


def score_command(args, judge, media):
    scores = score_items(judge, media, [args.prompt] * len(media))
    if args.json:
        print(_json([{"item": item, **asdict(score)} for item, score in zip(args.items, scores)]))
    else:
        for item, score in zip(args.items, scores):
            parts = "".join(f"  {name} {value:g}" for name, value in score.parts.items())
            print(f"{item}: {'no score' if score.value is None else format(score.value, 'g')}" + parts
                  + "".join(f"\n   ! {issue}" for issue in score.issues))


if __name__ == "__main__":
    main()
