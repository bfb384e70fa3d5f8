"""The reward: a vision-language judge compares two images or videos in a hierarchical verdict, and
the verdicts on a group become win rates and advantages (UnifiedReward-Flex, arXiv 2602.02380).
Imports nothing of ours: copy it anywhere.

    python reward.py A.png B.png --prompt "a red circle above a blue square"       one verdict
    python reward.py A.png B.png C.png --prompt "..." --html report.html           a ranked group
    python reward.py A.png B.png --prompt "..." --score                            pointwise scores

Seconds each with the toy judge on a CPU.  Shapes: G items of one prompt, B items, T tokens.
"""
import argparse, base64, html, io, json, os, random, re, runpy, sys, threading, time
import urllib.error
import urllib.request
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import torch
from PIL import Image, ImageSequence
from tqdm import tqdm

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
    template = template or (TEMPLATE if is_pair else SCORE_TEMPLATE)
    images = sum(media, [])
    content = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": instruction(question.prompt, medium, template)})
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
    return [items[i] for i in steps.round().int()]

def read_frames(path, num_frames):
    kind = path.suffix.lower()
    try:
        if path.is_dir():
            files = [file for file in path.iterdir()
                     if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
            files.sort(key=lambda file: (len(file.name), file.name))            # 2 before 10
            return [Image.open(file).convert("RGB") for file in evenly_spaced(files, num_frames)]
        if kind in (".mp4", ".mov", ".mkv", ".webm", ".avi"):
            import av
            with av.open(path) as video:
                frames = evenly_spaced(list(video.decode(video=0)), num_frames)
                return [frame.to_image() for frame in frames]
        image = Image.open(path)
        frames = ImageSequence.Iterator(image) if kind in (".gif", ".webp", ".apng") else [image]
        return [frame.convert("RGB") for frame in frames]
    except ImportError:
        raise ValueError(f"{path}: reading videos needs PyAV: pip install av") from None
    except (OSError, LookupError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image or video ({error})") from None

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
    for winner, pattern in patterns.items():
        if re.fullmatch(pattern, " ".join(value.split())):
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

# ---------- JSON, as the template asks for it
POINTS = re.compile(r"\s*(\d{1,3}(?:\.\d{1,20})?)\s*(?:/\s*10\s*)?")

def read_json(answer, verdict):
    """Fill in the verdict from the JSON object in the answer. Its own "winner" decides, never a
    category's. Of several objects that agree the last one counts, objects that disagree are
    undecided. Text around it and a comma before a bracket are repaired, which `issues` records;
    other faults, as a cut tail, leave it undecided. A malformed category costs itself only."""
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
    """[dict, ...]: the outermost JSON objects with a verdict. ValueError: one is malformed, or a
    category stands alone; then nobody can tell root from nested."""
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
        elif str in (type(row["score_1"]), type(row["score_2"])):
            issues.append(f"{where}: a score is text")
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
NUMBER = r"(-?\d{1,4}(?:\.\d{1,6})?)(?: ?/ ?\d{1,3})?"
SCALE = r"(?: \(\d{1,3} ?- ?\d{1,3}\))?"                # " (1-5)"
FINAL_SCORE = re.compile(
    rf"final score{SCALE}[ *:=]{{1,8}}{NUMBER}"
    r"(?![\d.,]*\d| ?[-/–~] ?\d| (?:to|or|through)\b)", re.I)
SCORE_LINE = re.compile(
    rf"^[ \t*-]{{0,8}}([A-Za-z][^:\n]{{0,60}}?){SCALE}[*]{{0,2}}:[* \t]{{1,8}}{NUMBER}"
    r"[*. \t]{0,8}$", re.M)

def read_sentences(answer, verdict):
    """Fill in the winner from UnifiedReward's "Image 1 is better than Image 2.", "Both videos are
    equally good.", or UnifiedReward-Think's <answer>Image 1 is better</answer>. A claim counts only
    as a whole sentence, the last sentence must be one, and all must agree: "if Image 1 is better"
    and a section's winner before an unclear end are undecided."""
    claims = [read_winner(claim) for claim in re.findall(r"<answer>([^<]*)</answer>", answer)]
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
    """The score in a judge's pointwise text, on the judge's scale, or None; never raises on a str,
    linear time. "Final Score: 4" decides, else the mean of the lines named so, as "Alignment Score
    (1-5): 3.5"; final scores that differ and score lines that cannot be read give None."""
    if isinstance(text, Failure):
        return None
    if "final score" in text.lower():
        finals = {float(match[1]) for match in FINAL_SCORE.finditer(text)}
        return finals.pop() if len(finals) == 1 else None
    scores = {name: float(number) for name, number in SCORE_LINE.findall(text)
              if name.lower().endswith("score")}
    num_lines = len(re.findall(r"score\b[^:\n]{0,20}:", text, re.I))
    if not scores or len(scores) != num_lines:          # one was not read, or came twice
        return None
    return sum(scores.values()) / len(scores)

# ---------- 3. From verdicts to advantages
def sample_pairs(num_items, pairs="all", rng=random):
    """[(first, second), ...]: which of G items are compared, in a random order as judges favour a
    position. "all": all G(G-1)/2 pairs; "ring:K": each item meets its next K on a random ring."""
    match = re.fullmatch(r"all|ring:(\d+)", pairs)
    num_next = int(match[1] or num_items // 2) if match else 0      # on a ring of G/2 all meet all
    if not 1 <= num_next <= num_items // 2:
        raise ValueError(f"pairs is '{pairs}' for {num_items} items; expected 'all', of 2 or more, "
                         f"or 'ring:K' with K from 1 to {num_items // 2}")
    ring = rng.sample(range(num_items), num_items)
    chosen = set()
    for i in range(num_items):
        for k in range(1, num_next + 1):
            chosen.add(tuple(sorted((ring[i - k], ring[i]))))
    return [pair if rng.random() < 0.5 else pair[::-1] for pair in sorted(chosen)]

@dataclass
class WinRates:
    overall: torch.Tensor               # (G,) R_all in [0, 1], NaN: never compared
    category: torch.Tensor              # (G,) R_cat
    anchors: dict[str, torch.Tensor]    # {"A": (G,) R_A, "B": ..., "C": ...}
    num_decided: int                    # verdicts with a winner
    num_ties: int
    num_undecided: int
    first_position_wins: int            # of num_decided

def win_rates(pairs, verdicts, num_items, category_weights=None):
    """WinRates of G items; winner 1 of a verdict is the first of its pair.
    R_d(i) = wins of i on anchor d / comparisons of i on d, a tie is half a win (Sec. 3.3.2 of arXiv
    2602.02380); R_cat(i) = mean over the d that have a value, weighted by category_weights
    ({"A": 1.0, ...}); R_all(i) from the overall winners. An undecided verdict counts nowhere, nor
    does a category without a readable winner. Categories that the judge added are in no rate."""
    if len(pairs) != len(verdicts):
        raise ValueError(f"{len(pairs)} pairs but {len(verdicts)} verdicts; expected one each")
    weights = category_weights or {"A": 1.0, "B": 1.0, "C": 1.0}
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
    anchors = {name: rate([verdict.winner_on(name) for verdict in verdicts]) for name in weights}
    rates = torch.stack(list(anchors.values()))         # (D, G)
    weight = torch.tensor(list(weights.values()), dtype=torch.float64)[:, None] * ~rates.isnan()
    category = (weight * rates).nansum(0) / weight.sum(0)
    # float64 rounded to float32: what is equal on paper is equal bit by bit, as (0 + .2 + 1) / 3
    # and (.4 + .4 + .4) / 3 are not
    return WinRates(rate(overall).float(), category.float(), dict(zip(anchors, rates.float())),
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

# ---------- 4. Judges: judge(questions, temperature=0.0, progress=False) -> [text or Failure, ...]
class LocalJudge:
    """A transformers model in a folder or hub repository, asked in the wording of template.txt (for
    Candidates score_template.txt) beside its weights, unless one is given. By default on the GPU in
    bfloat16, else on the CPU in float32, with its generation config's max_new_tokens, else 2048."""
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
        default = self.model.generation_config.max_new_tokens or 2048
        self.max_new_tokens = max_new_tokens or default
        self.batch_size = batch_size or max(1, 50_000 // self.max_new_tokens)

    @torch.inference_mode()
    def __call__(self, questions, temperature=0.0, progress=False):
        """Texts, in order. Greedy at temperature 0, else sampled without top-k or top-p."""
        options = {"do_sample": False}
        if temperature > 0:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        tokenizer = self.processor.tokenizer
        texts = []
        batches = range(0, len(questions), self.batch_size)
        for start in tqdm(batches, desc="judge", disable=not progress):
            batch = questions[start:start + self.batch_size]
            chats = [build_messages(q, self.templates[type(q)]) for q in batch]
            inputs = self.processor(
                text=[chat_text(self.processor, messages) for messages, _ in chats],
                images=[images for _, images in chats],
                padding=True, padding_side="left", return_tensors="pt").to(self.model.device)
            tokens = self.model.generate(
                **inputs, **options, max_new_tokens=self.max_new_tokens, repetition_penalty=1.0,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)   # (B, T)
            answers = tokens[:, inputs["input_ids"].shape[1]:]
            texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts

def load_processor(path):
    """AutoProcessor's of a folder or hub repository, see leave_out_video."""
    from transformers import AutoProcessor
    leave_out_video()
    return AutoProcessor.from_pretrained(path)

def leave_out_video():
    """Where torchvision is missing, let processors do without the video processor that needs it
    (frames come as images); what they save has one of no settings and loads anywhere."""
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
    if name.startswith("out/") and not Path(name).exists():
        raise ValueError(f"no judge in {name}: train one by sft.py and dpo.py, or pass --judge")
    return LocalJudge(name, **options)

# ---------- 5. The report
OUTCOME = {1: "1 wins", 2: "2 wins", 0: "tie", None: "undecided"}
STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto} img{height:200px}
h1{font-size:1.3em} pre{white-space:pre-wrap} .won{background:#d9f0df}
figure{display:inline-block;margin:.4em 1em .4em 0;padding:.3em} figcaption{font-weight:600}"""

def format_verdict(verdict, prompt):
    """The verdict as a tree: categories, sub-dimensions with both scores, a bar for the points of
    the first, and reasons, winners, issues."""
    lines = [f"prompt: {prompt}"]
    for category in verdict.categories:
        added = "" if category.anchor else "  (added by the judge)"
        lines.append(f"├─ {category.name}: {OUTCOME[category.winner]}{added}")
        for criterion in category.criteria:
            first, second = [
                "?" if x is None else f"{x:g}" for x in (criterion.score_1, criterion.score_2)]
            bar = "█" * round(10 * (criterion.score_1 or 0) / (criterion.total() or 10))
            lines += [f"│  ├─ {criterion.name}  {first} : {second}  {bar:░<10}",
                      f"│  │    1: {criterion.reason_1}", f"│  │    2: {criterion.reason_2}"]
        lines.append(f"│  └─ {category.reason}")
    lines.append(f"└─ overall: {OUTCOME[verdict.winner]}. {verdict.reason}")
    return "\n".join(lines + [f"   ! {issue}" for issue in verdict.issues])

def report_html(title, figures, text=""):
    """A whole page that needs no network: the title, a figure for each (caption, images, whether it
    won), then the text as it is."""
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
    add("--judge", default="out/judge-dpo/model",
        help="folder, hub id, URLs joined by commas or FILE.py:function")
    add("--template", help="file with the judge's instruction, holding {prompt}  [the judge's own]")
    add("--max-new-tokens", type=int, help="longest verdict  [what the judge's folder says, 2048]")
    add("--pairs", default="all", help="all, or ring:K: each item meets its next K on a ring")
    add("--alpha", type=float, default=0.7, help="weight of the category against the overall side")
    add("--seed", type=int, default=0, help="of the order in which the items of a group are shown")
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
        template = Path(args.template).read_text(encoding="utf-8") if args.template else None
        judge = load_judge(args.judge, template=template, score_template=template,
                           max_new_tokens=args.max_new_tokens)
        if args.score:
            for item, text in zip(args.items, judge([Candidate(args.prompt, x) for x in media])):
                print(f"{item}: {parse_score(text)}\n{text}\n")
        else:
            compare(args, judge, media)
    except (ValueError, OSError) as error:
        raise SystemExit(f"reward.py: {error}") from error

def compare(args, judge, media):
    """Print the verdict on two items as they are given, or the order of a group whose pairs are
    shown in random orders; --html writes both with all verdicts."""
    pairs = [(0, 1)]
    if len(media) != 2:
        pairs = sample_pairs(len(media), args.pairs, random.Random(args.seed))
    answers = judge([Comparison(args.prompt, media[i], media[j]) for i, j in pairs], progress=True)
    if all(isinstance(answer, Failure) for answer in answers):
        raise ValueError(f"the judge answered nothing: {answers[0]}")
    verdicts = [parse_verdict(answer) for answer in answers]
    rates = win_rates(pairs, verdicts, len(media))
    advantages = group_advantages(rates, args.alpha)
    columns = {"win rate": rates.overall, **rates.anchors, "advantage": advantages}
    width = max(len(item) for item in args.items)
    lines = [f"{'item':{width}}" + "".join(f"{name:>11}" for name in columns)]
    figures = []
    for i in advantages.argsort(descending=True, stable=True).tolist():
        cells = [f"{values[i].item():11.3f}" for values in columns.values()]
        lines.append(f"{args.items[i]:{width}}{''.join(cells)}")
        figures.append((args.items[i], media[i], not figures and advantages[i] > 0))
    lines.append(f"{len(pairs)} pairs, {rates.num_ties} ties, {rates.num_undecided} undecided, "
                 f"{rates.first_position_wins} first position wins")
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
