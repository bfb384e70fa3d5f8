"""The reward: a vision-language judge compares two images or videos in a hierarchical verdict, and
verdicts on a group become advantages (arXiv 2602.02380). Imports nothing of ours: copy it anywhere.

    python reward.py A.png B.png --prompt "a red circle above a blue square"       one verdict
    python reward.py A.png B.png C.png --prompt "..." --html report.html           a ranked group
    python reward.py A.png B.png --prompt "..." --score                            pointwise scores

Seconds each with the toy judge on a CPU.  Shapes: G items of one prompt, B items, T tokens."""
import argparse, base64, contextlib, html, io, json, os, random, re, runpy, sys, threading, time
import urllib.error, urllib.request
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache, partial
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageSequence

# ---------- 1. The question
ANCHORS = {
    "Image": ("A. Semantic Alignment & Accuracy", "B. Image Quality & Realism",
              "C. Aesthetics & Artistry"),
    "Video": ("A. Semantic Alignment & Accuracy", "B. Video Quality & Dynamic Realism",
              "C. Narrative, Aesthetics & Cinematography")}
TEMPLATE = """\
Two candidates were generated for the same prompt. {medium} 1 is shown first, {medium} 2 second. \
Decide which one serves the prompt better, and show how you got there.
Prompt: {prompt}
Judge under these three categories, always and in this order:
{anchors}
You may add one category "D. ..." of your own when this prompt calls for a criterion that the \
three do not hold. In every category pick 3 to 5 sub-dimensions that matter for this prompt and \
these candidates. For each, write what you see in {medium} 1 and in {medium} 2, then share 10 \
points between them: score_1 + score_2 = 10. Then say in one or two sentences who wins the \
category: "{medium} 1", "{medium} 2", or "Tie" when nothing separates them. Last, weigh the \
categories by what the prompt asks for and name one overall winner. Your winners must agree with \
your scores and reasons. Answer with one JSON object and nothing else:
{"prompt": "...", "categories": [{"name": "A. ...", "dims": [{"name": "...", "reason_1": "...", \
"reason_2": "...", "score_1": 6, "score_2": 4}], "cat_reason": "...", "cat_winner": "{medium} 1, \
{medium} 2 or Tie"}], "reason": "...", "winner": "{medium} 1 or {medium} 2"}"""
SCORE_TEMPLATE = """\
Rate this {medium} that was generated for a prompt. Prompt: {prompt}
Say briefly what agrees with the prompt and what does not, then end with these lines:
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
    source: list = ()                   # the image that the prompt asks to edit or animate, if any

@dataclass(frozen=True)
class Candidate:
    """How good is it by itself?"""
    prompt: str
    media: list
    source: list = ()

FORBIDDEN = re.compile(             # control tokens of chat templates, NUL, half a character
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>|</?(?:s|img|image|video|IMG_CONTEXT|image_soft_token)>"
    r"|<(?:bos|eos|pad|(?:start|end)_of_(?:turn|image))>|\[IMG(?:_\w+)?\]|[\0\ud800-\udfff]")

def check_text(text):
    """ValueError: an empty text, or a token in it that would end the turn or stand for an image."""
    forbidden = FORBIDDEN.search(text)
    if forbidden or not text.strip():
        token = forbidden[0] if forbidden else ""
        raise ValueError(f"the text {text[:80]!r} is empty or holds a control token, {token!r}")

def instruction(prompt, medium="Image", template=TEMPLATE):
    """The question: the template with {prompt}, {medium} and {anchors} filled in; doubled braces
    become single, as in str.format. ValueError: check_text's, or a template without {prompt}."""
    check_text(prompt)
    if "{prompt}" not in template:
        raise ValueError("the template has no {prompt}; put {prompt} where the prompt belongs")
    if "{{" in template:
        template = template.replace("{{", "{").replace("}}", "}")
    text = template.replace("{anchors}", "\n".join(ANCHORS[medium]))
    return text.replace("{medium}", medium).replace("{prompt}", prompt)

def build_messages(question, template=None):
    """(messages, images): a user's message for chat templates, all images before the text."""
    is_pair = isinstance(question, Comparison)
    media = [question.media_1, question.media_2] if is_pair else [question.media]
    medium = "Video" if max(map(len, media)) > 1 else "Image"
    template = template or (TEMPLATE if is_pair else SCORE_TEMPLATE)
    images = sum(media, list(question.source))
    content = [{"type": "image"} for _ in images]
    text = instruction(question.prompt, medium, template)
    if question.source:
        text = f"The first image is the source that the prompt asks to edit or animate.\n{text}"
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}], images

def chat_text(processor, messages):
    """The model's input as text, thinking switched off where the chat template has that switch."""
    has_switch = "enable_thinking" in str(processor.chat_template)
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False,
                                         **({"enable_thinking": False} if has_switch else {}))

def load_media(item, num_frames=8):
    """A list of PIL images: one of an image (a file or a PIL image), at most num_frames evenly
    spaced ones of a GIF, a video (by `av`), a folder or a list. ValueError: unreadable."""
    if isinstance(item, Image.Image):
        return [item]
    frames = item if isinstance(item, list) else read_frames(Path(item), num_frames)
    if not frames:
        raise ValueError(f"{item}: no frames (png, jpg or webp) in it")
    return evenly_spaced(frames, num_frames)

def evenly_spaced(items, num):
    steps = torch.linspace(0, len(items) - 1, min(num, len(items)), dtype=torch.float64)
    return [items[i] for i in steps.int()]              # rounded down, as the released judges' are

def read_frames(path, num_frames):
    kind = path.suffix.lower()
    try:
        if path.is_dir():
            files = [file for file in path.iterdir()
                     if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
            files.sort(key=lambda file: (len(file.name), file.name))            # 2 before 10
            return [read_frames(file, 1)[0] for file in evenly_spaced(files, num_frames)]
        if kind in (".mp4", ".mov", ".mkv", ".webm", ".avi"):
            import av
            with av.open(path) as video:
                frames = evenly_spaced(list(video.decode(video=0)), num_frames)
                return [f.to_image().rotate(f.rotation, expand=True) for f in frames]
        image = Image.open(path)
        frames = ImageSequence.Iterator(image) if kind in (".gif", ".webp", ".apng") else [image]
        return [to_rgb(frame) for frame in frames]
    except Exception as error:                          # a damaged file may raise anything
        raise ValueError(f"{path}: not a readable image or video, which needs `pip install av` "
                         f"({error!r})") from error

def to_rgb(image):
    """The image as it is meant to be seen: upright by its EXIF data, on white."""
    with contextlib.suppress(SyntaxError):              # EXIF data that is none
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF" or max(image.size) > 200 * min(image.size):
        raise ValueError(f"mode {image.mode}, size {image.size}: expected 8 bits, at most 200 : 1")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

# ---------- 2. The verdict. A winner is 1, 2, 0 for a declared tie, or None, undecided: not a tie
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

    def winner_on(self, anchor):        # of the first category with it
        return next((c.winner for c in self.categories if c.anchor == anchor), None)

NOUN = "(?:image|video|candidate|option|answer|response)"
FIRST = rf"(?:the )?(?:{NOUN}[ _#:-]*(?:1|a|one)|1|a|first(?: {NOUN}| one)?)"
SECOND = rf"(?:the )?(?:{NOUN}[ _#:-]*(?:2|b|two)|2|b|second(?: {NOUN}| one)?)"
WINS = (r"{0} (?:wins|(?:is|looks) (?:(?:much|slightly|clearly|the) )*"
        rf"(?:better|best|winner|preferred|superior)(?: {NOUN}| one)?(?: (?:than|to|over) {{1}})?)")
TIE = (r"(?:it's |it is )?(?:a )?(?:tie|tied|draw|equal|same)"
       rf"|(?:both|the two) {NOUN}s are equal(?:ly (?:good|bad))?")
CLAIMS = {1: WINS.format(FIRST, SECOND), 2: WINS.format(SECOND, FIRST), 0: TIE}
WINNERS = {1: rf"{FIRST}|{CLAIMS[1]}|\[\[(?:a|a>+b|b<+a)\]\]",         # and arena's [[A>B]]
           2: rf"{SECOND}|{CLAIMS[2]}|\[\[(?:b|b>+a|a<+b)\]\]",
           0: rf"{TIE}|\[\[(?:c|[ab]=[ab](?:=bad)?)\]\]"}
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
    """1, 2, 0 for a tie, or None: "Image 1/2". With CLAIMS only a sentence: "Image 1 is better"."""
    value = str(value).removesuffix(".0").strip(" \t\r\n*`'\".!").lower()
    for winner, pattern in patterns.items():
        if re.fullmatch(pattern, " ".join(value.split())):
            return winner
    return None

def read_anchor(name):
    """"A", "B", "C" by the leading letter ("A. x", "**C**"), else by a keyword; None: added."""
    letter = LETTER.match(name[:200])
    if letter:
        return letter[1].upper() if letter[1].upper() in KEYWORDS else None
    anchors = [anchor for anchor, words in KEYWORDS.items() if re.search(words, name[:200], re.I)]
    return anchors[0] if len(anchors) == 1 else None

# ---------- JSON, as the template asks for it
POINTS = re.compile(r"\s*(\d{1,3}(?:\.\d{1,20})?)\s*(?:/\s*10\s*)?")

def read_json(answer, verdict):
    """Fill in the verdict from the JSON object in the answer. Its own "winner" decides; of objects
    that agree the last counts. Text around it and a comma before a bracket are repaired, which
    `issues` records; other faults, as a cut tail or objects that disagree, leave it undecided."""
    issues = verdict.issues
    try:
        roots = find_objects(answer, issues)
    except (ValueError, RecursionError) as error:
        issues.append(f"unreadable JSON: {error}")
        return
    if len(roots) != 1:
        issues.append(f"{len(roots)} JSON objects with a verdict, expected one")
    root = roots[-1] if roots else {}
    if len({read_winner(other.get("winner")) for other in roots}) == 1:
        verdict.winner = read_winner(root.get("winner"))
    if verdict.winner is None:
        issues.append(f"no clear overall winner: {str(root.get('winner'))[:100]}")
    verdict.reason = get_typed(root, "reason", str)
    for row in get_typed(root, "categories", list):
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

def find_objects(answer, issues):
    """[dict, ...]: the outermost objects with a verdict. ValueError: malformed, a lone category."""
    text = re.sub(r",(\s*[}\]])", r"\1", answer.strip())
    decoder = json.JSONDecoder(strict=False, parse_int=float, object_pairs_hook=join_members)
    roots = []
    end = 0
    # "{so}" is no JSON, {winner: ...} is malformed
    for bracket in re.finditer(r'\{(?=\s*(?:["}]|\S?\w+\S?\s*:))|\[(?=\s*[{\[])', text):
        if bracket.start() < end:
            continue
        data, end = decoder.raw_decode(text, bracket.start())
        if isinstance(data, dict) and ("name" in data or "dims" in data):
            raise ValueError("a category stands alone")
        if isinstance(data, dict) and ("winner" in data or "categories" in data):
            roots.append(data)
            if answer.strip() != text[bracket.start():end]:
                issues.append("a comma too much in the JSON, or text around it")
    return roots

def join_members(members):
    """A JSON object as a dict; a key that comes twice with different values has the value None."""
    data = {}
    for key, value in members:
        data[key] = value if data.get(key, value) == value else None
    return data

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
        where = f"{name[:60]} / {criterion.name[:60]}"
        if criterion.total() is None:
            issues.append(f"{where}: a score is missing")
            continue
        lead += criterion.score_1 - criterion.score_2
        if criterion.total() != 10:
            issues.append(f"{where}: the scores {' + '.join(written)} are not 10")
    winner = read_winner(data.get("cat_winner"))
    if winner is None:
        issues.append(f"{name[:60]}: no readable cat_winner")
    elif (winner == 1 and lead < 0) or (winner == 2 and lead > 0):
        issues.append(f"{name[:60]}: the winner goes against its own scores")
    return Category(name, read_anchor(name), criteria, get_typed(data, "cat_reason", str), winner)

# ---------- sentences of older judges, and pointwise scores
THEREFORE = re.compile(
    r"(?:(?:so|thus|therefore|hence|overall|in conclusion|conclusion|final answer|final verdict"
    r"|verdict)[ ,:]+){1,3}")
NUMBER = r"(-?\d{1,4}(?:\.\d{1,6})?)(?: ?/ ?([1-9]\d{0,2}))?"            # 4 or 8/10
SCALE = r"(?: \(\d{1,3} ?- ?([1-9]\d{0,2})\))?"         # " (1-5)"
FINAL_SCORE = re.compile(
    rf"final score{SCALE}[ *:=]{{1,8}}{NUMBER}"
    r"(?![\d.,]*\d| ?[-/–~] ?\d| ?%| (?:to|or|through|out|of)\b)", re.I)
SCORE_LINE = re.compile(
    rf"^[ \t*-]{{0,8}}([A-Za-z][^:\n]{{0,60}}?){SCALE}[*]{{0,2}}:[* \t]{{1,8}}{NUMBER}"
    r"[*. \t]{0,8}$", re.M)

def read_sentences(answer, verdict):
    """Fill in the winner from "Image 1 is better than Image 2.", UnifiedReward-Think's
    <answer>Image 1 is better</answer> or an arena's [[A>B]]. A claim is a whole sentence, not "if
    Image 1 is better"; the last sentence must be one, and all must agree."""
    claims = [read_winner(claim.removeprefix("<answer>")) for claim in
              re.findall(r"<answer>[^<]*(?=</answer>)|\[\[[^\[\]]{1,20}\]\]", answer)]
    if not claims:
        lines = re.sub(r"(?<![.!;:*>\n])\n(?!\n)", " ", answer.lower())        # wrapped lines
        sentences = [part.strip(" *#\t\r") for part in re.split(r"[.!;\n]+", lines)]
        claims = [read_winner(THEREFORE.sub("", sentence, 1), CLAIMS)
                  for sentence in sentences if sentence]
        claims = [claim for claim in claims if claim is not None] + claims[-1:]
    if len(set(claims)) == 1:
        verdict.winner = claims[0]
    if verdict.winner is None:
        verdict.issues.append("no JSON object, and no claim or claims that disagree")

def parse_score(text):
    """The score in a judge's pointwise text, on the judge's scale, of "8/10" out of 5, or None;
    never raises on a str, linear time. "Final Score: 4" decides, else the mean of lines such as
    "Alignment Score (1-5): 3.5"; final scores that differ and unreadable lines give None."""
    def value(scale, number, maximum):
        return float(number) * (5 / float(maximum or scale or 5))
    answer = text.rpartition("</think>")[2]             # what the judge thought is no answer
    if isinstance(text, Failure) or "<think>" in answer:
        return None
    if "final score" in answer.lower():
        finals = {value(*match) for match in FINAL_SCORE.findall(answer)}
        return finals.pop() if len(finals) == 1 else None
    scores = {name: value(*number) for name, *number in SCORE_LINE.findall(answer)
              if name.lower().endswith("score")}
    num_lines = len(re.findall(r"score\b[^:\n]{0,20}:", answer, re.I))
    if not scores or len(scores) != num_lines:          # one was not read, or came twice
        return None
    return sum(scores.values()) / len(scores)

# ---------- 3. From verdicts to advantages
def sample_pairs(num_items, pairs="all", rng=random):
    """[(first, second), ...] of G items, in a random order as judges favour a position. "all": all
    G(G-1)/2 pairs; "ring:K": each item meets its next K on a random ring."""
    match = re.fullmatch(r"all|ring:(\d+)", pairs)
    num_next = int(match[1] or num_items // 2) if match else 0      # on a ring of G/2 all meet all
    if not 1 <= num_next <= num_items // 2:
        raise ValueError(f"pairs is '{pairs}' for {num_items} items; expected 'all', of 2 or more, "
                         f"or 'ring:K' with K from 1 to {num_items // 2}")
    ring = rng.sample(range(num_items), num_items)
    chosen = set()
    for k in range(1, num_next + 1):
        chosen |= {tuple(sorted(pair)) for pair in zip(ring, ring[k:] + ring[:k])}
    return [pair if rng.random() < 0.5 else pair[::-1] for pair in sorted(chosen)]

@dataclass
class WinRates:
    overall: torch.Tensor               # (G,) R_all in [0, 1], NaN: never compared
    category: torch.Tensor              # (G,) R_cat
    anchors: dict[str, torch.Tensor]    # {"A": (G,) R_A, "B": ..., "C": ...}
    counts: dict[str, int]              # verdicts, first_wins, second_wins, ties, undecided

def win_rates(pairs, verdicts, num_items):
    """WinRates of G items (Sec. 3.3.2 of arXiv 2602.02380). R_d(i) = wins of i on anchor d /
    comparisons of i on d, a tie is half a win; R_cat(i) = mean over the d that have a value; R_all
    by overall winners. What is undecided counts nowhere, nor does a category the judge added."""
    if len(pairs) != len(verdicts):
        raise ValueError(f"{len(pairs)} pairs but {len(verdicts)} verdicts; expected one each")
    shares = {1: (1.0, 0.0), 2: (0.0, 1.0), 0: (0.5, 0.5)}

    def rate(winners):
        wins, counts = torch.zeros(2, num_items, dtype=torch.float64)
        for pair, verdict, winner in zip(pairs, verdicts, winners):
            if verdict.winner is not None and winner is not None:
                wins[list(pair)] += torch.tensor(shares[winner], dtype=torch.float64)
                counts[list(pair)] += 1
        return wins / counts                            # 0 / 0 = NaN
    overall = [verdict.winner for verdict in verdicts]
    anchors = {name: rate([verdict.winner_on(name) for verdict in verdicts]) for name in "ABC"}
    category = torch.stack(list(anchors.values())).nanmean(0)       # of (D, G)
    # float64 rounded to float32, in which (0 + .2 + 1) / 3 and (.4 + .4 + .4) / 3 are equal
    names = {"first_wins": 1, "second_wins": 2, "ties": 0, "undecided": None}
    counts = {name: overall.count(winner) for name, winner in names.items()}
    anchors = {name: values.float() for name, values in anchors.items()}
    return WinRates(rate(overall).float(), category.float(), anchors,
                    {"verdicts": len(pairs), **counts})

def normalize(values, std_floor=0.0, eps=1e-8):
    """(G,) z = (x - mean) / (max(std, std_floor) + eps) of a group's values, std with divisor G-1,
    exactly 0 where all are equal. A missing value (NaN) gets 0 and enters neither mean nor std. A
    floor keeps a group of ties and one decided pair quiet."""
    values = values.float()
    scores = torch.zeros_like(values)
    known = ~values.isnan()
    x = values[known]
    if len(x) > 1 and x.min() != x.max():
        scores[known] = (x - x.mean()) / (x.std().clamp(min=std_floor) + eps)
    return scores

def group_advantages(rates, alpha=0.7, std_floor=0.0):
    """(G,) A = alpha z(R_cat) + (1 - alpha) z(R_all), each side normalised before the blend (Sec.
    3.3.2 of arXiv 2602.02380). Where no category of an item is decided, overall counts alone.
    Worked: rates 1, .5, 0 on both sides give 1, 0, -1."""
    category = normalize(rates.category, std_floor)
    overall = normalize(rates.overall, std_floor)
    advantages = alpha * category + (1 - alpha) * overall
    return torch.where(rates.category.isnan(), overall, advantages)

# ---------- 4. Judges: judge(questions, temperature=0.0) -> [text or Failure, ...]
class LocalJudge:
    """A transformers model in a folder or hub repository, asked in the wording that is given, or in
    a folder's template.txt (for Candidates score_template.txt). By default on the GPU in bfloat16,
    else on the CPU in float32, with its generation config's max_new_tokens, else 2048."""
    def __init__(self, path, template=None, score_template=None, device=None, dtype=None,
                 batch_size=None, max_new_tokens=None):
        from transformers import AutoModelForImageTextToText
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device)
        self.processor = load_processor(path)
        stored = {file.name: file.read_text(encoding="utf-8")
                  for file in Path(path).glob("*template.txt")}
        self.templates = {Comparison: template or stored.get("template.txt"),
                          Candidate: score_template or stored.get("score_template.txt")}
        if not self.templates[Comparison]:
            print(f"no template.txt in {path}: asked in reward.TEMPLATE's words", flush=True)
        self.max_new_tokens = max_new_tokens or self.model.generation_config.max_new_tokens or 2048
        self.batch_size = batch_size or max(1, 50_000 // self.max_new_tokens)

    @torch.inference_mode()
    def __call__(self, questions, temperature=0.0):
        """Texts, in order. Greedy at temperature 0, else sampled without top-k or top-p."""
        options = {"do_sample": False}
        if temperature > 0:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        tokenizer = self.processor.tokenizer
        stops = torch.tensor(self.model.generation_config.eos_token_id or []).view(-1).tolist()
        texts = []
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start:start + self.batch_size]
            chats = [build_messages(q, self.templates[type(q)]) for q in batch]
            inputs = self.processor(
                text=[chat_text(self.processor, messages) for messages, _ in chats],
                images=[images for _, images in chats], add_special_tokens=False,
                padding=True, padding_side="left", return_tensors="pt").to(self.model.device)
            tokens = self.model.generate(
                **inputs, **options, max_new_tokens=self.max_new_tokens, repetition_penalty=1.0,
                eos_token_id=[tokenizer.eos_token_id, *stops], pad_token_id=tokenizer.pad_token_id)
            answers = tokens[:, inputs["input_ids"].shape[1]:]                  # (B, T)
            texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts

def load_processor(path):
    from transformers import AutoProcessor
    leave_out_video()
    return AutoProcessor.from_pretrained(path)

def leave_out_video():
    """Let processors do without torchvision, which only their video processor needs."""
    from transformers import ProcessorMixin, utils
    stock = ProcessorMixin.get_attributes.__func__
    if not utils.is_torchvision_available() and stock.__name__ == "get_attributes":
        def without_video(cls):
            return [name for name in stock(cls) if name != "video_processor"]
        save = ProcessorMixin.to_dict
        ProcessorMixin.get_attributes = classmethod(without_video)
        ProcessorMixin.to_dict = lambda self: save(self) | (
            {"video_processor": {}} if "video_processor" in stock(type(self)) else {})

class ServerJudge:
    """OpenAI-compatible servers, at ["http://localhost:8000", ...]. ValueError: none answers.
    `batch_size` requests are in flight. One that takes `timeout` seconds or gets a status of 408,
    429 or 5xx is tried `retries` times more, at the next URL; then the answer is a Failure."""
    def __init__(self, urls, model=None, template=None, score_template=None, batch_size=None,
                 timeout=300.0, retries=4, max_new_tokens=None):
        self.urls = [re.sub(r"(/v1)?(/chat/completions)?/*$", "", url) for url in urls]
        self.templates = {Comparison: template, Candidate: score_template}
        self.batch_size = batch_size or 32
        self.timeout = timeout
        self.retries = retries
        asked = range(0 if model else len(urls))
        names = [self.request(i, "/v1/models", ("data", 0, "id")) for i in asked] or [model]
        if isinstance(names[0], Failure):
            raise ValueError(f"no judge answers: {names[0]}. Start: vllm serve MODEL --port 8000")
        if len(set(names)) > 1:
            raise ValueError(f"the servers name their models {names}: append #MODEL to the URLs")
        self.body = {"model": names[0], "max_tokens": max_new_tokens or 2048, "seed": 0}

    def __call__(self, questions, temperature=0.0):
        """Texts or Failures, in order."""
        jobs = [(i, question, temperature) for i, question in enumerate(questions)]
        return [answer.result() for answer in run_in_threads(self.ask, jobs, self.batch_size)]

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
            request = urllib.request.Request(url + endpoint, body, headers)
            try:            # in a thread of its own, left behind when the server drips or hangs
                status, data = run_in_threads(fetch, [(request, timeout)], 1)[0].result(timeout)
                reason = f"HTTP {status}: {data[:300].decode(errors='replace')}"
                if status == 200:
                    answer = json.loads(data)
                    for part in keys:
                        answer = answer[part]
                    return answer + ""                  # TypeError: it is no text
                if status not in (408, 429) and status < 500:
                    break
            except (OSError, HTTPException, ValueError, LookupError, TypeError,
                    RecursionError) as error:
                reason = f"no whole answer with a text within {timeout:g} s ({error!r})"
        return Failure(f"{url}: {reason}, after {attempt + 1} tries")

def run_in_threads(function, jobs, num_threads):
    """[Future of function(*job), ...], worked off by daemons: Ctrl-C does not wait for them."""
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

def ask(judge, questions, **options):
    """The judge's texts. ValueError: it answers none of the questions."""
    texts = judge(questions, **options)
    if texts and all(isinstance(text, Failure) for text in texts):
        raise ValueError(f"none of {len(texts)} questions is answered: {texts[0]}")
    return texts

def compare_groups(judge, groups, schedule):
    """[verdicts, ...] of groups [(prompt, media, source), ...], each on its pairs in `schedule`."""
    questions = []
    for (prompt, media, source), pairs in zip(groups, schedule):
        questions += [Comparison(prompt, media[i], media[j], source) for i, j in pairs]
    verdicts = iter([parse_verdict(text) for text in judge(questions)])
    return [list(islice(verdicts, len(pairs))) for pairs in schedule]

@cache
def load_function(name):
    """The function of "FILE.py:function", a file run once; None: no file. ValueError: not in it."""
    path, _, function_name = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        return None
    function = runpy.run_path(path).get(function_name)
    if not callable(function):
        raise ValueError(f"{path} has no function {function_name}")
    return function

def add_judge_options(parser):
    """The options of every command that asks a judge."""
    add = parser.add_argument
    add("--template", help="file with the judge's instruction, holding {prompt}  [the judge's own]")
    add("--max-new-tokens", type=int, help="longest verdict  [what the judge's folder says, 2048]")
    add("--judge-batch", type=int, help="questions at a time  [as many as fit 50,000 tokens, 32]")

def judge_options(args, name="template"):
    """What load_judge takes, from the options of a command; --template is the option `name`."""
    template = args.template and Path(args.template).read_text(encoding="utf-8")
    return {name: template, "max_new_tokens": args.max_new_tokens, "batch_size": args.judge_batch}

def load_judge(name, **options):
    """A judge by name: FILE.py:function (questions -> texts), a folder, a hub id, or URLs joined by
    commas, which may be followed by #MODEL, and by #JSON with more fields of a request."""
    function = load_function(name)
    if function:
        def judge(questions, **_):
            texts = list(function(questions))
            if len(texts) != len(questions):
                raise ValueError(f"{name} gave {len(texts)} texts for {len(questions)} questions")
            return texts
        return judge
    if re.match("https?://", name):
        urls, model, body = (name.split("#", 2) + ["", ""])[:3]
        judge = ServerJudge(urls.split(","), model, **options)
        judge.body |= json.loads(body or "{}")
        return judge
    if name.startswith("out/") and not Path(name).exists():
        raise ValueError(f"no judge in {name}: train one by sft.py and dpo.py, or pass --judge")
    return LocalJudge(name, **options)

# ---------- 5. The report
OUTCOME = {1: "1 wins", 2: "2 wins", 0: "tie", None: "undecided"}
STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto} img{height:200px}
pre{white-space:pre-wrap} figure{display:inline-block;margin:.4em} .won{background:#d9f0df}"""

def format_verdict(verdict, prompt):
    """The verdict as a tree; a sub-dimension has a bar for the points of the first candidate."""
    lines = [f"prompt: {prompt}"]
    for category in verdict.categories:
        added = "" if category.anchor else "  (added by the judge)"
        lines.append(f"├─ {category.name}: {OUTCOME[category.winner]}{added}")
        for criterion in category.criteria:
            scores = [criterion.score_1, criterion.score_2]
            points = " : ".join("?" if score is None else f"{score:g}" for score in scores)
            bar = "█" * round(10 * (criterion.score_1 or 0) / (criterion.total() or 10))
            lines += [f"│  ├─ {criterion.name}  {points}  {bar:░<10}",
                      f"│  │    1: {criterion.reason_1}", f"│  │    2: {criterion.reason_2}"]
        lines.append(f"│  └─ {category.reason}")
    lines.append(f"└─ overall: {OUTCOME[verdict.winner]}. {verdict.reason}")
    return "\n".join(lines + [f"   ! {issue}" for issue in verdict.issues])

def report_html(title, figures, text=""):
    """A page that needs no network: a figure for each (caption, images, did it win), the text."""
    title = html.escape(title)
    parts = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
             f"<style>{STYLE}</style><h1>{title}</h1>"]
    for caption, images, won in figures:
        parts.append('<figure class="won">' if won else "<figure>")
        parts.append(f"<figcaption>{html.escape(caption)}</figcaption>")
        parts += [f'<img src="{data_url(image)}">' for image in images] + ["</figure>"]
    return "".join(parts) + f"<pre>{html.escape(text)}</pre>"

# ---------- 6. The command
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("items", nargs="+", metavar="ITEM", help="images, GIFs, videos or folders of frames")
    add("--prompt", required=True, help="the text that the candidates were generated from")
    add("--judge", default="out/judge-dpo/model", help="folder, hub id, URLs or FILE.py:function")
    add_judge_options(parser)
    add("--pairs", default="all", help="all, or ring:K: each item meets its next K on a ring")
    add("--source", help="the image that the prompt asks to edit or animate")
    add("--score", action="store_true", help="score each item by itself")
    add("--html", help="write a report of the verdicts to this file")
    return parser.parse_args(argv)

def main(argv=None):
    args = parse_args(argv)
    from transformers.utils import logging
    logging.set_verbosity_error()                       # their notices drown the verdict
    logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")            # a judge may write half a character
    try:
        instruction(args.prompt)                        # fails before a judge is loaded
        media = [load_media(item) for item in args.items]
        options = judge_options(args, "score_template" if args.score else "template")
        judge = load_judge(args.judge, **options)
        source = load_media(args.source) if args.source else []
        if args.score:
            questions = [Candidate(args.prompt, frames, source) for frames in media]
            for item, text in zip(args.items, judge(questions)):
                print(f"{item}: {parse_score(text)}\n{text}\n")
        else:
            compare(args, judge, media, source)
    except (ValueError, OSError) as error:
        raise SystemExit(f"reward.py: {error}") from error

def compare(args, judge, media, source):
    """Print the verdict on two items, or the order of a group; --html writes all verdicts."""
    pairs = [(0, 1)] if len(media) == 2 else sample_pairs(len(media), args.pairs, random.Random(0))
    [verdicts] = compare_groups(partial(ask, judge), [(args.prompt, media, source)], [pairs])
    rates = win_rates(pairs, verdicts, len(media))
    advantages = group_advantages(rates)
    columns = {"win rate": rates.overall, **rates.anchors, "advantage": advantages}
    width = max(len(item) for item in args.items)
    lines = [f"{'item':{width}}" + "".join(f"{name:>11}" for name in columns)]
    figures = []
    for i in advantages.argsort(descending=True, stable=True).tolist():
        cells = [f"{values[i].item():11.3f}" for values in columns.values()]
        lines.append(f"{args.items[i]:{width}}{''.join(cells)}")
        figures.append((args.items[i], media[i], not figures and advantages[i] > 0))
    lines.append(", ".join(f"{number} {name}" for name, number in rates.counts.items()))
    table = "\n".join(lines)
    print(table if len(media) > 2 else format_verdict(verdicts[0], args.prompt))
    if args.html:
        texts = [table]
        for (i, j), verdict in zip(pairs, verdicts):
            texts.append(f"1 is {args.items[i]}, 2 is {args.items[j]}")
            texts.append(format_verdict(verdict, args.prompt))
        page = report_html(args.prompt, figures, "\n\n".join(texts))
        Path(args.html).write_text(page, encoding="utf-8", errors="replace")
        print(f"report: {args.html}")

if __name__ == "__main__":
    main()
