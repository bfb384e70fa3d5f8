"""Verdicts as rewards: ask a vision-language judge which of two images or videos is better, read its JSON verdict, and turn the
verdicts on a group into win rates and advantages (UnifiedReward-Flex, arXiv 2602.02380).

    python reward.py A.png B.png --prompt "a red circle above a blue square"      the verdict as a tree; seconds on a CPU
    python reward.py A.png B.png --prompt "..." --judge FOLDER --template flex.txt
    python reward.py A.png B.png --prompt "..." --json                            the judge's own words

Reading order: the question (TEMPLATE, build_messages), the answer (parse_verdict), the arithmetic (schedule_pairs, win_rates,
group_advantages), the judge (LocalJudge), its exam (evaluate_judge). The file imports nothing of ours: copy it anywhere.
Shapes: G images of one prompt, D anchors (A, B, C), B comparisons per batch, T tokens.
"""
import argparse
import copy
import functools
import json
import math
import random
import re
from collections import namedtuple
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
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


class Comparison(NamedTuple):
    """One question to a judge. A medium is a list of PIL images: one for an image, the sampled frames for a video."""
    prompt: str
    media_1: list
    media_2: list


def instruction(prompt, medium="Image", template=None):
    """The text of the question. `template` (default TEMPLATE) holds {prompt}, and {medium} and {anchors} if it likes; other braces
    stay as they are. The prompt goes in last, so braces in it are never read as placeholders."""
    template = TEMPLATE if template is None else template
    if not prompt.strip():
        raise ValueError("the prompt is empty; the judge needs the text that both candidates were generated from")
    if "{prompt}" not in template:
        raise ValueError("the template has no {prompt}; put {prompt} where the text of the prompt belongs")
    return template.replace("{anchors}", "\n".join(ANCHORS[medium])).replace("{medium}", medium).replace("{prompt}", prompt)


def build_messages(comparison, template=None):
    """(messages, images): one user message in the chat format of transformers, all images first and the text last, and the flat
    list of its PIL images. Training and judging both call this, so they share one wording. Frames of a video are fed as images,
    as the original does; the medium is Video when a candidate has more than one frame."""
    images = [*comparison.media_1, *comparison.media_2]
    medium = "Video" if max(len(comparison.media_1), len(comparison.media_2)) > 1 else "Image"
    text = instruction(comparison.prompt, medium, template)
    return [{"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]}], images


def chat_text(processor, messages):
    """The prompt of the model as text, up to where its answer begins; a template that can think is told not to."""
    thinking = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **thinking)


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


_SIDE = r"(?:the )?(?:(?:image|video|candidate|option)[ _#:-]*(1|2|a|b|one|two)|(1|2|a|b)|(first|second)(?: image| video| one)?)"
_WINNER = re.compile(_SIDE + r"(?: wins| (?:is|looks) (?:(?:much|slightly|clearly|the) )*(?:better|best|winner|preferred|superior)"
                     r"(?: (?:image|video|one))?(?: (?:than|to|over) " + _SIDE + ")?)?")
_TIE = re.compile(r"(?:it's |it is )?(?:a )?(?:tie|tied|draw|equal)")
_LETTER = re.compile(r"\W*(?:category\s+)?([a-z])\**\s*(?:[.:)\]–—-]|$)", re.I)
_KEYWORDS = {"A": r"semantic", "B": r"(?:image|video|visual) quality|realism", "C": r"aesthetic|artistry|cinematograph"}
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:"]|[^\s{}\[\],:"]+', re.S)
_CLOSER = {"{": "}", "[": "]"}
_MAX_DEPTH, _MAX_OBJECTS = 50, 20       # a verdict is one object, 5 deep; json.loads gives up near 1000


def _read_winner(value):
    """1, 2, 0 for a tie, or None. The whole value must say it: 'Image 1/2' and 'not Image 1' are None."""
    value = f"{value:g}" if isinstance(value, float) else value
    if not isinstance(value, str) or len(value) > 200:
        return None
    value = " ".join(value.strip(" \t\r\n*`'\".!").lower().split())
    if _TIE.fullmatch(value):
        return 0
    match = _WINNER.fullmatch(value)
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
        whole = re.fullmatch(r'\s*"(?:Image|Video) [12]"?[\s`]*', text[value_start:])
        winners.append(whole[0] if whole else "")
    repaired = " ".join(out[:safe[0]] + [_CLOSER[bracket] for bracket in reversed(stack[:safe[1]])])
    return _Root(text[start:end], repaired, keys, winners, sound, end)


def parse_verdict(text):
    """The Verdict in a judge's text; never raises on a str, linear time.

    The overall winner is the value of `winner` in the one outermost JSON object and nothing else: a category's winner is never
    taken for it, and two objects or two values that disagree leave the verdict undecided (None). Whatever was repaired (fences,
    text around, missing or trailing commas, a truncated tail) or is inconsistent (scores against the winner, sums other than 10)
    is listed in `issues`. A malformed category costs that category only.
    """
    verdict, roots, position = Verdict(text=text), [], 0
    issues = verdict.issues
    while len(roots) < _MAX_OBJECTS and (match := re.compile(r"[{\[]").search(text, position)):
        roots.append(_scan(text, match.start()))
        position = roots[-1].end if roots[-1].sound else len(text)
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
    elif any({"dims", "cat_winner"} & set(root.keys) for root in candidates):
        issues.append("a category without the object around it")
    elif len(winners) > 1 or None in winners:
        issues.append(f"no clear overall winner: {', '.join(written)[:100] or 'none given'}")
    else:
        verdict.winner = winners.pop()

    root, data = candidates[0], {}
    if root.source != text.strip():
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


def format_verdict(verdict, prompt=None):
    """The verdict as a tree for the terminal: categories, sub-dimensions with both scores and reasons, winners, issues."""
    said = {1: "1 wins", 2: "2 wins", 0: "tie", None: "undecided"}
    lines = [f"prompt: {prompt}"] if prompt else []
    for category in verdict.categories:
        lines.append(f"├─ {category.name}: {said[category.winner]}{'' if category.anchor else '  (added by the judge)'}")
        for dim in category.dims:
            score_1, score_2 = ("?" if score is None else f"{score:g}" for score in (dim.score_1, dim.score_2))
            lines.append(f"│  ├─ {dim.name}  {score_1} : {score_2}")
            lines += [f"│  │    {side}: {reason}" for side, reason in ((1, dim.reason_1), (2, dim.reason_2)) if reason]
        lines += [f"│  └─ {category.reason}"] if category.reason else []
    lines.append(f"└─ overall: {said[verdict.winner]}{'. ' if verdict.reason else ''}{verdict.reason}")
    return "\n".join(lines + [f"   ! {issue}" for issue in verdict.issues])


# ------------------------------------------------------------------------------------------------ the arithmetic

def schedule_pairs(num_items, pairs="all", rng=random):
    """Which items meet, and who is shown first: [(first, second), ...], each unordered pair at most once.

    "all" gives all G(G-1)/2 pairs; "ring:K" seats the items at random on a ring where each meets its next K, so 2K each (with
    K = G/2 the opposite one comes once). The order within a pair is a coin flip: judges favour a position, and a fixed order
    hands that favour to the same items every time.
    """
    if num_items < 2:
        raise ValueError(f"num_items is {num_items}; a comparison needs at least 2")
    ring = re.fullmatch(r"ring:(\d+)", pairs)
    if pairs != "all" and not ring:
        raise ValueError(f"pairs is '{pairs}'; expected 'all' or 'ring:K', for example 'ring:3'")
    if ring and not 1 <= int(ring[1]) <= num_items // 2:
        raise ValueError(f"pairs is '{pairs}' for {num_items} items; K goes from 1 to {num_items // 2}, or use 'all'")
    chosen = combinations(range(num_items), 2)
    if ring:
        seat = rng.sample(range(num_items), num_items)
        chosen = sorted({tuple(sorted((seat[i], seat[(i + k) % num_items])))
                         for i in range(num_items) for k in range(1, int(ring[1]) + 1)})
    return [pair if rng.random() < 0.5 else pair[::-1] for pair in chosen]


@dataclass
class WinRates:
    overall: torch.Tensor           # (G,) R_all; NaN: no decided comparison
    category: torch.Tensor          # (G,) R_cat; NaN: no category vote
    anchors: dict                   # anchor -> (G,) R_d
    num_decided: int                # a winner was named
    num_ties: int                   # a tie was declared
    num_undecided: int              # unreadable or contradictory; left out of every rate
    first_position_wins: int        # of num_decided; near one half for a judge without position bias


def win_rates(pairs, verdicts, num_items, count_extra=False, category_weights=None):
    """WinRates of G items; winner 1 of a verdict means that the first of its pair won.

    R_d(i) = wins of i on anchor d / comparisons of i on anchor d, a tie being half a win (Sec. 3.3.2 of arXiv 2602.02380, with
    the comparisons that took place instead of G - 1). R_cat(i) = mean of R_d(i) over the anchors that have a value for i, weighted
    by `category_weights` ({'A': 1., ...}, default equal). An undecided verdict is left out of both counts together with its
    categories, and so is a category without a readable winner. Categories the judge added are in no rate, as in the paper;
    `count_extra` makes them one more anchor, 'D'.
    """
    if len(pairs) != len(verdicts):
        raise ValueError(f"{len(pairs)} pairs but {len(verdicts)} verdicts; expected one verdict per pair")
    names = ["overall", *_KEYWORDS] + ["D"] * count_extra
    wins, counts = torch.zeros(2, len(names), num_items, dtype=torch.float64)               # (1 + D, G) each
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
    rates = torch.stack(anchors)                                                            # (D, G)
    weights = torch.tensor([(category_weights or {}).get(name, 1.0) for name in names[1:]], dtype=torch.float64)
    weights = weights[:, None] * ~rates.isnan()
    category = (weights * rates.nan_to_num()).sum(0) / weights.sum(0)
    winners = [verdict.winner for verdict in verdicts]
    # float32 out of float64: rates equal on paper become equal bit by bit, (0 + .2 + 1) / 3 and (.4 + .4 + .4) / 3 are not
    return WinRates(overall.float(), category.float(), dict(zip(names[1:], rates.float())),
                    num_decided=winners.count(1) + winners.count(2), num_ties=winners.count(0),
                    num_undecided=winners.count(None), first_position_wins=winners.count(1))


def group_advantages(rates, alpha=0.7, eps=1e-8, std_floor=0.0, normalize_std=True):
    """(G,) advantages of one group: A = alpha z(R_cat) + (1 - alpha) z(R_all), z = (x - mean) / (max(std, std_floor) + eps).

    Each side is normalised inside the group before the blend. The std is the unbiased one (divisor G - 1): the paper does not
    say, the original code takes it. A side whose values are all equal gives exactly zero; an item without a value (NaN) gets 0
    on that side and enters neither mean nor std. When a whole side has no value, as with a judge that names no categories,
    the other side counts alone. `normalize_std=False` leaves the division out; `std_floor` keeps a nearly dead group (one
    decided pair among ties) from being blown up. Worked: rates 1, .5, 0 on both sides give 1, 0, -1 for any alpha.
    """
    def z(values):
        valid = ~values.isnan()
        x = values[valid]
        scores = torch.zeros_like(values)
        if len(x) > 1 and x.min() != x.max():                           # exact equality is dead, a small std is not
            scores[valid] = (x - x.mean()) / (x.std().clamp(min=std_floor) + eps if normalize_std else 1.0)
        return scores

    if rates.category.isnan().all():
        alpha = 0.0
    elif rates.overall.isnan().all():
        alpha = 1.0
    return alpha * z(rates.category) + (1 - alpha) * z(rates.overall)


# ------------------------------------------------------------------------------------------------ the judge

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


class LocalJudge:
    """judge(comparisons) -> texts, by a transformers model: LocalJudge(path), or LocalJudge(model=, processor=) for one in memory.

    template=None reads `template.txt` in the folder (sft.py writes it, so that a judge keeps the wording it was trained on) and
    else takes TEMPLATE. A path is loaded to `device` (default: the GPU, else the CPU) in `dtype` (default: bfloat16 on a GPU,
    float32 on a CPU). For a model in memory another dtype than its own means autocast on a GPU and a cast copy on a CPU, where
    autocast would cast the weights anew for every token.
    """
    def __init__(self, path=None, *, model=None, processor=None, template=None, device=None, dtype=None, batch_size=64,
                 max_new_tokens=2048):
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
        elif dtype is not None and model.device.type == "cpu" and model.dtype != dtype:
            model = copy.deepcopy(model).to(dtype)
        self.model, self.processor, self.template, self.dtype = model, processor, template, dtype
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def __call__(self, comparisons, temperature=0.0, progress=False):
        """One text per comparison, in order. Greedy at temperature 0, else sampled from the whole distribution (no top-k or top-p).
        Batches hold similar lengths, the longest first, so that memory runs out at once or never."""
        chats = [build_messages(comparison, self.template) for comparison in comparisons]
        prompts = [chat_text(self.processor, messages) for messages, _ in chats]
        images = [[image.convert("RGB") for image in images] for _, images in chats]
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
        inputs = self.processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
        sampling = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.autocast(weight.device.type, dtype=self.dtype, enabled=self.dtype not in (None, weight.dtype)):
            tokens = self.model.generate(
                **inputs.to(weight.device), **sampling, max_new_tokens=self.max_new_tokens, repetition_penalty=1.0, use_cache=True,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)       # (B, T)
        return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------ the judge's exam

def evaluate_judge(judge, comparisons, labels, rng, swap=True):
    """How good a judge is on labelled pairs, a dict. labels: 1 or 2, the better candidate; 0, a tie, is left out of the accuracy.

    Every pair is shown in a random order from `rng`, the label moving along, and with `swap` in the other order too.
        winner_accuracy       share of right winners in the random order; undecided and ties are wrong
        parse_rate            share of texts with an overall winner and all three anchors
        sum10_rate            share of sub-dimensions whose two scores sum to 10
        swap_consistency      share of pairs whose two orders name the same winner; undecided is inconsistent; NaN without swap
        first_position_share  share of first-position wins among decided verdicts; one half without position bias
        num_pairs, verdicts and flipped: the random order's verdicts, and whether that order was (2, 1)
    """
    flipped = [rng.random() < 0.5 for _ in comparisons]
    both = [(a, Comparison(a.prompt, a.media_2, a.media_1)) for a in comparisons]
    shown = [pair[flip] for pair, flip in zip(both, flipped)] + [pair[not flip] for pair, flip in zip(both, flipped) if swap]
    verdicts = [parse_verdict(text) for text in judge(shown)]
    winners = [{1: 2, 2: 1}.get(verdict.winner, verdict.winner) if flip else verdict.winner         # of the content, not the place
               for verdict, flip in zip(verdicts, flipped + [not flip for flip in flipped])]
    first, second = winners[:len(both)], winners[len(both):]
    mean = lambda values: sum(values) / len(values) if values else math.nan
    return {
        "winner_accuracy": mean([winner == label for winner, label in zip(first, labels) if label]),
        "parse_rate": mean([v.winner is not None and {c.anchor for c in v.categories} >= set(_KEYWORDS) for v in verdicts]),
        "sum10_rate": mean([None not in (d.score_1, d.score_2) and d.score_1 + d.score_2 == 10
                            for v in verdicts for c in v.categories for d in c.dims]),
        "swap_consistency": mean([a == b and a is not None for a, b in zip(first, second)]),
        "first_position_share": mean([verdict.winner == 1 for verdict in verdicts if verdict.winner]),
        "num_pairs": len(both), "verdicts": verdicts[:len(both)], "flipped": flipped,
    }


# ------------------------------------------------------------------------------------------------ the command

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Ask a judge which of two images serves a prompt better.")
    parser.add_argument("images", nargs=2, metavar="IMAGE", help="image files, first and second candidate")
    parser.add_argument("--prompt", required=True, help="the text both images were generated from")
    parser.add_argument("--judge", help="folder or hub id; default: the newest of out/judge-dpo/model and out/judge-sft/model")
    parser.add_argument("--template", help="file with another instruction, holding {prompt} and optionally {medium}, {anchors}")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="longest verdict, in tokens")
    parser.add_argument("--json", action="store_true", help="print the judge's text as it is")
    return parser.parse_args(argv)


def find_judge():
    """The newest judge trained in the current folder."""
    folders = [path.parent for stage in ("dpo", "sft") for path in Path("out").glob(f"judge-{stage}/model/config.json")]
    if not folders:
        raise ValueError("no judge in out/judge-dpo/model or out/judge-sft/model; train one with `python sft.py`, or pass --judge")
    return max(folders, key=lambda folder: (folder / "config.json").stat().st_mtime)


def open_image(path):
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def main(argv=None):
    args = parse_args(argv)
    try:
        comparison = Comparison(args.prompt, *([open_image(path)] for path in args.images))
        template = Path(args.template).read_text(encoding="utf-8") if args.template else None
        build_messages(comparison, template)        # an empty prompt or a bad template fails before the judge is loaded
        judge = LocalJudge(args.judge or find_judge(), template=template, max_new_tokens=args.max_new_tokens)
    except (ValueError, OSError) as error:
        raise SystemExit(f"reward.py: {error}") from error
    text, = judge([comparison])
    print(text if args.json else format_verdict(parse_verdict(text), args.prompt))


if __name__ == "__main__":
    main()
