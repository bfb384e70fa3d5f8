"""Records in, batches out: preference pairs, verdict traces and preferences between traces, from JSONL or from the toy world.

    python data.py check FILE.jsonl                                   counts and lengths, or the first bad line with its reason
    python data.py toy FILE.jsonl --kind pair --split test            toy records as files, to look at and to try everything on
    python data.py distill PAIRS --teacher URL --out traces.jsonl     a teacher's verdicts that agree with people's: for sft.py
    python data.py rank PAIRS --policy FOLDER --out prefer.jsonl      a judge's own traces, right over wrong: for dpo.py
    python data.py sift PROMPTS --model PIPELINE --out pairs.jsonl    the best and the worst of a generator's samples: for dpo.py

A file holds one JSON object a line. Paths in it are relative to the file. What neighbours write is read too: see `normalise`.
    pair         {"prompt", "images": [first, second], "winner": "Image 1" | "Image 2" | "Tie"}      (or "videos", "Video 1" ...)
    trace        {"prompt", "images", "response"}                     the verdict to imitate; with "instruction": any other task
    preference   {"prompt", "images", "chosen", "rejected"}           two verdicts on the same pair; "instruction": as in a trace
    question     {"instruction" or "question", "images"}              to be answered by a vision-language model
    prompt       {"prompt"}                                           for generators; a .txt file or a .csv column "prompt" as well;
                                                                      "source": an image to edit or animate
    image        {"prompt", "images": [one]}                          a captioned image for a base generator
A video is an mp4, a GIF or a folder of frames. Legend: B records, T tokens, N candidates of a prompt.
"""
import argparse
import csv
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from reward import (Candidate, Comparison, Failure, build_messages, chat_text, find_judge, find_medium, instruction, load_media, load_processor, open_judge,
                    parse_score, parse_verdict, schedule_pairs, win_rates)

FIELDS = {"preference": ["chosen", "rejected"], "trace": ["response"], "pair": ["winner"], "question": ["instruction"], "image": ["images"], "prompt": []}
TOYS = {"toy": "image", "toy-video": "video"}        # a source of records -> the world they are of
WINNERS = {"Image 1": 1, "Image 2": 2, "Video 1": 1, "Video 2": 2, "Tie": 0}
PLACE = re.compile("<image>|<video>")                # where in an instruction a medium stands; without any, all come first


# ---------------------------------------------------------------- records

def normalise(record):
    """The record in our own form, also from ShareGPT's "conversations" (LLaMA-Factory), TRL's "messages" or "prompt" with "chosen" and
    "rejected" or "completion", as text or messages, and Diffusion-DPO's {caption, jpg_0, jpg_1, label_0}.

    What the user asks becomes "instruction", the system's words before it; where it is reward.TEMPLATE about a prompt, "prompt". Media are
    paths, data URLs, {"path"}, {"url"} or {"bytes": base64}. ValueError: conversations of several turns, places without media."""
    names = {"image": "images", "video": "videos", "completion": "response"} | ({} if "prompt" in record else {"question": "instruction", "caption": "prompt"})
    record, inside = {names.get(k, k): v for k, v in record.items()}, []        # media that stand in messages
    if "jpg_0" in record:
        winner = {1: "Image 1", 0: "Image 2", .5: "Tie"}.get(label := record.pop("label_0", None))
        if winner is None:
            raise ValueError(f"'label_0' is {label!r}. Expected 1, where jpg_0 is preferred, 0 or 0.5.")
        record |= {"images": [record.pop("jpg_0"), record.pop("jpg_1")], "winner": winner}

    def turns(said):
        """[(role, text), ...] of a text, a turn or a list of turns."""
        out = []
        for turn in said if isinstance(said, list) else [said]:
            turn = {"role": "user", "content": turn} if isinstance(turn, str) else turn
            role, content = turn.get("role") or turn["from"], turn["content"] if "content" in turn else turn["value"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            inside.extend(part[part["type"]] for part in parts if part["type"] != "text" and part.get(part["type"]))
            text = "".join(part["text"] if part["type"] == "text" else "<image>" for part in parts)
            out.append(({"human": "user", "gpt": "assistant"}.get(role, role), text))
        return out

    asked = record.pop("conversations", None) or record.pop("messages", None)
    if asked is None and (isinstance(record.get("prompt"), list) or PLACE.search(str(record.get("prompt"))) and {"chosen", "response"} & {*record}):
        asked = record.pop("prompt")
    if asked is None and "prompt" not in record and isinstance(record.get("chosen"), list):
        asked = record["chosen"][:-1]                # both conversations begin alike
    system = record.pop("system", None) if asked else None
    asked = [("system", system)] * bool(system) + turns(asked or [])
    if asked and asked[-1][0] == "assistant":
        record["response"] = asked.pop()[1]
    record |= {k: turns(record[k])[-1][1] for k in ("chosen", "rejected", "response") if isinstance(record.get(k), (list, dict))}
    media = record.get(name := "videos" if "videos" in record else "images") or inside
    media = [m if not isinstance(m, dict) else f"data:image;base64,{m['bytes']}" if m.get("bytes") else m.get("url") or m["path"]
             for m in (media if isinstance(media, list) else [media])]
    record |= {name: media} if media else {}
    if not asked:
        return record
    if [role for role, _ in asked] not in (["user"], ["system", "user"]):
        raise ValueError(f"the turns are of {', '.join(str(role) for role, _ in asked)}. Expected one user's and one assistant's, a system's before at most.")
    text = "\n\n".join(text for _, text in asked)
    front = re.match(rf"(\s*({PLACE.pattern}))*\s*", text)[0]
    if len(PLACE.findall(text)) == len(PLACE.findall(front)) == len(media):     # all in front need no places
        text = text[len(front):]
    for head, tail in (instruction("{prompt}", medium).split("{prompt}") for medium in ("Image", "Video")):
        if text.startswith(head) and text.rstrip().endswith(tail) and len(media) == 2:
            return {**record, "prompt": text.rstrip()[len(head):-len(tail)]}
    return {**record, "instruction": text}


def medium_of(record):
    """The name of the field that holds its media."""
    return "videos" if "videos" in record else "images"


def kind_of(record):
    """The kind of a normalised record: the first of FIELDS whose fields it has."""
    return next(kind for kind, names in FIELDS.items() if record.keys() >= {*names} or kind == "image" and "videos" in record)


def check_record(record, kind, folder=Path()):
    """The record normalised, with absolute media paths, of whatever kind it is where that is None. ValueError: what was seen and the fix."""
    def expect(ok, what, fix):
        if not ok:
            raise ValueError(f"{what}. {fix}")

    expect(isinstance(record, dict), f"a {type(record).__name__}", "Expected one JSON object a line.")
    try:
        record = normalise(record)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"a record of no known form ({error!r}).") from None
    kind = kind or kind_of(record)
    asked = "instruction" if "instruction" in record or kind == "question" else "prompt"
    for name in [asked] + [f for f in FIELDS[kind] if f in ("response", "chosen", "rejected")]:
        value = record.get(name)
        expect(isinstance(value, str) and value.strip(), f"'{name}' is {value!r}", f"A {kind} record needs it as non-empty text.")
    if kind == "pair":
        expect(record.get("winner") in WINNERS, f"'winner' is {record.get('winner')!r}", "Expected 'Image 1', 'Image 2' or 'Tie'.")
    if kind == "preference":
        expect(record["chosen"] != record["rejected"], "'chosen' equals 'rejected'", "Drop the line: it prefers nothing.")
    if kind != "prompt":
        name = medium_of(record)
        media, want = record.get(name), 1 if kind == "image" else None if asked == "instruction" else 2
        expect(isinstance(media, list) and media and all(isinstance(m, str) for m in media), f"'{name}' is {str(media)[:100]}", "Expected a list of paths.")
        expect(want in (None, len(media)), f"'{name}' holds {len(media)} paths", f"A {kind} record needs {want}.")
        places = len(PLACE.findall(record[asked])) if want is None else 0
        expect(places in (0, len(media) * (kind != "question")), f"{places} of <image> and <video> in the text, but {len(media)} media",
               "Each medium has its place, or none has; those of a question to be sifted come before the text.")
        record[name] = [find_medium(m, folder) for m in media]
    if isinstance(record.get("source"), str):
        record["source"] = find_medium(record["source"], folder)
    return record


def read_records(path, kind, skip_bad=False):
    """All records of a JSONL file (for prompts a text file or a CSV with a column "prompt" too), checked; kind None: each as the kind it is.
    "where" in a record is its file and line. ValueError names the first bad line; `skip_bad` drops bad lines and prints how many."""
    path, records, bad = Path(path), [], []
    if not path.exists():
        raise ValueError(f"{path} does not exist. Give a JSONL file, or 'toy' for the built-in toy world.")
    table = path.suffix == ".csv"                    # its first line is the header
    with open(path, newline="" if table else None, encoding="utf-8") as file:
        lines = [*csv.DictReader(file)] if table else file.read().split("\n")
    for number, line in enumerate(lines, 1 + table):
        if not table and not line.strip():
            continue
        try:
            record = line if table else {"prompt": line} if path.suffix == ".txt" else json.loads(line)
            records.append({**check_record(record, kind, path.parent), "where": f"{path}:{number}"})
        except ValueError as error:
            what = f"not JSON ({error}). Each line holds one whole JSON object." if isinstance(error, json.JSONDecodeError) else error
            bad.append(f"{path}:{number}: {what}")
            if not skip_bad:
                raise ValueError(f"{bad[0]} Fix the line or pass --skip-bad.") from None
    if bad:
        print(f"{path}: {len(bad)} bad lines skipped, the first: {bad[0]}", file=sys.stderr)
    if not records:
        raise ValueError(f"{path}: no {kind or 'good'} records in it.")
    return records


def toy_world(world="image"):
    """The module tests/toy_world.py, or tests/toy_video.py for "video", which stages import only when asked for `toy`."""
    sys.path.append(str(Path(__file__).parent / "tests"))
    return importlib.import_module({"image": "toy_world", "video": "toy_video"}[world])


def in_world(world, *sources):
    """(the beginning of the stages' folders, *sources) in a toy world, "image" or "video": there `toy` is the name of its own records."""
    if world == "image":
        return "out/", *sources
    return "out/video-", *("toy-video" + source[3:] if source.split(":")[0] == "toy" else source for source in sources)


def toy_models():
    """The module tests/toy_models.py, makers of the tiny models."""
    toy_world()
    import toy_models
    return toy_models


def know_toy_classes(path):
    """The arguments of a call of the toy pipeline in a folder, {} for other folders. Its codec's class is imported, as from_pretrained wants."""
    index = Path(path, "model_index.json")
    text = index.read_text() if index.exists() else ""
    return toy_models().CALLS[json.loads(text)["_class_name"]] if '"toy_models"' in text else {}


def open_records(source, kind, num=None, seed=0, skip_bad=False):
    """A sequence of records: `toy:SPLIT` (train, val, test, scenes) makes `num` of them, `toy-video:SPLIT` clips, a file gives all it has."""
    name, _, split = source.partition(":")
    if name in TOYS:
        return toy_world(TOYS[name]).Records(split or "train", kind, num, seed)
    return read_records(source, kind, skip_bad)


def row_of(record, path, number):
    """The record as a line of the JSONL file `path`. Media in memory go to images/ or videos/ beside it: an image as a PNG named by file and
    `number`, the list of a video's frames as a folder of PNGs. Paths are made absolute."""
    name, media = medium_of(record), []
    for k, item in enumerate(record.get(name, []), 1):
        place = f"{name}/{path.stem}_{number:06d}_{k}"
        if isinstance(item, list):
            shutil.rmtree(path.parent / place, ignore_errors=True)
            (path.parent / place).mkdir(parents=True)
            for i, frame in enumerate(item):
                frame.save(path.parent / place / f"{i:04d}.png")
        elif isinstance(item, Image.Image):
            place += ".png"
            (path.parent / name).mkdir(parents=True, exist_ok=True)
            item.save(path.parent / place)
        else:
            place = item if str(item).startswith("data:") else str(Path(item).resolve())
        media.append(place)
    row = {k: v for k, v in record.items() if k not in ("where", "toy_prompt")}
    return json.dumps({**row, name: media} if media else row, default=lambda path: str(path.resolve())) + "\n"


def write_jsonl(path, records):
    """Write records as JSONL, whole or not at all; media as in `row_of`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(aside := path.with_name(path.name + ".aside"), "w") as file:
        file.writelines(row_of(record, path, i) for i, record in enumerate(records))
    os.replace(aside, path)


def open_media(record):
    """The media of a record, in memory: lists of PIL images."""
    return [load_media(m) for m in record[medium_of(record)]]


def load_frames(record, item, num_frames, pipe):
    """The frames of one of the record's media, for a pipeline that makes `num_frames`. ValueError where it has more or fewer."""
    frames = load_media(item, num_frames + 1)
    if len(frames) != num_frames:
        raise ValueError(f"{record.get('where', 'a record')}: {item} has {'more' if len(frames) > num_frames else len(frames)} frames, "
                         f"{type(pipe).__name__} makes {num_frames}. Cut it, or pass --pipe-arg num_frames=... to a video pipeline")
    return frames


def comparison(record, swap=False):
    """The record as a judge sees it; `swap` shows the second image first."""
    media = open_media(record)
    return Comparison(record.get("prompt", ""), *(media[::-1] if swap else media))


# ---------------------------------------------------------------- batches

def batch_indices(records, batch_size, step, seed, window=1):
    """The `batch_size` record indices of global step `step`: a fresh order each epoch, a function of (seed, epoch) alone.

    With a window of several steps, its records are grouped by length, which saves padding, and its batches are shuffled.
    """
    def order(epoch):
        return torch.randperm(len(records), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()

    first, place = divmod(step, window)
    out, position = [], first * window * batch_size
    while len(out) < window * batch_size:
        epoch, start = divmod(position + len(out), len(records))
        out += order(epoch)[start:start + window * batch_size - len(out)]
    if window > 1:
        out.sort(key=lambda i: sum(len(v) for v in records[i].values() if isinstance(v, str)))
    places = torch.randperm(window, generator=torch.Generator().manual_seed(seed * 1_000_003 + first)).tolist()
    return out[places[place] * batch_size:][:batch_size]


def record_messages(record, template=None):
    """(messages, images) of what a record asks, as reward.build_messages: about its prompt, or its instruction, with media where it has them."""
    if "instruction" not in record:
        return build_messages(comparison(record), template)
    shown, parts = open_media(record), PLACE.split(record["instruction"])
    if len(parts) == 1:                              # no places: all media come first
        parts = [""] * len(shown) + parts
    content = []
    for part, frames in zip(parts, [*shown, []]):
        content += [{"type": "text", "text": part}] * bool(part) + [{"type": "image"} for _ in frames]
    return [{"role": "user", "content": content}], sum(shown, [])


def encode(processor, records, responses, template=None, max_tokens=8192):
    """A right-padded batch on the CPU: input_ids, attention_mask, labels (B, T) and whatever the processor makes of the images.

    Labels are the response and the end-of-turn token, -100 elsewhere. A response may be a tuple of several, which then follow one
    copy of images and prompt one after the other; `segments` (B, T) tells them apart: 0 prompt and padding, 1, 2, ... the responses.
    Nothing is ever truncated: a record with more than `max_tokens` tokens, an empty response, or a text that holds the image
    placeholder itself is a ValueError that names its line.
    """
    several = not all(isinstance(response, str) for response in responses)
    responses = [(response,) if isinstance(response, str) else response for response in responses]
    token, texts, images = getattr(processor, "image_token", None), [], []
    for record, answers in zip(records, responses):
        messages, media = record_messages(record, template)
        texts.append(chat_text(processor, messages))
        images.append(media)
        if not all(answer.strip() for answer in answers):
            raise ValueError(f"{record.get('where', 'a record')}: an empty response. Remove the line: there is nothing to learn from it.")
        if token and (texts[-1].count(token) != len(media) or any(token in answer for answer in answers)):
            raise ValueError(f"{record.get('where', 'a record')}: the text holds the image placeholder {token!r}. Remove it: images are placed "
                             "by the template.")
    batch = dict(processor(text=texts, images=images, return_tensors=None))
    prompts, kinds = batch.pop("input_ids"), batch.pop("mm_token_type_ids", None)           # kinds: 1 at image tokens, where the processor tells
    batch.pop("attention_mask")
    targets, segments = [], []                       # of each token of the responses: itself, the number of the response it is in
    for record, prompt, answers in zip(records, prompts, responses):
        tokens = [processor.tokenizer(answer + processor.tokenizer.eos_token, add_special_tokens=False)["input_ids"] for answer in answers]
        targets.append(sum(tokens, []))
        segments.append([k for k, answer in enumerate(tokens, 1) for _ in answer])
        if len(prompt) + len(targets[-1]) > max_tokens:
            raise ValueError(f"{record.get('where', 'a record')}: {len(prompt)} + {len(targets[-1])} tokens, more than --max-tokens "
                             f"{max_tokens}. Use smaller images, a shorter response, or raise the limit.")
    longest = max(len(p) + len(t) for p, t in zip(prompts, targets))

    def pad(heads, tails, value):                    # (B, T)
        return torch.tensor([[*head, *tail] + [value] * (longest - len(head) - len(tail)) for head, tail in zip(heads, tails)])

    def all_of(value, lists):
        return [[value] * len(some) for some in lists]

    out = {k: torch.cat(v) if isinstance(v, list) and torch.is_tensor(v[0]) else torch.as_tensor(np.asarray(v)) for k, v in batch.items()}
    out["input_ids"] = pad(prompts, targets, processor.tokenizer.pad_token_id)
    out["attention_mask"] = pad(all_of(1, prompts), all_of(1, targets), 0)
    out["labels"] = pad(all_of(-100, prompts), targets, -100)
    if several:
        out["segments"] = pad(all_of(0, prompts), segments, 0)
    if kinds is not None:
        out["mm_token_type_ids"] = pad(kinds, all_of(0, targets), 0)
    return out


# ================================================================================================ builders
# Each asks a model about a chunk of source records at a time. What a chunk gives is a function of the options and its place alone.

COMPARE_TEXTS = """\
Two answers to one task about the images above follow. Decide which is better. A good answer: {criteria}

Task: {task}

Answer 1: {first}

Answer 2: {second}

Answer with one JSON object and nothing else: {"reason": "what decides, in one or two sentences", "winner": "Answer 1 or Answer 2"}"""
SCORE_TEXT = """\
Rate an answer to a task about the images above. A good answer: {criteria}

Task: {task}

Answer: {first}

Say briefly what is right and what is not, then end with one line: Final Score: a number from 0 to 100"""
REASONING = ("what it says of each candidate can be seen there; its categories and sub-dimensions fit this prompt; its scores follow from its reasons, each "
             "category's winner from the scores, the overall winner from the categories.")
ANSWERING = "it is right, what it says can be seen in the images, and it answers what was asked, completely and clearly."


def about_texts(template, frames, **texts):
    """One of the questions above, with the images: a Candidate for a judge whose score_template is "{prompt}"."""
    return Candidate(re.sub(r"\{(criteria|task|first|second)\}", lambda name: texts[name[1]], template), frames)


def open_model(args, name, **templates):
    """The judge by name under the options of the command line."""
    templates = {"template": args.template and Path(args.template).read_text(), **templates}
    return open_judge(name, args.max_new_tokens, args.judge_batch, args.concurrency, **templates)


def ask(judge, questions, temperature, *seed, again=False):
    """One text a question, a function of the questions and `seed`. ValueError when not one is answered; `again`: they failed before."""
    torch.manual_seed(number := random.Random(repr(seed)).getrandbits(30))
    if hasattr(judge, "body"):                       # a server's
        judge.body["seed"] = number
    texts = judge(questions, temperature=temperature)
    if len(texts) > 1 and not again and all(isinstance(text, Failure) for text in texts):
        raise ValueError(f"not one of {len(texts)} questions is answered: {texts[0]}. Mend that, then go on with --resume")
    return texts


def swap_at_random(record, *seed):
    """The record with its two media in a random order, a function of `seed`, and the label moved along."""
    if random.Random(repr(seed)).random() < .5:
        return record
    name = medium_of(record)
    toy = {"toy": {**record["toy"], "swapped": not record["toy"]["swapped"]}} if "toy" in record else {}
    return {**record, **toy, name: record[name][::-1], "winner": record["winner"].translate({ord("1"): "2", ord("2"): "1"})}


def append_rows(args, records, build):
    """(counts of the cases that the records fell in, sums of what the chunks counted), after appending what build() makes of them to --out.

    build(numbers of a chunk's records) -> ([(case, record or None), ...], {name: number}). OUT.progress gets a line a chunk: the case of
    each record, and how many bytes --out has then. A run killed at any moment goes on after the last whole line, and ends in the same
    bytes as one left alone. ValueError: --out is there without --resume, or was begun with other options.
    """
    out, progress, source, done = Path(args.out), Path(f"{args.out}.progress"), Path(args.file), []
    options = {k: re.sub("^https?://[^#]*", "server", v) if isinstance(v, str) else v for k, v in vars(args).items()         # servers move
               if k not in ("out", "resume", "concurrency")}
    options["file"] = f"{source.resolve()} {hashlib.blake2b(source.read_bytes(), digest_size=8).hexdigest()}" if source.is_file() else args.file
    lines = progress.read_bytes().split(b"\n")[:-1] if progress.exists() else []            # what follows the last newline is torn
    if out.exists() and not (lines and args.resume):
        fix = ". Go on with it by --resume, or remove it." if lines else f", without {progress}. Remove it or name another."
        raise ValueError(f"{out} is there already{fix}")
    if lines and args.resume:
        head, *done = map(json.loads, lines)
        if changed := [f"{k} {head.get(k)!r} -> {v!r}" for k, v in options.items() if head.get(k) != v]:
            raise ValueError(f"{out} was begun with other options: {', '.join(changed)}. Give the same ones, or another --out.")
    end, size = done[-1]["end"] if done else 0, out.stat().st_size if out.exists() else 0
    if size < end:
        raise ValueError(f"{out} has {size} bytes, but {progress} knows of {end}. Remove both and begin anew.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(progress, "ab") as log, tqdm(total=len(records), initial=min(len(done) * args.chunk, len(records)), desc=args.command) as bar:
        log.truncate(sum(len(line) + 1 for line in lines) if args.resume else 0)
        if not (lines and args.resume):
            log.write(json.dumps(options).encode() + b"\n")
            log.flush()
        with open(out, "ab") as file:
            file.truncate(end)
            for start in range(len(done) * args.chunk, len(records), args.chunk):
                numbers = range(start, min(start + args.chunk, len(records)))
                found, sums = build(numbers)
                file.writelines(row_of(record, out, i).encode() for i, (_, record) in zip(numbers, found) if record)
                file.flush()
                os.fsync(file.fileno())              # the rows first, then the line that counts them
                done.append({"cases": [case for case, _ in found], "sums": sums, "end": out.stat().st_size})
                log.write(json.dumps(done[-1]).encode() + b"\n")
                log.flush()
                bar.update(len(numbers))
    return Counter(case for chunk in done for case in chunk["cases"]), sum((Counter(chunk["sums"]) for chunk in done), Counter())


# ---------------------------------------------------------------- distill: a teacher's traces

def read_trace(text, winner):
    """(None, trace) where the text holds one whole verdict, with all anchors and with people's winner, else (the reason, None). The trace is
    the JSON object alone."""
    said = text.rpartition("</think>")[2]
    answer = said[said.find("{"):said.rfind("}") + 1]                           # without fences and words around it
    verdict = parse_verdict(answer)
    if isinstance(text, Failure):
        return "failure", None
    repaired = {"JSON repaired", "JSON unreadable beyond its winner"} & {*verdict.issues}
    if None in (parse_verdict(text).winner, verdict.winner) or repaired or not {"A", "B", "C"} <= {c.anchor for c in verdict.categories}:
        return "unparsed", None
    return (None, answer) if verdict.winner == winner else ("contradicts", None)


def distill(args):
    """Traces of --teacher on pairs, each shown in a random order; of up to --tries, the first at temperature 0, the first that agrees with
    people's label."""
    pairs, toy = open_records(args.file, "pair", args.num, args.seed, args.skip_bad), args.teacher == "toy"
    teacher = toy_world().teacher if toy else open_model(args, args.teacher)

    def build(numbers):
        shown = [swap_at_random(pairs[i], args.seed, i) for i in numbers]
        questions, found = shown if toy else [comparison(pair) for pair in shown], [("", None)] * len(shown)
        for attempt in range(args.tries):
            left = [k for k, (_, record) in enumerate(found) if not record]
            texts = ask(teacher, [questions[k] for k in left], attempt and args.temperature, args.seed, numbers.start, attempt, again=attempt > 0)
            for k, text in zip(left, texts):
                reason, trace = read_trace(text, WINNERS[shown[k]["winner"]])
                found[k] = (f"dropped: {reason}", None) if reason else (f"kept at try {attempt + 1}", {**shown[k], "response": trace})
        return found, {}
    return append_rows(args, pairs, build)


# ---------------------------------------------------------------- rank: preferences between traces

def rank_traces(traces, winner):
    """(case, best, worst) of the K traces of one pair whose people's label is `winner`; best and worst are None where dropped.

    Sec. 3.2 of arXiv 2602.02380: right over wrong; all right: the better reasoning; all wrong: dropped. "Better reasoning" is
    here what can be checked without another judge: fewer faults in the verdict (broken JSON, scores that do not sum to ten, a
    winner against its own scores). Equal traces are dropped.
    """
    verdicts = [parse_verdict(t) for t in traces]
    right = [v.winner == winner for v in verdicts]
    case = "all right" if all(right) else "all wrong" if not any(right) else "mixed"
    order = sorted(range(len(traces)), key=lambda i: (not right[i], len(verdicts[i].issues)))
    best, worst = order[0], order[-1]
    same = right[best] == right[worst] and len(verdicts[best].issues) == len(verdicts[worst].issues)
    return (case, None, None) if case == "all wrong" or same else (case, traces[best], traces[worst])


def rank_pairs(pairs, sample, num_traces, prefer=None):
    """([(case, preference record or None), ...], {"traces", "right traces"}) of some pairs.

    sample(comparisons) -> texts of the policy; prefer(questions) -> texts of a judge of reasoning, else rank_traces decides. Of several
    right traces that judge is shown the one with the fewest faults and the one with the most, in both orders, and must agree with itself.
    """
    shown = [comparison(pair) for pair in pairs if pair["winner"] != "Tie"]     # of a tie no trace is right
    texts = iter(sample([question for question in shown for _ in range(num_traces)]))
    found, rivals, sums = [], [], {"traces": 0, "right traces": 0}
    for pair in pairs:
        winner = WINNERS[pair["winner"]]
        traces = [text for text in [next(texts) for _ in range(num_traces * (winner > 0))] if not isinstance(text, Failure)]
        sums["traces"] += len(traces)
        sums["right traces"] += sum(parse_verdict(trace).winner == winner for trace in traces)
        case, chosen, rejected = rank_traces(traces, winner) if traces else ("failure" if winner else "tie", None, None)
        if prefer and case == "all right" and len({*traces}) > 1:
            chosen, *_, rejected = sorted(dict.fromkeys(traces), key=lambda trace: len(parse_verdict(trace).issues))
            rivals.append(len(found))
        found.append((case, {**pair, "chosen": chosen, "rejected": rejected, "case": case}) if chosen else
                     (f"dropped: {case}{', alike' * (case == 'all right')}", None))

    def question(record, first, second):
        task = f"Two candidates were generated for a prompt. Judge which serves it better, by categories, with reasons and scores. Prompt: {record['prompt']}"
        return about_texts(COMPARE_TEXTS, sum(open_media(record), []), criteria=REASONING, task=task, first=record[first], second=record[second])

    asked = [question(found[i][1], *order) for order in (("chosen", "rejected"), ("rejected", "chosen")) for i in rivals]
    winners = [parse_verdict(text).winner for text in prefer(asked)] if rivals else []
    for i, one, two in zip(rivals, winners, winners[len(rivals):]):
        record = found[i][1]
        if (one, two) == (2, 1):
            record |= {"chosen": record["rejected"], "rejected": record["chosen"]}
        elif (one, two) != (1, 2):
            found[i] = ("dropped: all right, no agreement", None)
    return found, sums


def build_preferences(judge, pairs, num_traces=4, temperature=.7, progress=True):
    """(preference records, counts): `num_traces` traces of each pair sampled from the judge, then ranked by rank_traces; ties are left out."""
    pairs, found = [p for p in pairs if p["winner"] != "Tie"], []
    for start in tqdm(range(0, len(pairs), 200), desc="traces of 200 pairs each", disable=not progress):       # whose images are in memory
        found += rank_pairs(pairs[start:start + 200], lambda questions: judge(questions, temperature=temperature), num_traces)[0]
    preferences = [record for _, record in found if record]
    return preferences, {name: sum(name in case for case, _ in found) for name in ("mixed", "all right", "all wrong", "failure")} | {"kept": len(preferences)}


def rank(args):
    """Preferences between the traces that --policy writes of each pair: Sec. 3.2 of arXiv 2602.02380, see rank_pairs."""
    pairs, policy = open_records(args.file, "pair", args.num, args.seed, args.skip_bad), open_model(args, args.policy)
    judge = None if args.judge == "heuristic" else open_model(args, args.judge, score_template="{prompt}")

    def build(numbers):
        return rank_pairs([pairs[i] for i in numbers], lambda questions: ask(policy, questions, args.temperature, args.seed, numbers.start), args.num_traces,
                          judge and (lambda questions: ask(judge, questions, 0, args.seed, numbers.start)))
    return append_rows(args, pairs, build)


# ---------------------------------------------------------------- sift: the best and the worst of N candidates

def best_and_worst(pairs, verdicts, scores, num):
    """(None, best, worst) of `num` candidates, or (the reason, None, None).

    With scores, Sec. 3 of arXiv 2503.05236: those who won their comparison and those who lost it, the winner with the highest score and
    the loser with the lowest, if its score is lower. Without: the highest and the lowest win rate, if they differ; of equals the category
    rates decide."""
    if scores:
        won, lost = ([pair[side ^ (verdict.winner == 2)] for pair, verdict in zip(pairs, verdicts) if verdict.winner] for side in (0, 1))
        won, lost = ([i for i in side if scores[i] is not None] for side in (won, lost))
        if not won or not lost:
            return "undecided", None, None
        best, worst, value = max(won, key=scores.__getitem__), min(lost, key=scores.__getitem__), scores
    else:
        rates = win_rates(pairs, verdicts, num)
        value, category = rates.overall.tolist(), rates.category.nan_to_num().tolist()
        met = [i for i in range(num) if value[i] == value[i]]
        if not met:
            return "undecided", None, None
        best, worst = (pick(met, key=lambda i: (value[i], category[i])) for pick in (max, min))
    if value[best] == value[worst]:
        return "equal", None, None
    return ("scores contradict", None, None) if value[best] < value[worst] else (None, best, worst)


def pair_of(record, made, pairs, verdicts, scores, *seed):
    """(case, the record with the best and the worst of its N candidates `made`, texts or lists of frames, or None)."""
    reason, best, worst = best_and_worst(pairs, verdicts, scores, len(made))
    if any(isinstance(text, Failure) for text in made):
        reason = "failure"
    elif not reason and made[best] == made[worst]:
        reason = "alike"
    if reason:
        return f"dropped: {reason}", None
    if isinstance(made[best], str):
        return "kept", {**record, "chosen": made[best], "rejected": made[worst]}
    if len(made[best]) > 1:
        pair = {"videos": [made[best], made[worst]], "winner": "Video 1"}
    else:
        pair = {"images": made[best] + made[worst], "winner": "Image 1"}
    return "kept", swap_at_random({**record, **pair}, *seed)


def sift(args):
    """Pairs of the best and the worst of N candidates that --model makes for each prompt, or preferences between N answers of a
    vision-language model to each question, as --judge finds. Picture i of a prompt is a function of (--seed, the prompt's number, i)."""
    first = open(args.file).readline() if Path(args.file).is_file() else ""
    answers = bool(re.search(r'"(question|instruction|conversations|messages)" *:', first))
    records, N = open_records(args.file, "question" if answers else "prompt", args.num, args.seed, args.skip_bad), args.num_candidates
    schedule_pairs(N, args.pairs)                                               # raises before anything is loaded
    judge = open_model(args, args.judge, score_template="{prompt}" if answers else args.score_template and Path(args.score_template).read_text())
    if answers:
        model = open_model(args, args.model, score_template="{prompt}")
    else:
        from sft import has_bf16, load_pipeline, pipe_arg, sample_media, start_ranks            # sft imports this file
        device = start_ranks().device
        pipe_args = {**know_toy_classes(args.model), **dict(map(pipe_arg, args.pipe_arg))}
        pipe = load_pipeline(args.model, device, torch.bfloat16 if device.type == "cuda" and has_bf16() else torch.float32)

    def build(numbers):
        mine = [records[i] for i in numbers]
        if answers:
            frames = [sum(open_media(record), []) for record in mine]
            made = ask(model, [Candidate(r["instruction"], f) for r, f in zip(mine, frames) for _ in range(N)], args.temperature, args.seed, numbers.start)
        else:
            prompts, seeds = [record["prompt"] for record in mine for _ in range(N)], [(args.seed, number, i) for number in numbers for i in range(N)]
            sources = {"image": [load_media(record["source"])[0] for record in mine for _ in range(N)]} if "source" in mine[0] else {}
            made = sample_media(pipe, prompts, seeds, args.batch_size, **sources, **pipe_args)
        made = [made[i:i + N] for i in range(0, len(made), N)]                  # (B, N) texts or lists of frames

        def question(b, *items):
            """About one candidate of record b, or two."""
            shown = [made[b][i] for i in items]
            if answers:
                texts = dict(zip(("first", "second"), shown))
                return about_texts((SCORE_TEXT, COMPARE_TEXTS)[len(items) - 1], frames[b], criteria=ANSWERING, task=mine[b]["instruction"], **texts)
            return (Candidate, Comparison)[len(items) - 1](mine[b]["prompt"], *map(load_media, shown))

        meets, scores = [], [None] * len(mine)
        for number in numbers:
            rng = random.Random(repr((args.seed, number)))
            halves = [(i, i + 1)[::rng.choice((1, -1))] for i in range(0, N - 1, 2)]            # who is shown first is a coin flip
            meets.append(halves if args.rank_by == "score" else schedule_pairs(N, args.pairs, rng))
        texts = iter(ask(judge, [question(b, *pair) for b, pairs in enumerate(meets) for pair in pairs], 0, args.seed, numbers.start))
        verdicts = [[parse_verdict(next(texts)) for _ in pairs] for pairs in meets]
        if args.rank_by == "score":
            texts = ask(judge, [question(b, i) for b in range(len(mine)) for i in range(N)], 0, args.seed, numbers.start)
            values = [parse_score(text).value for text in texts]
            if values.count(None) == len(values):
                raise ValueError(f"no score in what the judge says, as {texts[0][:200]!r}. With a judge that only compares: --rank-by winrate")
            scores = [values[i:i + N] for i in range(0, len(values), N)]
        return [pair_of(*found, args.seed, number, "order") for *found, number in zip(mine, made, meets, verdicts, scores, numbers)], {}
    return append_rows(args, records, build)


# ---------------------------------------------------------------- the commands

def check(args):
    """Prints what a file holds; every medium is opened. ValueError names the first bad line."""
    records = read_records(args.file, args.kind, args.skip_bad)
    tokenizer = load_processor(args.model).tokenizer if args.model else None
    lengths, media = {}, Counter()
    for record in tqdm(records, desc="check"):
        found = record.get(medium_of(record), [])
        media[f"{len(found)} {medium_of(record)}"] += 1
        try:
            [load_media(m, 1) for m in found]
        except ValueError as error:
            raise ValueError(f"{record['where']}: {error}") from None
        for key in ("response", "chosen", "rejected"):
            if key in record:
                lengths.setdefault(f"{key}, characters", []).append(len(record[key]))
                if tokenizer:
                    lengths.setdefault(f"{key}, tokens", []).append(len(tokenizer(record[key])["input_ids"]))
    kinds = Counter(args.kind or kind_of(record) for record in records)
    print(f"{args.file}: {', '.join(f'{num} {kind} records' for kind, num in kinds.items())}, all well formed")
    for name, num in media.items():
        print(f"  {name:24s} in {num} records")
    for name, values in lengths.items():
        print(f"  {name:24s} min {min(values)}, median {statistics.median(values):g}, max {max(values)}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("command", choices=["check", "toy", "distill", "rank", "sift"])
    add("file", help="JSONL: of records (check), to write (toy), of pairs (distill, rank), of prompts or questions (sift); toy:SPLIT: made as needed")
    # data
    add("--kind", choices=[*FIELDS, "score"], help="check: what all must be; toy: which records  [check each its own, toy pair]")
    add("--split", choices=["train", "val", "test", "scenes"], default="train", help="toy: val and test have held-out prompts")
    add("--num", type=int, default=1000, help="how many toy records")
    add("--world", choices=[*TOYS.values()], default="image", help="toy: still or in motion")
    add("--skip-bad", action=flag, default=False, help="drop malformed lines and print how many")
    # who is asked: a folder, a hub id, or URLs joined by commas
    add("--teacher", help="distill: who writes traces; toy: the toy world's teacher")
    add("--policy", default="out/judge-sft/model", help="rank: the judge that writes traces")
    add("--judge", help="rank: who compares the reasoning of right traces, or heuristic, checkable faults; sift: who ranks candidates  [rank heuristic, "
        "sift the newest of out/judge-*/model]")
    add("--model", help="sift: the diffusers pipeline or, of questions, the vision-language model that makes candidates; check: counts its tokens too")
    add("--template", help="file with the judge's instruction, {prompt} and {medium} in it; default: the model's own, or reward.TEMPLATE")
    add("--score-template", help="sift: the same for scores; default: reward.SCORE_TEMPLATE")
    add("--tries", type=int, default=4, help="distill: traces per pair until one is right, the first at temperature 0")
    add("--num-traces", type=int, default=4, help="rank: traces per pair")
    add("--num-candidates", type=int, default=10, help="sift: per prompt")
    add("--temperature", type=float, default=.7, help="of sampled traces and answers")
    add("--rank-by", choices=["score", "winrate"], default="score", help="sift: N / 2 comparisons and N scores (the paper's), or win rates in --pairs for a "
        "judge that only compares")
    add("--pairs", default="all", help="sift by winrate, who meets whom: all, or ring:K")
    add("--max-new-tokens", type=int, default=2048, help="longest verdict, in tokens")
    add("--judge-batch", type=int, default=16, help="questions a local model answers at a time")
    add("--concurrency", type=int, default=32, help="questions in flight to servers")
    add("--batch-size", type=int, default=8, help="sift: candidates made at a time")
    add("--pipe-arg", nargs="*", default=[], help="sift: key=value for the pipeline's call, as height=512 guidance_scale=3.5")
    # run
    add("--seed", type=int, default=0)
    add("--out", help="distill, rank, sift: the JSONL file that is made; OUT.progress beside it says what became of each record")
    add("--chunk", type=int, help="records between saves  [128, sift 16]")
    add("--resume", action=flag, default=False, help="go on with --out")
    args = parser.parse_args(argv)
    for name, commands in {"out": "distill rank sift", "teacher": "distill", "model": "sift"}.items():
        if args.command in commands.split() and not getattr(args, name):
            parser.error(f"{args.command} needs --{name}")
    args.chunk = (16 if args.command == "sift" else 128) if args.chunk is None else args.chunk
    for name in ("num", "tries", "num_traces", "judge_batch", "concurrency", "batch_size", "chunk"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    return args


def main(argv=None):
    from transformers.utils import logging
    logging.set_verbosity_error()                                               # their notices drown the counts
    logging.disable_progress_bar()
    try:
        args = parse_args(argv)
        if args.command == "check":
            return check(args)
        if args.command == "toy":
            write_jsonl(args.file, open_records(f"{'toy' if args.world == 'image' else 'toy-video'}:{args.split}", args.kind or "pair", args.num, args.seed))
            return print(f"{args.file}: {args.num} {args.kind or 'pair'} records")
        args.judge = args.judge or {"rank": "heuristic", "sift": str(find_judge()) if args.command == "sift" else None}.get(args.command)
        counts, sums = {"distill": distill, "rank": rank, "sift": sift}[args.command](args)
        for case, num in sorted(counts.items(), key=lambda item: item[0].startswith("dropped")):
            print(f"  {case:34s}{num:8d}{num / counts.total():8.1%}")
        if sums["traces"]:
            print(f"  {'traces, and their accuracy':34s}{sums['traces']:8d}{sums['right traces'] / sums['traces']:8.1%}")
        print(f"{args.out}: {sum(num for case, num in counts.items() if not case.startswith('dropped'))} records")
    except (OSError, ValueError) as error:
        raise SystemExit(f"data.py: {error}") from error


if __name__ == "__main__":
    main()
