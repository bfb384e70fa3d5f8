"""Records in, batches out: preference pairs, verdict traces and preferences between traces, from JSONL or from the toy world.

    python data.py check FILE.jsonl                                   counts, and the first bad line with its reason
    python data.py toy FILE.jsonl --kind pair --split test            toy records as files, to look at and to try everything on

A file holds one JSON object a line. Paths in it are relative to the file.
    pair         {"prompt", "images": [first, second], "winner": "Image 1" | "Image 2" | "Tie"}      (or "videos", "Video 1" ...)
    trace        {"prompt", "images", "response"}                     the verdict to imitate; with "instruction": any other task
    preference   {"prompt", "images", "chosen", "rejected"}           two verdicts on the same pair
    prompt       {"prompt"}                                           for generators; a .txt file or a .csv column "prompt" as well
    image        {"prompt", "images": [one]}                          a captioned image for a base generator
A video is an mp4, a GIF or a folder of frames. Legend: B records, T tokens.
"""
import argparse
import csv
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from reward import Comparison, build_messages, chat_text, load_media, parse_verdict

FIELDS = {"pair": ["winner"], "trace": ["response"], "preference": ["chosen", "rejected"], "prompt": [], "image": []}
TOYS = {"toy": "image", "toy-video": "video"}        # a source of records -> the world they are of
WINNERS = {"Image 1": 1, "Image 2": 2, "Video 1": 1, "Video 2": 2, "Tie": 0}


# ---------------------------------------------------------------- records

def check_record(record, kind, where, folder=Path()):
    """The record with absolute media paths; ValueError names the place, what was seen and the fix."""
    def expect(ok, what, fix):
        if not ok:
            raise ValueError(f"{where}: {what}. {fix}")

    expect(isinstance(record, dict), f"a {type(record).__name__}", "Expected one JSON object a line.")
    text = ["prompt"] * ("instruction" not in record) + [f for f in FIELDS[kind] if f != "winner"]
    for name in text:
        value = record.get(name)
        expect(isinstance(value, str) and value.strip(), f"'{name}' is {value!r}", f"A {kind} record needs it as non-empty text.")
    if kind == "pair":
        expect(record.get("winner") in WINNERS, f"'winner' is {record.get('winner')!r}", "Expected 'Image 1', 'Image 2' or 'Tie'.")
    if kind == "preference":
        expect(record["chosen"] != record["rejected"], "'chosen' equals 'rejected'", "Drop the line: it prefers nothing.")
    if kind != "prompt":
        name = "videos" if "videos" in record else "images"
        media, want = record.get(name), 1 if kind == "image" else None if "instruction" in record else 2
        expect(isinstance(media, list) and media, f"'{name}' is {media!r}", "Expected a list of paths.")
        expect(want in (None, len(media)), f"'{name}' holds {len(media)} paths", f"A {kind} record needs {want}.")
        record[name] = [folder / m if isinstance(m, str) else m for m in media]
        for path in record[name]:
            expect(not isinstance(path, Path) or path.exists(), f"{path} does not exist", "Paths are relative to the JSONL file.")
    return {**record, "where": where}


def read_records(path, kind, skip_bad=False):
    """All records of a JSONL file (for prompts a text file or a CSV with a column "prompt" too), checked. `skip_bad` drops bad lines and
    prints how many."""
    path, records, bad = Path(path), [], []
    if not path.exists():
        raise ValueError(f"{path} does not exist. Give a JSONL file, or 'toy' for the built-in toy world.")
    table = path.suffix == ".csv"                    # its first line is the header
    with open(path, newline="" if table else None) as file:
        lines = [*csv.DictReader(file)] if table else file.read().split("\n")
    for number, line in enumerate(lines, 1 + table):
        where = f"{path}:{number}"
        if not table and not line.strip():
            continue
        try:
            try:
                record = line if table else {"prompt": line} if path.suffix == ".txt" else json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}). Each line holds one whole JSON object.") from None
            records.append(check_record(record, kind, where, path.parent))
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{error} Fix the line or pass --skip-bad.") from None
            bad.append(error)
    if bad:
        print(f"{path}: {len(bad)} bad lines skipped, the first: {bad[0]}", file=sys.stderr)
    if not records:
        raise ValueError(f"{path}: no {kind} records in it.")
    return records


def toy_world(world="image"):
    """The module tests/toy_world.py, or tests/toy_video.py for "video", which stages import only when asked for `toy`."""
    sys.path.append(str(Path(__file__).parent / "tests"))
    return importlib.import_module({"image": "toy_world", "video": "toy_video"}[world])


def in_world(args):
    """The beginning of a stage's folders in the toy world of `--world`, whose records `toy` in the options is made to mean."""
    for name in ("data", "eval_data"):
        source = getattr(args, name)
        setattr(args, name, "toy-video" + source[3:] if args.world == "video" and source.split(":")[0] == "toy" else source)
    return "out/video-" if args.world == "video" else "out/"


def toy_models():
    """The module tests/toy_models.py, makers of the tiny models."""
    toy_world()
    import toy_models
    return toy_models


def know_toy_classes(path):
    """Import the codec that a toy pipeline's folder names; from_pretrained wants it imported before. Other folders need nothing."""
    index = Path(path, "model_index.json")
    if index.exists() and '"toy_models"' in index.read_text():
        toy_models()


def open_records(source, kind, num=None, seed=0, skip_bad=False):
    """A sequence of records: `toy:SPLIT` (train, val, test, scenes) makes `num` of them, `toy-video:SPLIT` clips, a file gives all it has."""
    name, _, split = source.partition(":")
    if name in TOYS:
        return toy_world(TOYS[name]).Records(split or "train", kind, num, seed)
    return read_records(source, kind, skip_bad)


def write_jsonl(path, records):
    """Write records as JSONL, whole or not at all; images in memory go to images/ beside the file, and paths are made relative to it."""
    path = Path(path)
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    with open(aside := path.with_name(path.name + ".aside"), "w") as file:
        for i, record in enumerate(records):
            media = []
            name = "videos" if "videos" in record else "images"
            for k, item in enumerate(record.get(name, [])):
                if isinstance(item, Image.Image):
                    media.append(f"images/{i:06d}_{k + 1}.png")
                    item.save(path.parent / media[-1])
                elif isinstance(item, list):                                    # frames
                    media.append(f"images/{i:06d}_{k + 1}")
                    (path.parent / media[-1]).mkdir(exist_ok=True)
                    for number, frame in enumerate(item):
                        frame.save(path.parent / media[-1] / f"{number}.png")
                else:
                    media.append(str(Path(item).resolve()))
            row = {k: v for k, v in record.items() if k not in ("where", "toy_prompt")}
            file.write(json.dumps({**row, name: media} if media else row) + "\n")
    os.replace(aside, path)


def comparison(record, swap=False):
    """The record as a judge sees it; `swap` shows the second image first."""
    media = [load_media(m) for m in record.get("videos") or record["images"]]
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


def encode(processor, records, responses, template=None, max_tokens=8192):
    """A right-padded batch on the CPU: input_ids, attention_mask, labels (B, T) and whatever the processor makes of the images.

    Labels are the response and the end-of-turn token, -100 elsewhere. A response may be a tuple of several, which then follow one
    copy of images and prompt one after the other; `segments` (B, T) tells them apart: 0 prompt and padding, 1, 2, ... the responses.
    Nothing is ever truncated: a record with more than `max_tokens` tokens, an empty response, or a text that holds the image
    placeholder itself is a ValueError that names its line.
    """
    tokenizer, texts, images = processor.tokenizer, [], []
    for record, response in zip(records, responses):
        where = record.get("where", "a record")
        if "instruction" in record:
            media = [f for m in record.get("videos") or record["images"] for f in load_media(m)]
            text = {"type": "text", "text": record["instruction"]}
            messages = [{"role": "user", "content": [{"type": "image"} for _ in media] + [text]}]
        else:
            messages, media = build_messages(comparison(record), template)
        texts.append(chat_text(processor, messages))
        images.append(media)
        token = getattr(processor, "image_token", None)
        answers = (response,) if isinstance(response, str) else response
        if not all(answer.strip() for answer in answers):
            raise ValueError(f"{where}: an empty response. Remove the line: there is nothing to learn from it.")
        if token and (texts[-1].count(token) != len(media) or any(token in answer for answer in answers)):
            raise ValueError(f"{where}: the text holds the image placeholder {token!r}. Remove it: images are placed by the template.")
    batch = dict(processor(text=texts, images=images, return_tensors=None))
    kinds = batch.pop("mm_token_type_ids", None)     # 1 at image tokens, where the processor tells
    batch.pop("attention_mask")
    rows, segments = [], []                          # (prompt, responses) in tokens; the number of the response each token is in
    for record, prompt, response in zip(records, batch.pop("input_ids"), responses):
        answers = [tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
                   for answer in ((response,) if isinstance(response, str) else response)]
        rows.append((list(prompt), sum(answers, [])))
        segments.append([0] * len(prompt) + [k for k, answer in enumerate(answers, 1) for _ in answer])
        if len(segments[-1]) > max_tokens:
            raise ValueError(f"{record.get('where', 'a record')}: {len(prompt)} + {len(rows[-1][1])} tokens, more than --max-tokens "
                             f"{max_tokens}. Use smaller images, a shorter response, or raise the limit.")
    longest = max(map(len, segments))

    def pad(parts, value):                           # (B, T)
        return torch.tensor([part + [value] * (longest - len(part)) for part in parts])

    out = {k: torch.cat(v) if isinstance(v, list) and torch.is_tensor(v[0]) else torch.as_tensor(np.asarray(v)) for k, v in batch.items()}
    out["input_ids"] = pad([p + t for p, t in rows], tokenizer.pad_token_id)
    out["attention_mask"] = pad([[1] * len(p + t) for p, t in rows], 0)
    out["labels"] = pad([[-100] * len(p) + t for p, t in rows], -100)
    if not all(isinstance(response, str) for response in responses):
        out["segments"] = pad(segments, 0)
    if kinds is not None:
        out["mm_token_type_ids"] = pad([list(k) + [0] * len(t) for k, (_, t) in zip(kinds, rows)], 0)
    return out


# ---------------------------------------------------------------- preferences between traces

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


def build_preferences(judge, pairs, num_traces=4, temperature=.7, progress=True):
    """(preference records, counts): `num_traces` traces of each pair sampled from the judge, then ranked."""
    pairs = [p for p in pairs if p["winner"] != "Tie"]
    traces = []
    for start in tqdm(range(0, len(pairs), 200), desc="traces of 200 pairs each", disable=not progress):       # whose images are in memory
        chunk = [comparison(p) for p in pairs[start:start + 200]]
        traces += judge([pair for pair in chunk for _ in range(num_traces)], temperature=temperature)
    preferences, counts = [], {"mixed": 0, "all right": 0, "all wrong": 0, "kept": 0}
    for i, pair in enumerate(pairs):
        case, chosen, rejected = rank_traces(traces[i * num_traces:(i + 1) * num_traces], WINNERS[pair["winner"]])
        counts[case] += 1
        if chosen:
            counts["kept"] += 1
            preferences.append({**pair, "chosen": chosen, "rejected": rejected, "case": case})
    return preferences, counts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "toy"])
    parser.add_argument("file", help="a JSONL file of records, to check or to write")
    parser.add_argument("--kind", choices=["pair", "trace", "image", "prompt"], default="pair", help="toy: which records")
    parser.add_argument("--split", choices=["train", "val", "test", "scenes"], default="train", help="toy: val and test have held-out prompts")
    parser.add_argument("--num", type=int, default=1000, help="toy: how many")
    parser.add_argument("--seed", type=int, default=0, help="toy: others with another seed")
    args = parser.parse_args(argv)
    if args.command == "toy":
        write_jsonl(args.file, open_records(f"toy:{args.split}", args.kind, args.num, args.seed))
        return print(f"{args.file}: {args.num} {args.kind} records")
    try:
        text = Path(args.file).read_text()
        kind = next((k for k in ("preference", "trace", "pair") if all(f'"{name}"' in text for name in FIELDS[k])),
                    "image" if '"images"' in text else "prompt")
        records = read_records(args.file, kind)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"{args.file}: {len(records)} {kind} records, all well formed")


if __name__ == "__main__":
    main()
