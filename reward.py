"""The reward: a vision-language judge compares two images or videos in a hierarchical verdict, and
the verdicts on a group become win rates and advantages (UnifiedReward-Flex, arXiv 2602.02380).
Imports nothing of ours: copy it anywhere.

    python reward.py A.png B.png --prompt "a red circle above a blue square"      one comparison
    python reward.py rank A.png B.png C.png --prompt "..." --html report.html     a ranked group
    python reward.py eval pairs.jsonl --judge http://localhost:8000               a judge's accuracy
    python reward.py score A.png B.png --prompt "..."                             pointwise scores

Seconds each with the toy judge on a CPU.  Shapes: G items of one prompt, B items, T tokens.
"""
import argparse
import base64
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
import urllib.error
import urllib.request
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# 1. The question

ANCHORS = {
    "Image": ("A. Semantic Alignment & Accuracy", "B. Image Quality & Realism",
              "C. Aesthetics & Artistry"),
    "Video": ("A. Semantic Alignment & Accuracy", "B. Video Quality & Dynamic Realism",
              "C. Narrative, Aesthetics & Cinematography"),
}
TEMPLATE = """\
Two candidates were generated for the same prompt. {medium} 1 is shown first, {medium} 2 second. \
Decide which one serves the prompt better, and show how you got there.

Prompt: {prompt}

Judge under these three categories, always and in this order:
{anchors}
You may add one category "D. ..." of your own when this prompt calls for a criterion that the \
three do not hold.

In every category pick 3 to 5 sub-dimensions that matter for this prompt and these candidates. For \
each, write what you see in {medium} 1 and in {medium} 2, then share 10 points between them: \
score_1 + score_2 = 10. Then say in one or two sentences who wins the category: "{medium} 1", \
"{medium} 2", or "Tie" when nothing separates them. Last, weigh the categories by what the prompt \
asks for and name one overall winner. Your winners must agree with your scores and reasons.

Answer with one JSON object and nothing else:
{"prompt": "...", "categories": [{"name": "A. ...", "dims": [{"name": "...", "reason_1": "...", \
"reason_2": "...", "score_1": 6, "score_2": 4}], "cat_reason": "...", "cat_winner": "{medium} 1, \
{medium} 2 or Tie"}], "reason": "...", "winner": "{medium} 1 or {medium} 2"}"""
SCORE_TEMPLATE = """\
Rate this {medium} that was generated for a prompt. Prompt: {prompt}

Say briefly what agrees with the prompt and what does not, then end with these lines, each with \
one number:
Alignment Score (1-5): how well it shows what the prompt asks for
Coherence Score (1-5): how free of defects and how plausible it is
Style Score (1-5): how good it looks
Final Score: your overall rating from 1 to 5"""


@dataclass(frozen=True)
class Comparison:
    """Which of the two is better? A medium is a list of PIL images: one image, or video frames."""
    prompt: str
    media_1: list
    media_2: list


@dataclass(frozen=True)
class Candidate:
    """How good is it by itself?"""
    prompt: str
    media: list


def instruction(prompt, medium="Image", template=TEMPLATE):
    """The text of the question: {prompt} in the template filled in, {medium} and {anchors} where it
    has them; other braces stay. ValueError: an empty prompt, a template without {prompt}."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; the judge needs the text that was generated from")
    if "{prompt}" not in template:
        raise ValueError("the template has no {prompt}; put {prompt} where the prompt belongs")
    text = template.replace("{anchors}", "\n".join(ANCHORS[medium]))
    return text.replace("{medium}", medium).replace("{prompt}", prompt)


def build_messages(question, template=None):
    """(messages, images): one user message in the chat format of transformers, all images first and
    the text last, and its PIL images. Candidates of several frames make it a question of videos."""
    is_pair = isinstance(question, Comparison)
    media = [question.media_1, question.media_2] if is_pair else [question.media]
    medium = "Video" if max(map(len, media)) > 1 else "Image"
    images = sum(media, [])
    template = template or (TEMPLATE if is_pair else SCORE_TEMPLATE)
    text = instruction(question.prompt, medium, template)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}], images


def chat_text(processor, messages):
    """The model's input as text, thinking switched off where the chat template has that switch."""
    has_switch = "enable_thinking" in str(processor.chat_template)
    options = {"enable_thinking": False} if has_switch else {}
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **options)


def find_medium(item, folder):
    """The path of the medium that a record in a file in `folder` names, or its data URL as it is.
    ValueError: a web address, a file that does not exist."""
    if item.startswith("data:"):
        return item
    if "://" in item:
        raise ValueError(f"{item[:100]} is a URL. Download it and name the file.")
    path = Path(folder, item)
    if not path.exists():
        raise ValueError(f"{path} does not exist. Paths are relative to the JSONL file.")
    return path


def load_media(item, num_frames=8):
    """A list of PIL images: one of an image (a file, a data URL, a PIL image), at most num_frames
    evenly spaced ones of a GIF, a video (by `av`), a folder or a list. ValueError: unreadable."""
    if isinstance(item, Image.Image):
        return [item]
    frames = item if isinstance(item, list) else read_frames(str(item), num_frames)
    if not frames:
        raise ValueError(f"{item}: no frames (png, jpg or webp) in it")
    return evenly_spaced(frames, num_frames)


def evenly_spaced(items, num):
    steps = torch.linspace(0, len(items) - 1, min(num, len(items)), dtype=torch.float64)
    return [items[i] for i in steps.round().int()]


def read_frames(path, num_frames):
    kind = Path(path).suffix.lower()
    file = path
    try:
        if path.startswith("data:"):
            file = io.BytesIO(base64.b64decode(path.partition(",")[2], validate=True))
        elif Path(path).is_dir():
            files = [entry for entry in Path(path).iterdir()
                     if entry.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
            files.sort(key=lambda entry: (len(entry.name), entry.name))         # 2 before 10
            return [Image.open(entry).convert("RGB") for entry in evenly_spaced(files, num_frames)]
        elif kind in (".mp4", ".mov", ".mkv", ".webm", ".avi"):
            import av
            with av.open(path) as video:
                frames = evenly_spaced(list(video.decode(video=0)), num_frames)
                return [frame.to_image() for frame in frames]
        image = Image.open(file)
        frames = ImageSequence.Iterator(image) if kind in (".gif", ".webp", ".apng") else [image]
        return [frame.convert("RGB") for frame in frames]
    except ImportError:
        raise ValueError(f"{path}: reading videos needs PyAV: pip install av") from None
    except (OSError, LookupError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path[:200]}: not a readable image or video ({error})") from None


# ------------------------------------------------------------------------------------------------
# 2. The verdict. A winner is 1, 2, 0 for a declared tie, or None: undecided, which is not a tie.

class Failure(str):
    """What a judge returns where it could not ask: the reason. It never counts as an answer."""


@dataclass
class Criterion:
    """A sub-dimension: what the judge saw in either candidate, and how it shared ten points."""
    name: str
    reason_1: str
    reason_2: str
    score_1: float | None
    score_2: float | None

    def total(self):
        missing = None in (self.score_1, self.score_2)
        return None if missing else self.score_1 + self.score_2


@dataclass
class Category:
    name: str
    anchor: str | None = None           # "A", "B", "C"; None for a category that the judge added
    criteria: list[Criterion] = field(default_factory=list)
    reason: str = ""
    winner: int | None = None


@dataclass
class Verdict:
    winner: int | None = None
    categories: list[Category] = field(default_factory=list)
    reason: str = ""
    issues: list[str] = field(default_factory=list)     # what was repaired or contradicts itself
    text: str = ""

    def winner_on(self, anchor):
        """The winner of the first category with that anchor, None without one."""
        winners = [category.winner for category in self.categories if category.anchor == anchor]
        return winners[0] if winners else None


NOUN = "(?:image|video|candidate|option|answer|response)"
FIRST = rf"(?:the )?(?:{NOUN}[ _#:-]*(?:1|a|one)|1|a|first(?: {NOUN}| one)?)"
SECOND = rf"(?:the )?(?:{NOUN}[ _#:-]*(?:2|b|two)|2|b|second(?: {NOUN}| one)?)"
WINS = (r" (?:wins|(?:is|looks) (?:(?:much|slightly|clearly|the) )*"
        rf"(?:better|best|winner|preferred|superior)(?: {NOUN}| one)?(?: (?:than|to|over) OTHER)?)")
TIE = (r"(?:it's |it is )?(?:a )?(?:tie|tied|draw|equal)"
       rf"|(?:both|the two) {NOUN}s are equal(?:ly (?:good|bad))?")
CLAIMS = {1: FIRST + WINS.replace("OTHER", SECOND),
          2: SECOND + WINS.replace("OTHER", FIRST), 0: TIE}
WINNERS = {1: f"{FIRST}|{CLAIMS[1]}", 2: f"{SECOND}|{CLAIMS[2]}", 0: TIE}
LETTER = re.compile(r"\W*(?:category\s+)?([a-z])\**\s*(?:[.:)\]–—-]|$)", re.I)
KEYWORDS = {"A": "semantic", "B": "(?:image|video|visual) quality|realism",
            "C": "aesthetic|artistry|cinematograph"}


def parse_verdict(text):
    """The Verdict in a judge's text: JSON, or the sentences of older judges. Never raises on a str,
    takes linear time; where the text does not say one clear winner, the winner is None."""
    verdict = Verdict(text=text)
    answer = text.rpartition("</think>")[2]             # what the judge thought is no answer
    if isinstance(text, Failure):
        verdict.issues.append(f"no answer: {text}")
    elif "<think>" in answer:
        verdict.issues.append("cut while thinking")
    elif "{" in answer:
        read_json(answer, verdict)
    else:
        read_sentences(answer, verdict)
    return verdict


def read_winner(value, patterns=WINNERS):
    """1, 2, 0 for a tie, or None. The whole value must say it: "Image 1/2" and "not Image 1" are
    None. With patterns=CLAIMS it must be a sentence, "Image 1 is better"."""
    value = str(value).removesuffix(".0").strip(" \t\r\n*`'\".!").lower()
    value = " ".join(value.split())
    for winner, pattern in patterns.items():
        if re.fullmatch(pattern, value):
            return winner
    return None


def read_anchor(name):
    """"A", "B", "C" by the leading letter ("A. x", "B: x", "**C**"), without a letter by a keyword;
    None for a category that the judge added."""
    letter = LETTER.match(name[:200])
    if letter:
        return letter[1].upper() if letter[1].upper() in KEYWORDS else None
    anchors = [anchor for anchor, words in KEYWORDS.items() if re.search(words, name[:200], re.I)]
    return anchors[0] if len(anchors) == 1 else None


# ---------------------------------------- JSON, as the template asks for it

CLOSER = {"{": "}", "[": "]"}
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:"]|[^\s`{}\[\],:"]+', re.S)
POINTS = re.compile(r"\s*(\d{1,3}(?:\.\d{1,20})?)\s*(?:/\s*10\s*)?")


def read_json(answer, verdict):
    """Fill in the verdict from the one JSON object in the answer. Its own "winner" decides, never a
    category's; objects or values that disagree are undecided. Fences, text around, commas and a cut
    tail are repaired, which `issues` records. A malformed category costs that category only."""
    issues = verdict.issues
    try:
        roots = find_objects(answer)
    except ValueError as error:
        issues.append(str(error))
        return
    if len(roots) != 1:
        issues.append(f"{len(roots)} JSON objects with a verdict, expected one")
    winners = []
    for root in roots:
        winners += written_values(root, "winner") or ["none given"]
    if len({read_winner(winner) for winner in winners}) == 1:
        verdict.winner = read_winner(winners[0])
    if verdict.winner is None:
        issues.append(f"no clear overall winner: {', '.join(winners)[:100]}")
    data = load_json(answer, roots, issues)
    verdict.reason = get_typed(data, "reason", str)
    for row in get_typed(data, "categories", list):
        if get_typed(row, "name", str):
            verdict.categories.append(read_category(row, issues))
        else:
            issues.append("a category is not an object with a name, skipped")
    anchors = [category.anchor for category in verdict.categories]
    for anchor in KEYWORDS:
        if anchor not in anchors:
            issues.append(f"category {anchor} is missing")
        elif anchors.count(anchor) > 1:
            issues.append(f"category {anchor} comes twice, the first one counts")


def load_json(answer, roots, issues):
    """The first root as Python data, {} where it cannot be read."""
    try:
        return json.loads(answer, parse_int=float)
    except ValueError:
        issues.append("JSON repaired, or text around it")
    try:
        return to_data(roots[0]) if roots else {}
    except ValueError:
        issues.append("JSON unreadable beyond its winner")
        return {}


def find_objects(text):
    """The outermost JSON objects with a verdict, as read_brackets gives them. ValueError: a bracket
    does not match, or a category stands alone; then nobody can tell root from nested."""
    objects = []
    end = 0
    for opener in re.finditer(r"[{\[]", text):
        if opener.start() < end:
            continue
        root, end = read_brackets(text, opener.start())
        if written_values(root, "name") or written_values(root, "dims"):
            raise ValueError("a category stands alone")
        if written_values(root, "winner") or written_values(root, "categories"):
            objects.append(root)
    return objects


def read_brackets(text, start):
    """([opener, token or nested list, ...], end) of the bracket at text[start], in one pass."""
    root = [text[start]]
    stack = [root]
    for match in TOKEN.finditer(text, start + 1):
        token = match[0]
        if token == '"':                                # a string without an end
            break
        if token in CLOSER:
            stack.append([token])
            stack[-2].append(stack[-1])
        elif token not in ("}", "]"):
            stack[-1].append(token)
        elif token != CLOSER[stack.pop()[0]]:
            raise ValueError("brackets do not match")
        elif not stack:
            return root, match.end()
        if len(stack) > 50:                             # a verdict is 5 deep
            raise ValueError("brackets do not match: 50 are open")
    if isinstance(root[-1], str) and not re.fullmatch('"(Image|Video) [12]"', root[-1]):
        root[-1] = "... cut"                            # 1 may be the beginning of 12
    return root, len(text)


def split_members(node):
    """The members of an object, [key, ":", value] each if sound, split at commas and where one is
    missing."""
    members = [[]]
    for item in node[1:]:
        last = members[-1]
        if item == ",":
            members.append([])
        elif item == ":" and len(last) > 3 and last[-1][0] == '"':
            members.append([last.pop(), ":"])
        else:
            last.append(item)
    return members


def written_values(node, key):
    """What is written as the value of the object's key, each time that it comes."""
    members = split_members(node) if node[0] == "{" else []
    return [" ".join(map(str, member[2:])) for member in members if member[:2] == [f'"{key}"', ":"]]


def to_data(node):
    """The Python value of a token or nested list, without half-written members. ValueError."""
    if isinstance(node, str):
        return json.loads(node, strict=False, parse_int=float)
    if node[0] == "[":
        return [to_data(item) for item in node[1:] if item != ","]
    members = [member for member in split_members(node) if len(member) > 2]
    return {str(to_data(key)): to_data(value) for key, _, value in members}


def get_typed(data, key, kind):
    """data[key] if it is of that kind, else an empty one: a judge may write anything anywhere."""
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, kind) else kind()


def read_category(data, issues):
    """The Category of a JSON object with a name; `issues` records where it contradicts itself."""
    name = data["name"]
    criteria = []
    lead = 0.0
    for row in get_typed(data, "dims", list):
        texts = [get_typed(row, key, str) for key in ("name", "reason_1", "reason_2")]
        written = [str(get_typed(row, key, object)) for key in ("score_1", "score_2")]
        points = [POINTS.fullmatch(score) for score in written]
        criterion = Criterion(*texts, *[float(match[1]) if match else None for match in points])
        criteria.append(criterion)
        problem = None
        if criterion.total() is None:
            problem = "a score is missing"
        elif criterion.total() != 10:
            problem = f"the scores {' + '.join(written)} are not 10"
        elif str in (type(row["score_1"]), type(row["score_2"])):
            problem = "a score is text"
        if problem:
            issues.append(f"{name[:60]} / {criterion.name[:60]}: {problem}")
        if criterion.total() is not None:
            lead += criterion.score_1 - criterion.score_2
    winner = read_winner(data.get("cat_winner"))
    if winner is None:
        issues.append(f"{name[:60]}: no readable cat_winner")
    elif (winner == 1 and lead < 0) or (winner == 2 and lead > 0):
        issues.append(f"{name[:60]}: the winner goes against its own scores")
    return Category(name, read_anchor(name), criteria, get_typed(data, "cat_reason", str), winner)


# ---------------------------------------- sentences of older judges, and pointwise scores

CRITERION = re.compile(
    r"^(?:<think>)?[ \t]{0,20}(?:\d{1,2}[.)] ?)?([^\s:][^:\n]{0,80}):[ \t]{0,20}\n"
    r"[ \t]{0,20}(?:Image|Video|Answer) 1 \((\d{1,2})/10\)([^\n]*)\n"
    r"[ \t]{0,20}(?:Image|Video|Answer) 2 \((\d{1,2})/10\)([^\n]*)$", re.M)
THEREFORE = re.compile(
    r"(?:(?:so|thus|therefore|hence|overall|in conclusion|conclusion|final answer|final verdict"
    r"|verdict)[ ,:]+){1,3}")
NUMBER = r"(-?\d{1,4}(?:\.\d{1,6})?)(?: ?/ ?\d{1,3})?"
SCALE = r"(?: \(\d{1,3} ?- ?\d{1,3}\))?"                # " (1-5)"
FINAL_SCORE = re.compile(
    rf"final score{SCALE}[ *:=]{{1,8}}{NUMBER}"
    r"(?![\d.,]*\d| ?[-/–~] ?\d| (?:to|or|through)\b)", re.I)
SCORE_LINE = re.compile(
    rf"^[ \t*-]{{0,8}}([A-Za-z][^:\n]{{0,60}}?){SCALE}[*]{{0,2}}:[* \t]{{1,8}}{NUMBER}"
    r"[*. \t]{0,8}$", re.M)


def read_sentences(answer, verdict):
    """Fill in the verdict from UnifiedReward's "Image 1 is better than Image 2.", "Both videos are
    equally good.", or UnifiedReward-Think's criteria and <answer>Image 1 is better</answer>.
    A claim counts only as a whole sentence, the last sentence must be one, and all must agree: "if
    Image 1 is better" and a section's winner before an unclear end are undecided."""
    criteria = []
    for name, score_1, reason_1, score_2, reason_2 in CRITERION.findall(verdict.text):
        reasons = [reason.strip(" ;-:") for reason in (reason_1, reason_2)]
        criteria.append(Criterion(name, *reasons, float(score_1), float(score_2)))
    if criteria:
        verdict.categories = [Category("Criteria", criteria=criteria)]
    claims = [read_winner(claim) for claim in re.findall(r"<answer>([^<]*)</answer>", answer)]
    if not claims:
        lines = re.sub(r"(?<![.!;:*>\n])\n(?!\n)", " ", answer.lower())        # wrapped lines
        for sentence in re.split(r"[.!;\n]+", lines):
            sentence = sentence.strip(" *#\t\r")
            if sentence:
                claims.append(read_winner(THEREFORE.sub("", sentence, 1), CLAIMS))
        claims = [claim for claim in claims if claim is not None] + claims[-1:]
    if len(set(claims)) == 1:
        verdict.winner = claims[0]
    if verdict.winner is None:
        verdict.issues.append("no JSON object, and no claim or claims that disagree")


@dataclass
class Score:
    value: float | None                                 # on the judge's scale
    parts: dict[str, float]                             # {"Alignment Score": 4.0, ...}
    issues: list[str]
    text: str


def parse_score(text):
    """The Score in a judge's pointwise text; never raises on a str, linear time. "Final Score: 4"
    decides, else the mean of the lines named so, as "Alignment Score (1-5): 3.5"; other parts
    ("visual quality: 4") are only kept. Final scores that differ and score lines that cannot be
    read give None."""
    if isinstance(text, Failure):
        return Score(None, {}, [f"no answer: {text}"], text)
    finals = {float(match[1]) for match in FINAL_SCORE.finditer(text)}
    parts = {name: float(number) for name, number in SCORE_LINE.findall(text)
             if name.lower() != "final score"}
    scores = [number for name, number in parts.items() if name.lower().endswith("score")]
    num_lines = len(re.findall(r"score\b[^:\n]{0,20}:", text, re.I))
    value = None
    if "final score" in text.lower():
        value = finals.pop() if len(finals) == 1 else None
    elif scores and len(scores) == num_lines:           # each was read, and none came twice
        value = sum(scores) / len(scores)
    return Score(value, parts, ["no clear score"] if value is None else [], text)


# ------------------------------------------------------------------------------------------------
# 3. From verdicts to advantages

def sample_pairs(num_items, pairs="all", rng=random, both_orders=False):
    """[(first, second), ...]: which of G items are compared, and who is shown first, at random, as
    judges favour a position. "all": all G(G-1)/2 pairs; "ring:K": each item meets its next K on a
    random ring. both_orders gives every pair in either order."""
    match = re.fullmatch(r"all|ring:(\d+)", pairs)
    if not match:
        raise ValueError(f"pairs is '{pairs}'; expected 'all' or 'ring:K', for example 'ring:3'")
    num_next = int(match[1] or num_items // 2)          # on a ring of K = G/2 all meet all
    if num_items < 2:
        raise ValueError(f"{num_items} item; a comparison needs at least 2")
    if not 1 <= num_next <= num_items // 2:
        raise ValueError(f"pairs is '{pairs}' for {num_items} items; K goes from 1 to "
                         f"{num_items // 2}, or use 'all'")
    ring = rng.sample(range(num_items), num_items)
    chosen = set()
    for i in range(num_items):
        for k in range(1, num_next + 1):
            chosen.add(tuple(sorted((ring[i - k], ring[i]))))
    ordered = [pair if rng.random() < 0.5 else pair[::-1] for pair in sorted(chosen)]
    return ordered + [pair[::-1] for pair in ordered] if both_orders else ordered


@dataclass
class WinRates:
    overall: torch.Tensor               # (G,) R_all in [0, 1], NaN: never compared
    category: torch.Tensor              # (G,) R_cat
    anchors: dict[str, torch.Tensor]    # {"A": (G,) R_A, "B": ..., "C": ...}
    num_decided: int                    # verdicts with a winner
    num_ties: int
    num_undecided: int
    first_position_wins: int            # of num_decided


def win_rates(pairs, verdicts, num_items, count_extra=False, category_weights=None):
    """WinRates of G items; winner 1 of a verdict is the first of its pair.

    R_d(i) = wins of i on anchor d / comparisons of i on d, a tie is half a win (Sec. 3.3.2 of arXiv
    2602.02380); R_cat(i) = mean over the d that have a value, weighted by category_weights
    ({"A": 1.0, ...}); R_all(i) from the overall winners. An undecided verdict counts nowhere, nor
    does a category without a readable winner. Categories that the judge added are in no rate;
    count_extra makes them a further anchor, "D".
    """
    if len(pairs) != len(verdicts):
        raise ValueError(f"{len(pairs)} pairs but {len(verdicts)} verdicts; expected one each")
    shares = {1: (1.0, 0.0), 2: (0.0, 1.0), 0: (0.5, 0.5)}

    def rate(winners):
        wins = torch.zeros(num_items, dtype=torch.float64)
        counts = torch.zeros(num_items, dtype=torch.float64)
        for pair, verdict, winner in zip(pairs, verdicts, winners):
            if verdict.winner is not None and winner is not None:
                wins[list(pair)] += torch.tensor(shares[winner], dtype=torch.float64)
                counts[list(pair)] += 1
        return wins / counts                            # 0 / 0 = NaN

    overall = [verdict.winner for verdict in verdicts]
    anchors = {name: rate([verdict.winner_on(name) for verdict in verdicts]) for name in KEYWORDS}
    if count_extra:
        anchors["D"] = rate([verdict.winner_on(None) for verdict in verdicts])
    rates = torch.stack(list(anchors.values()))         # (D, G)
    weights = [[(category_weights or {}).get(name, 1.0)] for name in anchors]
    weights = torch.tensor(weights, dtype=torch.float64) * ~rates.isnan()
    category = (weights * rates).nansum(0) / weights.sum(0)
    # float64 rounded to float32: what is equal on paper is equal bit by bit, as (0 + .2 + 1) / 3
    # and (.4 + .4 + .4) / 3 are not
    return WinRates(
        rate(overall).float(), category.float(), dict(zip(anchors, rates.float())),
        num_decided=overall.count(1) + overall.count(2), num_ties=overall.count(0),
        num_undecided=overall.count(None), first_position_wins=overall.count(1))


def normalize(values, std_floor=0.0, eps=1e-8):
    """(G,) z = (x - mean) / (max(std, std_floor) + eps) of a group's values, std with divisor G-1.
    Values that are all equal, bit by bit, give exactly 0. A missing value (NaN) gets 0 and enters
    neither mean nor std. A floor keeps a group of ties and one decided pair quiet."""
    values = values.float()
    scores = torch.zeros_like(values)
    known = ~values.isnan()
    x = values[known]
    if len(x) > 1 and x.min() != x.max():
        scores[known] = (x - x.mean()) / (x.std().clamp(min=std_floor) + eps)
    return scores


def group_advantages(rates, alpha=0.7, std_floor=0.0):
    """(G,) A = alpha z(R_cat) + (1 - alpha) z(R_all), each side normalised before the blend (Sec.
    3.3.2 of arXiv 2602.02380). Where an item has a value on one side only, as with a judge that
    names no categories, that side counts alone. Worked: rates 1, .5, 0 on both sides give 1, 0, -1.
    """
    category = normalize(rates.category, std_floor)
    overall = normalize(rates.overall, std_floor)
    advantages = alpha * category + (1 - alpha) * overall
    advantages = torch.where(rates.overall.isnan(), category, advantages)
    return torch.where(rates.category.isnan(), overall, advantages)


# ------------------------------------------------------------------------------------------------
# 4. Judges: judge(questions, temperature=0.0, progress=False) -> [text or Failure, ...]

class LocalJudge:
    """A transformers model: LocalJudge(path), or LocalJudge(model=, processor=) of one in memory.
    The wording that it was trained on is read from template.txt (for Candidates score_template.txt)
    beside its weights, unless one is given. Default device: the GPU, else the CPU; default dtype:
    bfloat16 or float32 there; default max_new_tokens: its generation config's, else 2048."""

    def __init__(self, path=None, *, model=None, processor=None, template=None, score_template=None,
                 device=None, dtype=None, batch_size=None, max_new_tokens=None):
        if (path is None) == (model is None) or (model is None) != (processor is None):
            raise ValueError("LocalJudge takes a path, or a model and its processor")
        if path is not None:
            from transformers import AutoModelForImageTextToText
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device)
            processor = load_processor(path)
            stored = {file.name: file.read_text(encoding="utf-8")
                      for file in Path(path).glob("*template.txt")}
            template = template or stored.get("template.txt")
            score_template = score_template or stored.get("score_template.txt")
        self.model = model
        self.processor = processor
        self.templates = {Comparison: template, Candidate: score_template}
        self.max_new_tokens = max_new_tokens or model.generation_config.max_new_tokens or 2048
        self.batch_size = batch_size or max(1, 50_000 // self.max_new_tokens)

    @torch.inference_mode()
    def __call__(self, questions, temperature=0.0, progress=False):
        """Texts, in order. Greedy at temperature 0, else sampled without top-k or top-p."""
        options = {"do_sample": False}
        if temperature > 0:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        tokenizer = self.processor.tokenizer
        names = inspect.signature(self.model.forward).parameters
        cache = "cache" if "cache" in names else "past_key_values"      # its older name
        was_training = self.model.training
        self.model.eval()
        texts = []
        batches = range(0, len(questions), self.batch_size)
        for start in tqdm(batches, desc="judge", disable=not progress):
            batch = questions[start:start + self.batch_size]
            chats = [build_messages(q, self.templates[type(q)]) for q in batch]
            inputs = self.processor(
                text=[chat_text(self.processor, messages) for messages, _ in chats],
                images=[images for _, images in chats],
                padding=True, padding_side="left", return_tensors="pt").to(self.model.device)
            options[cache] = growing_cache(self.model.config)
            tokens = self.model.generate(
                **inputs, **options, max_new_tokens=self.max_new_tokens, repetition_penalty=1.0,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)   # (B, T)
            answers = tokens[:, inputs["input_ids"].shape[1]:]
            texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
        self.model.train(was_training)
        return texts


def growing_cache(config):
    """A key-value cache that grows by 64 tokens at a time. The stock one copies itself at every
    token: answers of 150 tokens take 40 % longer (tests/bench_judge.py), by a static cache 30 %."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            new = torch.stack([keys, values])           # (2, B, heads, T, head_dim)
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.buffer = new
            start = self.get_seq_length()
            end = start + new.shape[3]
            if end > self.buffer.shape[3]:
                self.buffer = F.pad(self.buffer, (0, 0, 0, new.shape[3] + 64))
            self.buffer[:, :, :, start:end] = new
            self.keys, self.values = self.buffer[:, :, :, :end]
            return self.keys, self.values

    cache = DynamicCache(config=config.get_text_config())
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer
                    for layer in cache.layers]
    return cache


def load_processor(path):
    """AutoProcessor's of a folder or hub repository; where torchvision is missing and the class
    insists on a video processor, the class `without_video`."""
    import transformers
    from transformers.utils import cached_file, is_torchvision_available
    settings = {}
    for name in ("tokenizer", "preprocessor", "video_preprocessor", "processor"):
        file = cached_file(path, f"{name}_config.json", _raise_exceptions_for_missing_entries=False)
        stored = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        settings |= {"video_processor": stored} if name == "video_preprocessor" else stored
    stock = getattr(transformers, settings.get("processor_class", ""), None)
    needs_video = stock is not None and "video_processor" in stock.get_attributes()
    if is_torchvision_available() or not needs_video:
        return transformers.AutoProcessor.from_pretrained(path)
    processor = without_video(stock).from_pretrained(path)
    processor.video_settings |= settings.get("video_processor", {})
    return processor


def without_video(stock):
    """The processor class `stock` (Qwen3VLProcessor, ...) less its video processor, which needs
    torchvision; frames come as images. It saves under the stock name, with the video settings, so
    that the folder loads as an ordinary one where torchvision is installed."""
    video_type = stock.__name__.replace("2_5_", "2").replace("Processor", "VideoProcessor")

    class Processor(stock):
        video_settings = {"video_processor_type": video_type}

        @classmethod
        def get_attributes(cls):
            return [name for name in super().get_attributes() if name != "video_processor"]

        def to_dict(self):
            return {**super().to_dict(), "video_processor": self.video_settings}

    Processor.__name__ = Processor.__qualname__ = stock.__name__
    return Processor


class ServerJudge:
    """OpenAI-compatible servers: ServerJudge(["http://localhost:8000", ...]). ValueError when none
    answers. `concurrency` requests are in flight, spread over the URLs, with temperature 0 and a
    seed, since servers otherwise sample. A request that takes `timeout` seconds, breaks off or gets
    a status of 408, 429 or 5xx is tried `retries` times more, at the next URL, after a growing
    pause; then the answer is a Failure. Further fields of a request go into `body`."""

    def __init__(self, urls, model=None, template=None, score_template=None, concurrency=32,
                 timeout=300.0, retries=4, max_new_tokens=None, seed=0):
        self.urls = [re.sub(r"(/v1)?(/chat/completions)?/*$", "", url) for url in urls]
        for url in self.urls:
            if not re.match(r"https?://\w", url):
                raise ValueError(f"judge {url!r} is no URL; expected http://HOST:PORT")
        self.templates = {Comparison: template, Candidate: score_template}
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        model = model or self.request(0, "/v1/models", ("data", 0, "id"))
        if isinstance(model, Failure):
            raise ValueError(f"no judge answers: {model}. Start one: vllm serve MODEL --port 8000")
        self.body = {"model": model, "max_tokens": max_new_tokens or 2048, "seed": seed}

    def __call__(self, questions, temperature=0.0, progress=False):
        """Texts or Failures, in order."""
        jobs = [(i, question, temperature) for i, question in enumerate(questions)]
        answers = run_in_threads(self.ask, jobs, self.concurrency)
        return [answer.result() for answer in tqdm(answers, desc="judge", disable=not progress)]

    def ask(self, number, question, temperature):
        messages, images = build_messages(question, self.templates[type(question)])
        for part, image in zip(messages[0]["content"], images):
            part.update({"type": "image_url", "image_url": {"url": data_url(image)}})
        body = {**self.body, "messages": messages, "temperature": temperature}
        if temperature > 0:
            body["seed"] += number                      # else all samples of a question are one
        return self.request(number, "/v1/chat/completions", ("choices", 0, "message", "content"),
                            json.dumps(body).encode())

    def request(self, number, endpoint, keys, body=None):
        """The text at `keys` in the JSON that a server answers, or a Failure with the reason."""
        key = os.environ.get("OPENAI_API_KEY", "none")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        timeout = self.timeout if body else min(self.timeout, 30)
        for attempt in range(self.retries + 1):
            if attempt > 0:
                time.sleep(min(0.125 * 2 ** attempt, 8))
            url = self.urls[(number + attempt) % len(self.urls)]
            reason = url
            request = urllib.request.Request(url + endpoint, body, headers)
            try:            # in a thread of its own, left behind when the server drips or hangs
                status, data = run_in_threads(fetch, [(request, timeout)], 1)[0].result(timeout)
                reason = f"{url}: HTTP {status}: {data[:300].decode(errors='replace')}"
                if status in (408, 429) or status >= 500:
                    continue
                answer = json.loads(data)
                for key in keys:
                    answer = answer[key]
                if not isinstance(answer, str):
                    raise TypeError(type(answer))
                return answer
            except (OSError, HTTPException) as error:
                reason = f"{url}: no whole answer within {timeout:g} s: {error!r}"
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                return Failure(f"{reason} is not a chat completion or holds no text ({error!r})")
        return Failure(f"{reason} (after {self.retries + 1} tries)")


def run_in_threads(function, jobs, num_threads):
    """[Future of function(*job) for job in jobs], which so many threads work off in order. They are
    daemons: Ctrl-C does not wait for them."""
    futures = [Future() for _ in jobs]
    waiting = iter(list(zip(futures, jobs)))            # the threads share it

    def work():
        for future, job in waiting:
            try:
                future.set_result(function(*job))
            except BaseException as error:              # raised again by future.result()
                future.set_exception(error)

    for _ in range(min(num_threads, len(futures))):
        threading.Thread(target=work, daemon=True).start()
    return futures


def fetch(request, timeout):
    """(status, bytes) of an HTTP request. The loopback is never asked through a proxy."""
    is_loopback = re.match(r"(localhost|127[.\d]+|\[::1\])(:|$)", request.host)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if is_loopback else None))
    try:
        with opener.open(request, timeout=timeout) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def data_url(image):
    """The image inlined as PNG, so nothing is lost."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def load_function(name):
    """The function of "FILE.py:function", None where the name is not of that form. ValueError: the
    file does not define it."""
    path, _, function_name = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        return None
    function = runpy.run_path(path).get(function_name)
    if not callable(function):
        raise ValueError(f"{path} has no function {function_name}")
    return function


def load_judge(name, **options):
    """A judge by name: FILE.py:function (from questions to texts), a folder, a hub id, or URLs
    joined by commas, with #MODEL behind them where the servers have several. Options: template,
    score_template, max_new_tokens."""
    function = load_function(name)
    if function:
        return lambda questions, **_: function(questions)
    if re.match("https?://", name):
        urls, _, model = name.partition("#")
        return ServerJudge(urls.split(","), model, **options)
    return LocalJudge(name, **options)


def latest_judge():
    """The folder of the newest judge trained here, by dpo.py or sft.py."""
    configs = [*Path("out").glob("judge-dpo/model/config.json"),
               *Path("out").glob("judge-sft/model/config.json")]
    if not configs:
        raise ValueError("no judge in out/judge-dpo/model or out/judge-sft/model; train one with "
                         "`python sft.py`, or pass --judge")
    return str(max(configs, key=os.path.getmtime).parent)


# ------------------------------------------------------------------------------------------------
# 5. Other rewards: function(media, prompts) -> B floats, NaN for a missing value

@dataclass
class Reward:
    weight: float
    name: str
    function: object                    # None for "flex", the verdicts on pairs


def load_rewards(text, judge=None):
    """[Reward, ...] of "flex:0.7,clip:0.3". Names: flex, the verdicts on pairs; score, the judge's
    pointwise scores; clip or clip@FOLDER; FILE.py:function. Weights default to 1."""
    rewards = []
    for part in text.split(","):
        match = re.fullmatch(r"(.*?)(?::(-?\d*\.?\d+))?", part.strip())
        name = match[1]
        weight = float(match[2] or 1)
        if name == "flex":
            function = None
        elif name == "score":
            function = score_reward(judge)
        elif name.split("@")[0] == "clip":
            function = clip_reward(name[5:] or "openai/clip-vit-large-patch14")
        else:
            function = load_function(name)
            if function is None:
                raise ValueError(f"reward '{name}' is unknown; expected flex, score, clip, "
                                 "clip@FOLDER or FILE.py:function, and a weight as in flex:0.7")
        rewards.append(Reward(weight, name, function))
    return rewards


def needs_judge(text):
    """Whether one of the rewards in "flex:0.7,clip:0.3" needs a judge."""
    return any(part.split(":")[0].strip() in ("flex", "score") for part in text.split(","))


def score_reward(judge):
    """The reward by a judge's pointwise scores."""
    def scores(media, prompts):
        questions = [Candidate(p, load_media(frames)) for p, frames in zip(prompts, media)]
        values = [parse_score(text).value for text in judge(questions)]
        return [math.nan if value is None else value for value in values]
    return scores


def clip_reward(path):
    """The reward by CLIP: cosine similarity of prompt and image in [-1, 1], a video's mean."""
    from transformers import AutoModel, AutoProcessor
    model = AutoModel.from_pretrained(path).to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(path)

    @torch.inference_mode()
    def similarity(images, prompt):
        inputs = processor(text=[prompt], images=images, return_tensors="pt", padding=True,
                           truncation=True)
        out = model(**inputs.to(model.device))
        return torch.cosine_similarity(out.image_embeds, out.text_embeds).mean().item()
    return lambda media, prompts: list(map(similarity, media, prompts))


def reward_values(reward, media, prompts):
    """(B,) values of a Reward; ValueError when its function returns something else."""
    return check_values(reward.name, reward.function(media, prompts), len(media))


def check_values(name, values, num):
    try:
        tensor = torch.as_tensor(values, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.zeros(0)
    if tensor.shape != (num,) or tensor.isinf().any():
        raise ValueError(f"reward {name} returned {str(values)[:500]} for {num} "
                         "items; expected one finite number (or NaN) for each")
    return tensor


def measure(watch, media, prompts):
    """{name: mean over B items, without missing values} of the rewards in `watch`, {} if "none". A
    function may return several, {name: B floats}."""
    means = {}
    for reward in load_rewards(watch) if watch != "none" else []:
        values = reward.function(media, prompts)
        columns = values if isinstance(values, dict) else {reward.name: values}
        for name, column in columns.items():
            means[name] = check_values(name, column, len(media)).nanmean().item()
    return means


# ------------------------------------------------------------------------------------------------
# 6. Evaluation of a judge

def mean(values):
    return sum(values) / len(values) if values else math.nan


def interval(num_right, num):
    """(low, high): Wilson's 95 % interval of the share num_right / num; NaN where num is 0."""
    z = 1.959964
    num = num or math.nan
    share = num_right / num
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    center = share + z * z / (2 * num)
    scale = 1 + z * z / num
    return (center - half) / scale, (center + half) / scale


def read_vote(vote):
    """1, 2 or 0, a tie, of "left", "right", "tie" or "both bad" (GenAI-Bench's "leftvote" ...
    "bothbad_vote", too), of a verdict's words ("Image 1") or of 1, 2, 0. ValueError otherwise."""
    key = re.sub(r"[\s_]|vote$", "", str(vote).lower())
    winner = {"left": 1, "right": 2, "tie": 0, "bothbad": 0, "0": 0}.get(key, read_winner(vote))
    if winner is None:
        raise ValueError(f"vote {vote!r} names no winner; expected left, right, tie or both bad, "
                         "or 1, 2, 0")
    return winner


def accuracy(votes, ties=False):
    """(share right, its 95 % interval, number of pairs) of [(judge's vote, people's vote), ...], as
    `read_vote` takes them; None, undecided, is wrong. Without ties ("diff") the pairs that people
    call a tie are left out; with ties ("tau") they count, and "tie" is right."""
    right = []
    for vote, label in votes:
        winner = None if vote is None else read_vote(vote)
        if read_vote(label) != 0 or ties:
            right.append(winner == read_vote(label))
    return mean(right), interval(sum(right), len(right)), len(right)


def evaluate_judge(judge, comparisons, labels, rng, types=None):
    """{name: number}: how good a judge is on labelled pairs. labels: 1 or 2, the better candidate,
    or 0, a tie; types: one a pair. Every pair is shown in a random order and then in the other one;
    winners are turned back, so that they name candidates."""
    num = len(comparisons)
    flipped = [rng.random() < 0.5 for _ in comparisons]
    flips = flipped + [not flip for flip in flipped]
    questions = []
    for pair, flip in zip([*comparisons, *comparisons], flips):
        swapped = Comparison(pair.prompt, pair.media_2, pair.media_1)
        questions.append(swapped if flip else pair)
    verdicts = [parse_verdict(text) for text in judge(questions)]
    winners = []
    complete = []
    tens = []
    for verdict, flip in zip(verdicts, flips):
        turned = {1: 2, 2: 1}.get(verdict.winner, verdict.winner)
        winners.append(turned if flip else verdict.winner)
        anchors = {category.anchor for category in verdict.categories}
        complete.append(verdict.winner is not None and anchors >= {"A", "B", "C"})
        for category in verdict.categories:
            tens += [criterion.total() == 10 for criterion in category.criteria]
    votes = list(zip(winners, labels))                  # in the random order
    by_type = {}
    for kind in dict.fromkeys(types or []):
        if kind is not None:
            by_type[kind] = accuracy([vote for vote, t in zip(votes, types) if t == kind])[0]
    same = [a == b and a is not None for a, b in zip(winners, winners[num:])]
    diff, diff_95, _ = accuracy(votes)
    tau, tau_95, _ = accuracy(votes, ties=True)
    return {
        "winner_accuracy": diff, "winner_accuracy_95": diff_95,         # people's ties are left out
        "tau_accuracy": tau, "tau_accuracy_95": tau_95,                 # "tie" is right there
        "parse_rate": mean(complete), "sum10_rate": mean(tens),
        "swap_consistency": mean(same),
        "first_position_share": mean([v.winner == 1 for v in verdicts if v.winner]),
        "failures": sum(isinstance(verdict.text, Failure) for verdict in verdicts),
        "num_pairs": num, "by_type": by_type,
        "verdicts": verdicts[:num], "flipped": flipped,                 # in the random order
    }


def read_pairs(path):
    """(comparisons of two paths, labels 1 | 2 | 0, types or None) of a JSONL file of {"prompt",
    "images" or "videos", "winner"[, "type"]}. ValueError names a bad line."""
    comparisons = []
    labels = []
    types = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            instruction(record["prompt"])               # ValueError: it is empty
            items = record.get("videos") or record["images"]
            media = [find_medium(item, Path(path).parent) for item in items]
            comparisons.append(Comparison(record["prompt"], *media))
            labels.append(read_vote(record["winner"]))
            types.append(record.get("type"))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}:{number}: {type(error).__name__}: {error}. Expected {{"prompt": "...", '
                '"images": [first, second], "winner": "Image 1" | "Image 2" | "Tie"}') from None
    if not labels:
        raise ValueError(f"{path}: no pairs in it")
    return comparisons, labels, types


# ------------------------------------------------------------------------------------------------
# 7. The report

OUTCOME = {1: "1 wins", 2: "2 wins", 0: "tie", None: "undecided"}
STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.3em} h2{font-size:1.1em;margin:1.6em 0 .3em} img{height:200px;margin-right:3px}
table{border-collapse:collapse;width:100%;table-layout:fixed} .middle{width:150px}
td,th{padding:.35em .6em;border-bottom:1px solid #e4e4e4;vertical-align:top;text-align:left;
overflow-wrap:anywhere} summary{cursor:pointer} .won{background:#d9f0df}
figure{display:inline-block;margin:.4em 1em .4em 0;padding:.3em;border-radius:6px}
figcaption{font-weight:600} .issue{background:#fff3b0;padding:.2em .6em}
.bar{display:flex;justify-content:space-between;padding:0 .5em;border-radius:3px;color:#fff}"""


def format_points(criterion):
    return ["?" if x is None else f"{x:g}" for x in (criterion.score_1, criterion.score_2)]


def format_category(category):
    added = "" if category.anchor else "  (added by the judge)"
    return f"{category.name}: {OUTCOME[category.winner]}{added}"


def format_verdict(verdict, prompt=None):
    """The verdict as a tree for the terminal: categories, sub-dimensions with both scores and
    reasons, winners, issues."""
    lines = [f"prompt: {prompt}"] if prompt else []
    for category in verdict.categories:
        lines.append(f"├─ {format_category(category)}")
        for criterion in category.criteria:
            lines += [f"│  ├─ {criterion.name}  {' : '.join(format_points(criterion))}",
                      f"│  │    1: {criterion.reason_1}", f"│  │    2: {criterion.reason_2}"]
        lines.append(f"│  └─ {category.reason}")
    lines.append(f"└─ overall: {OUTCOME[verdict.winner]}. {verdict.reason}")
    return "\n".join(lines + [f"   ! {issue}" for issue in verdict.issues])


def verdict_html(verdict):
    """The same as HTML: a table a category, with the scores as bars, issues in yellow."""
    parts = []
    for category in verdict.categories:
        parts.append(f"<h2>{html.escape(format_category(category))}</h2>")
        parts.append('<table><tr><th><th>1<th class="middle"><th>2')
        for criterion in category.criteria:
            share = 100 * criterion.score_1 / criterion.total() if criterion.total() else 50
            points = "".join(f"<span>{x}</span>" for x in format_points(criterion))
            colors = f"linear-gradient(90deg,#2f6fde {share:.0f}%,#e07b2f 0)"
            texts = [criterion.name, criterion.reason_1, criterion.reason_2]
            name, reason_1, reason_2 = [html.escape(text) for text in texts]
            parts.append(f'<tr><td>{name}<td>{reason_1}<td><div class="bar" '
                         f'style="background:{colors}">{points}</div><td>{reason_2}')
        parts.append(f"</table><p>{html.escape(category.reason)}</p>")
    parts.append(f"<h2>Overall: {OUTCOME[verdict.winner]}</h2><p>{html.escape(verdict.reason)}</p>")
    parts += [f'<p class="issue">{html.escape(issue)}</p>' for issue in verdict.issues]
    return "".join(parts)


def report_html(title, figures, page=""):
    """A whole page that needs no network: the title, a figure for each (caption, images, whether it
    won), then `page`."""
    title = html.escape(title)
    parts = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
             f"<style>{STYLE}</style><h1>{title}</h1>"]
    for caption, images, won in figures:
        parts.append('<figure class="won">' if won else "<figure>")
        parts.append(f"<figcaption>{html.escape(caption)}</figcaption>")
        parts += [f'<img src="{data_url(image)}">' for image in images] + ["</figure>"]
    return "".join(parts) + page


# ------------------------------------------------------------------------------------------------
# 8. The commands

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("items", nargs="+", metavar="ITEM",
        help="[rank, eval or score, then] images, GIFs, videos, folders of frames; a file of pairs")
    add("--prompt", default="", help="the text that the candidates were generated from")
    # judge
    add("--judge", help="folder, hub id, URLs joined by commas or FILE.py:function  "
                        "[the newest of out/judge-dpo/model and out/judge-sft/model]")
    add("--template", help="file with the judge's instruction, holding {prompt}  [the judge's own]")
    add("--max-new-tokens", type=int, help="longest verdict  [what the judge's folder says, 2048]")
    # rank
    add("--pairs", default="all", help="all, or ring:K: each item meets its next K on a ring")
    add("--alpha", type=float, default=0.7, help="weight of the category against the overall side")
    # run
    add("--seed", type=int, default=0, help="of the order in which candidates are shown")
    add("--json", action="store_true", help="print all as JSON; compare: the judge's text")
    add("--html", help="compare and rank: write a report to this file")
    args = parser.parse_intermixed_args(argv)
    args.command = args.items.pop(0) if args.items[0] in ("rank", "eval", "score") else "compare"
    num_items = {"compare": 2, "eval": 1}.get(args.command, len(args.items))
    if len(args.items) != num_items:
        parser.error(f"{args.command} takes {num_items} items, not {len(args.items)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    from transformers.utils import logging
    logging.set_verbosity_error()                       # their notices drown the verdict
    logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")            # a judge may write half a character
    commands = {"compare": compare, "rank": rank, "eval": evaluate, "score": score}
    try:
        commands[args.command](args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"reward.py: {error}") from error


def open_judge(args):
    template = Path(args.template).read_text(encoding="utf-8") if args.template else None
    return load_judge(args.judge or latest_judge(), template=template, score_template=template,
                      max_new_tokens=args.max_new_tokens)


def open_media(args):
    instruction(args.prompt)                            # fails before a judge is loaded
    return [load_media(item) for item in args.items]


def print_json(data):
    """NaN, a missing value, becomes null."""
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    print(json.dumps(data, indent=1, ensure_ascii=False))


def write_report(args, figures, page):
    if args.html:
        page = report_html(args.prompt, figures, page)
        Path(args.html).write_text(page, encoding="utf-8", errors="replace")
        print(f"report: {args.html}", file=sys.stderr)


def compare(args):
    media = open_media(args)
    answer = open_judge(args)([Comparison(args.prompt, *media)])[0]
    if isinstance(answer, Failure):
        raise ValueError(answer)
    verdict = parse_verdict(answer)
    print(answer if args.json else format_verdict(verdict, args.prompt))
    figures = [(f"{i}: {item}", frames, verdict.winner == i)
               for i, item, frames in zip((1, 2), args.items, media)]
    write_report(args, figures, verdict_html(verdict))


def rank(args):
    media = open_media(args)
    pairs = sample_pairs(len(media), args.pairs, random.Random(args.seed))
    questions = [Comparison(args.prompt, media[i], media[j]) for i, j in pairs]
    answers = open_judge(args)(questions, progress=True)
    if all(isinstance(answer, Failure) for answer in answers):
        raise ValueError(f"the judge answered nothing: {answers[0]}")
    verdicts = [parse_verdict(answer) for answer in answers]
    rates = win_rates(pairs, verdicts, len(media))
    advantages = group_advantages(rates, args.alpha)
    columns = {"win rate": rates.overall, **rates.anchors, "advantage": advantages}
    width = max(len(item) for item in args.items)
    lines = [f"{'item':{width}}" + "".join(f"{name:>11}" for name in columns)]
    rows = []
    figures = []
    for i in advantages.argsort(descending=True, stable=True).tolist():
        numbers = {name: values[i].item() for name, values in columns.items()}
        cells = [f"{number:11.3f}" for number in numbers.values()]
        lines.append(f"{args.items[i]:{width}}{''.join(cells)}")
        rows.append({"item": args.items[i], **numbers})
        figures.append((args.items[i], media[i], False))
    lines.append(f"{len(pairs)} pairs, {rates.num_ties} ties, {rates.num_undecided} undecided, "
                 f"{rates.first_position_wins} first position wins")
    table = "\n".join(lines)
    if args.json:
        print_json({"items": rows, "pairs": pairs, "answers": answers})
    else:
        print(table)
    page = f"<pre>{html.escape(table)}</pre>"
    for (i, j), verdict in zip(pairs, verdicts):
        title = f"{args.items[i]} (1) against {args.items[j]} (2): {OUTCOME[verdict.winner]}"
        page += f"<details><summary>{html.escape(title)}</summary>{verdict_html(verdict)}</details>"
    write_report(args, figures, page)


def evaluate(args):
    comparisons, labels, types = read_pairs(args.items[0])
    judge = open_judge(args)

    def ask(questions):                                 # the images of 64 at a time are in memory
        answers = []
        for start in tqdm(range(0, len(questions), 64), desc="judge"):
            answers += judge([Comparison(q.prompt, load_media(q.media_1), load_media(q.media_2))
                              for q in questions[start:start + 64]])
        return answers

    result = evaluate_judge(ask, comparisons, labels, random.Random(args.seed), types)
    result["answers"] = [verdict.text for verdict in result.pop("verdicts")]
    if not args.json:
        del result["answers"], result["flipped"]
    print_json(result)


def score(args):
    media = open_media(args)
    answers = open_judge(args)([Candidate(args.prompt, frames) for frames in media])
    scores = [asdict(parse_score(answer)) for answer in answers]
    print_json(dict(zip(args.items, scores)))


if __name__ == "__main__":
    main()
