"""Records in, batches out, and the builders of training data that ask judges.

    python data.py check FILE                                             names the first bad line
    python data.py distill PAIRS --teacher URL --out traces.jsonl         for sft.py
    python data.py rank PAIRS --model JUDGE --out preferences.jsonl       for dpo.py
    python data.py sift QUESTIONS --model VLM --out preferences.jsonl     for dpo.py

A file holds one JSON object a line. Paths in it are relative to the file.
    pair         {"prompt", "images": [first, second], "winner": "Image 1" | "Image 2" | "Tie"}
    trace        {"prompt", "images", "response"}             the verdict to imitate
    preference   {"prompt", "images", "chosen", "rejected"}   two verdicts on the same pair
    question     {"instruction" or "question", "images"}      for a vision-language model to answer
    image        {"prompt", "images": [one]}                  a captioned image for a base generator
    prompt       {"prompt"} for generators, "source": an image to edit or animate; a .txt file with
                 a prompt a line, or a .csv file with a column "prompt", as well
Videos: "videos" for "images" and "Video 1" for "Image 1"; an mp4, a GIF or a folder of frames. A
trace or preference with "instruction" in place of "prompt" is of any other task. The records of
ShareGPT, TRL and Diffusion-DPO are read as they are. Shapes: B records, T tokens, N candidates.
"""
import argparse
import csv
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
from collections import Counter
from functools import partial
from itertools import permutations
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils import logging

from reward import (Candidate, Comparison, Failure, ServerJudge, build_messages, chat_text,
                    find_medium, latest_judge, load_judge, load_media, parse_verdict, win_rates)

KINDS = {  # the fields of a kind beside prompt and media; a record is of the first kind that fits
    "preference": ["chosen", "rejected"], "trace": ["response"], "pair": ["winner"],
    "question": ["instruction"], "image": [], "prompt": []}
WINNERS = {"Image 1": 1, "Image 2": 2, "Video 1": 1, "Video 2": 2, "Tie": 0}
PLACE = re.compile("<image>|<video>")   # of a medium in an instruction of another project
CHUNK = 128                             # records that are judged at a time, their media in memory


# ------------------------------------------------------------------------------------------------
# records

def medium_of(record):
    """The name of the field that holds its media."""
    return "videos" if "videos" in record else "images"


def kind_of(record):
    """The kind of a record in our own form."""
    for kind, fields in KINDS.items():
        if record.keys() >= set(fields) and (kind != "image" or medium_of(record) in record):
            return kind


def check_record(record, kind=None, folder=Path()):
    """The record in our own form, its media as paths in `folder`. kind None: whatever kind it is.
    ValueError: what was seen and what was expected."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}. Expected one JSON object a line.")
    try:
        record = normalize_record(record)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"a record of no known form ({error!r}).") from None
    kind = kind or kind_of(record)
    task = "instruction" if "instruction" in record or kind == "question" else "prompt"
    for name in [task, *KINDS[kind]]:
        value = record.get(name)
        if name != "winner" and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"'{name}' is {value!r}. A {kind} record needs it as non-empty text.")
    if kind == "pair" and str(record.get("winner")) not in WINNERS:
        raise ValueError(f"'winner' is {record.get('winner')!r}. "
                         "Expected 'Image 1', 'Image 2' or 'Tie'.")
    if kind == "preference" and record["chosen"] == record["rejected"]:
        raise ValueError("'chosen' equals 'rejected'. Drop the line: it prefers nothing.")
    if kind != "prompt":
        check_media(record, kind, task)
        name = medium_of(record)
        record[name] = [find_medium(str(item), folder) for item in record[name]]
    if "source" in record:
        record["source"] = find_medium(record["source"], folder)
    return record


def check_media(record, kind, task):
    """Removes "<image>" before an instruction's text. ValueError: a number of media that does not
    fit the kind, media inside the text."""
    name = medium_of(record)
    num = len(record[name]) if isinstance(record.get(name), list) else 0
    expected = 1 if kind == "image" else 2 if task == "prompt" else max(num, 1)
    if num != expected:
        raise ValueError(f"'{name}' holds {num} paths. A {kind} record needs {expected}.")
    if task == "instruction":
        places = len(PLACE.findall(record[task]))
        record[task] = re.sub(rf"^(\s*({PLACE.pattern}))+\s*", "", record[task])
        if places not in (0, num) or PLACE.search(record[task]):
            raise ValueError(f"{places} of <image> and <video> in the text, but {num} media. Each "
                             "stands before the text, or none does.")


def read_records(path, kind=None):
    """All records of a .jsonl, .txt or .csv file, checked; kind None: each as the kind it is.
    "where" in a record is its file and line. ValueError names the first bad line."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist. Expected a file of {kind or ''} records; "
                         "`python tests/toy.py` writes those in out/toy.")
    is_table = path.suffix == ".csv"
    with open(path, encoding="utf-8", newline="" if is_table else None) as file:
        lines = list(csv.DictReader(file)) if is_table else file.read().split("\n")
    records = []
    for number, line in enumerate(lines, 2 if is_table else 1):
        if not is_table and not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            if path.suffix == ".txt":
                line = {"prompt": line}
            record = line if isinstance(line, dict) else json.loads(line)
            records.append({**check_record(record, kind, path.parent.absolute()), "where": where})
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}). A line holds one object.") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not records:
        raise ValueError(f"{path}: no {kind or 'good'} records in it.")
    return records


def save_medium(item, folder, name):
    """The medium as a record in `folder` names it. An image in memory is saved as the PNG `name`, a
    list of frames as a folder of PNGs."""
    target = folder / name
    if isinstance(item, Image.Image):
        target.parent.mkdir(parents=True, exist_ok=True)
        item.save(f"{target}.png")
        return f"{name}.png"
    if isinstance(item, list):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for i, frame in enumerate(item):
            frame.save(target / f"{i:04d}.png")
        return name
    return item


def write_jsonl(path, records):
    """Write records as JSONL atomically, their media in memory to images/ or videos/ beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            row = {key: value for key, value in record.items() if key != "where"}
            name = medium_of(row)
            if name in row:
                row[name] = [save_medium(item, path.parent, f"{name}/{path.stem}_{number:06d}_{k}")
                             for k, item in enumerate(row[name], 1)]
            file.write(json.dumps(row, default=str) + "\n")
    os.replace(temporary, path)


def open_media(record):
    """The media of a record, in memory: lists of PIL images."""
    return [load_media(item) for item in record[medium_of(record)]]


def comparison(record, swap=False):
    """The record as a question to a judge; `swap` shows the second medium first."""
    first, second = open_media(record)
    if swap:
        return Comparison(record.get("prompt", ""), second, first)
    return Comparison(record.get("prompt", ""), first, second)


def swap_at_random(record, rng):
    """The pair with its media in a random order, the label moved along."""
    if rng.random() < 0.5:
        return record
    name = medium_of(record)
    winner = record["winner"].translate(str.maketrans("12", "21"))
    return {**record, name: record[name][::-1], "winner": winner}


# ------------------------------------------------------------------------------------------------
# records of other projects

def normalize_record(record):
    """The record in our own form, whichever of the known ones it has."""
    record = dict(record)
    renamed = {"image": "images", "video": "videos", "completion": "response"}
    if "prompt" not in record:
        renamed |= {"question": "instruction", "caption": "prompt"}
    for name in renamed.keys() & record.keys():
        record[renamed[name]] = record.pop(name)
    name = medium_of(record)
    if isinstance(record.get(name), str):
        record[name] = [record[name]]
    if "jpg_0" in record:
        return from_diffusion_dpo(record)
    is_chat = isinstance(record.get("prompt", record.get("chosen")), list)
    if is_chat or "conversations" in record or "messages" in record:
        return from_chat(record)
    return record


def from_diffusion_dpo(record):
    """A pair of {"caption", "jpg_0", "jpg_1", "label_0"}."""
    images = [record.pop("jpg_0"), record.pop("jpg_1")]
    label = record.pop("label_0", None)
    if label not in (0, 0.5, 1):
        raise ValueError(f"'label_0' is {label!r}. Expected 1, where jpg_0 is preferred, 0 or 0.5.")
    return {**record, "images": images, "winner": {1: "Image 1", 0: "Image 2", 0.5: "Tie"}[label]}


def read_turn(turn):
    """(role, text) of TRL's {"role", "content"} or ShareGPT's {"from", "value"}."""
    role = turn["role"] if "role" in turn else turn["from"]
    content = turn["content"] if "content" in turn else turn["value"]
    if isinstance(content, list):
        content = "".join(part.get("text", "<image>") for part in content)
    return {"human": "user", "gpt": "assistant"}.get(role, role), content


def from_chat(record):
    """A trace, preference or question of ShareGPT's "conversations" (LLaMA-Factory), of TRL's
    "messages" or "prompt", with an answer or "chosen" and "rejected". ValueError: more than one
    user's turn and a system's before it."""
    turns = record.pop("conversations", None) or record.pop("messages", None)
    turns = turns or record.pop("prompt", None) or record["chosen"][:-1]    # both begin alike
    turns = [read_turn(turn) for turn in turns]
    if record.get("system"):
        turns.insert(0, ("system", record.pop("system")))
    if turns[-1][0] == "assistant":
        record["response"] = turns.pop()[1]
    for name in ("response", "chosen", "rejected"):
        answer = record.get(name)
        answer = answer[-1] if isinstance(answer, list) else answer
        if isinstance(answer, dict):
            record[name] = read_turn(answer)[1]
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(f"the turns are of {', '.join(map(str, roles))}. Expected one user's and "
                         "one assistant's, a system's before at most.")
    return {**record, "instruction": "\n\n".join(text for _, text in turns)}


# ------------------------------------------------------------------------------------------------
# batches

def batch_indices(num_records, batch_size, step, seed):
    """The `batch_size` record indices of global step `step`: a new order each epoch, a function of
    (seed, epoch) alone, so that a resumed run needs no state."""
    indices = []
    while len(indices) < batch_size:
        epoch, start = divmod(step * batch_size + len(indices), num_records)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(num_records, generator=generator).tolist()
        indices += order[start:start + batch_size - len(indices)]
    return indices


def record_messages(record, template=None):
    """(messages, images) of a record's task, as of reward.build_messages: a comparison under its
    prompt, or its media and then its instruction as it is."""
    if "instruction" in record:
        question = Candidate(record["instruction"], sum(open_media(record), []))
        return build_messages(question, "{prompt}")
    return build_messages(comparison(record), template)


def encode(processor, records, responses, template=None, max_tokens=8192):
    """A right-padded batch on the CPU: input_ids, attention_mask and labels, each (B, T), and what
    the processor makes of the images. Labels are the response and the end-of-turn token, -100
    elsewhere. Nothing is truncated: a record of more than `max_tokens` tokens, an empty response or
    the image placeholder in a text is a ValueError that names the line."""
    tokenizer = processor.tokenizer
    placeholder = getattr(processor, "image_token", None)
    texts = []
    images = []
    for record, response in zip(records, responses, strict=True):
        messages, media = record_messages(record, template)
        texts.append(chat_text(processor, messages))
        images.append(media)
        where = record.get("where", "a record")
        if not response.strip():
            raise ValueError(f"{where}: an empty response. Remove the line.")
        if placeholder and (texts[-1] + response).count(placeholder) != len(media):
            raise ValueError(f"{where}: the text holds the image placeholder {placeholder!r}. "
                             "Remove it: images are placed by the chat template.")
    batch = dict(processor(text=texts, images=images, padding=True, padding_side="right",
                           return_tensors="pt"))
    input_ids = []
    labels = []
    for i, (record, response) in enumerate(zip(records, responses)):
        prompt = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        target = tokenizer(response + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        target = torch.tensor(target)
        if len(prompt) + len(target) > max_tokens:
            raise ValueError(f"{record.get('where', 'a record')}: {len(prompt)} + {len(target)} "
                             f"tokens, more than the {max_tokens} of the model. Use smaller images "
                             "or a shorter response: nothing is truncated.")
        input_ids.append(torch.cat([prompt, target]))
        labels.append(torch.cat([torch.full_like(prompt, -100), target]))
    mask = [torch.ones_like(row) for row in input_ids]
    batch["input_ids"] = pad_sequence(input_ids, True, tokenizer.pad_token_id)
    batch["attention_mask"] = pad_sequence(mask, True, 0)
    batch["labels"] = pad_sequence(labels, True, -100)
    if "mm_token_type_ids" in batch:                        # 1 at image tokens; responses have none
        types = torch.zeros_like(batch["labels"])
        types[:, :batch["mm_token_type_ids"].shape[1]] = batch["mm_token_type_ids"]
        batch["mm_token_type_ids"] = types
    return batch


# ------------------------------------------------------------------------------------------------
# media of a generator: pipe is a diffusers pipeline, call the arguments of its call

def num_frames_of(pipe, call):
    """How many frames a call of the pipeline makes; 1 where it makes images."""
    option = inspect.signature(type(pipe).__call__).parameters.get("num_frames")
    if option is None:
        return 1
    num_frames = call.get("num_frames", option.default)
    factor = getattr(pipe, "vae_scale_factor_temporal", None)
    if factor and num_frames % factor != 1:
        num_frames = num_frames // factor * factor + 1                          # as Wan rounds it
    return num_frames


def source_images(records):
    """{"image": ...} for the pipeline's call where prompt records carry a source image to edit or
    animate, else {}: one image where all have the same, else a list."""
    if "source" not in records[0]:
        return {}
    sources = [record["source"] for record in records]
    if len(set(map(str, sources))) == 1:
        return {"image": load_media(sources[0])[0]}
    return {"image": [load_media(source)[0] for source in sources]}


def load_frames(record, item, num_frames, name):
    """The frames of one of the record's media, for the pipeline `name` that makes `num_frames`.
    ValueError where it has more or fewer."""
    frames = load_media(item, num_frames + 1)
    if len(frames) != num_frames:
        count = "more" if len(frames) > num_frames else len(frames)
        raise ValueError(f"{record.get('where', 'a record')}: {item} has {count} frames, {name} "
                         f"makes {num_frames}. Cut it, or pass --pipe-args num_frames=... to a "
                         "video pipeline")
    return frames


def encode_records(pipe, records, call):
    """(N, ...) clean latents on the CPU of the one image or video of every record."""
    num_frames = num_frames_of(pipe, call)
    latents = []
    for start in range(0, len(records), 64):
        media = []
        for record in records[start:start + 64]:
            item = record[medium_of(record)][0]
            media.append(load_frames(record, item, num_frames, type(pipe).__name__))
        latents.append(encode_media(pipe, media, call).cpu())
    return torch.cat(latents)


@torch.no_grad()
def encode_media(pipe, media, call):
    """Clean latents of media, lists of PIL frames, as the pipeline denoises them: the mean of the
    VAE, shifted, scaled and packed. An image VAE sees a video frame by frame: (B, C, F, H, W).
    ValueError: a pipeline that encodes in another way, media of several sizes without height and
    width in `call`."""
    name = type(pipe).__name__
    vae = getattr(pipe, "vae", None)
    pack = getattr(pipe, "_pack_latents", None)
    if vae is None or pack and len(inspect.signature(pack).parameters) != 5:
        raise ValueError(f"{name} has no VAE or packs latents in a way of its own: media cannot be "
                         "encoded for it")
    size = {key: call[key] for key in ("height", "width") if key in call}
    sizes = {frame.size for frames in media for frame in frames}
    if not size and len(sizes) > 1:
        raise ValueError(f"media of different sizes, as {sorted(sizes)[:2]}: pass --pipe-args "
                         "height=... width=..., to which they are resized")
    of_video = hasattr(pipe, "video_processor")
    over_time = any(p.ndim == 5 for p in vae.parameters())          # the VAE convolves over frames
    processor = pipe.video_processor if of_video else pipe.image_processor
    resized = []
    for frames in media:
        height, width = processor.get_default_height_width(frames[0], **size)
        resized.append([processor.resize(frame, height, width) for frame in frames])
    if of_video:
        pixels = processor.preprocess_video(resized)                # (B, 3, F, H, W)
        pixels = pixels if over_time else rearrange(pixels, "b c f h w -> (b f) c h w")
    else:
        pixels = processor.preprocess([frames[0] for frames in resized])
        pixels = rearrange(pixels, "b c h w -> b c 1 h w") if over_time else pixels
    coded = vae.encode(pixels.to(pipe.device, vae.dtype))
    x = (coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded.latent).float()
    config = vae.config
    shift = torch.tensor(config.get("latents_mean") or config.get("shift_factor") or 0.0)
    spread = torch.tensor(config.get("latents_std") or 1.0)
    shape = (1, -1, *[1] * (x.ndim - 2))
    x = (x - shift.view(shape).to(x)) / spread.view(shape).to(x)
    x = x * (config.get("scaling_factor") or 1)
    if pack:
        return pack(x, *x.shape[:2], *x.shape[-2:])
    if of_video and not over_time:
        x = rearrange(x, "(b f) c h w -> b c f h w", b=len(media))
    return x


# ------------------------------------------------------------------------------------------------
# what the builders share

def build_file(args, records, build):
    """Write --out from build(records of a chunk, seed) -> [(case, record or None), ...], a function
    of these alone, and print how often each case occurs.

    OUT.progress is a journal: the options, then a line a chunk. A run that was killed goes on after
    its last whole line; --out is written at the end. ValueError: other options than before."""
    out = Path(args.out)
    journal = Path(f"{args.out}.progress")
    options = {name: re.sub("^https?://[^#]*", "server", str(value))        # servers move
               for name, value in vars(args).items() if name != "out"}
    options["digest"] = hashlib.sha256(Path(args.file).read_bytes()).hexdigest()
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    if out.exists() and not lines:
        raise ValueError(f"{out} is there already, without {journal}. Remove it or name another.")
    lines = lines or [json.dumps(options)]
    changes = sorted(json.loads(lines[0]).items() ^ options.items())
    if changes:
        raise ValueError(f"{out} was begun with other options: {changes}. Give the same ones, name "
                         f"another --out, or remove {journal}.")
    results = sum([json.loads(line) for line in lines[1:]], [])
    journal.parent.mkdir(parents=True, exist_ok=True)
    with open(journal, "r+" if journal.exists() else "w") as file:
        file.writelines(line + "\n" for line in lines)
        file.truncate()                                     # a torn line
        for start in tqdm(range(len(results), len(records), CHUNK), args.command):
            chunk = build(records[start:start + CHUNK], f"{args.seed} {start}")
            file.write(json.dumps(chunk, default=str) + "\n")
            file.flush()
            results += chunk
    rows = [record for _, record in results if record]
    write_jsonl(out, rows)
    for case, number in Counter(case for case, _ in results).most_common():
        print(f"  {case:34s}{number:8d}{number / len(results):8.1%}")
    print(f"{out}: {len(rows)} records")


def ask(judge, questions, temperature, seed, check=True):
    """A text for each question, a function of the questions and `seed`. ValueError where none of
    several is answered, unless `check` is off."""
    number = random.Random(seed).getrandbits(30)
    torch.manual_seed(number)
    if isinstance(judge, ServerJudge):
        judge.body["seed"] = number
    texts = judge(questions, temperature=temperature)
    if check and len(texts) > 1 and all(isinstance(text, Failure) for text in texts):
        raise ValueError(f"none of {len(texts)} questions is answered: {texts[0]}. Mend that, then "
                         "give the same command again: it goes on")
    return texts


def sample_texts(sample, questions, num):
    """[`num` texts, ...], one list for each question. sample(questions) -> texts."""
    texts = sample([question for question in questions for _ in range(num)])
    return [texts[start:start + num] for start in range(0, len(texts), num)]


# ------------------------------------------------------------------------------------------------
# distill: a teacher's traces

def read_trace(text, winner):
    """("right", trace) of a text that holds one whole verdict with all three categories and
    people's `winner`, else ("dropped: ...", None). The trace is the JSON object alone."""
    if isinstance(text, Failure):
        return "dropped: failure", None
    answer = text.rpartition("</think>")[2]
    trace = answer[answer.find("{"):answer.rfind("}") + 1]  # without fences and words around it
    try:
        json.loads(trace)
    except (ValueError, RecursionError):
        return "dropped: unparsed", None
    verdict = parse_verdict(text)
    anchors = {category.anchor for category in verdict.categories}
    if verdict.winner is None or not anchors >= {"A", "B", "C"}:
        return "dropped: unparsed", None
    return ("right", trace) if verdict.winner == winner else ("dropped: contradicts", None)


def distill(args, load):
    """Traces that --teacher writes of pairs in a random order: of up to --num-samples, the first at
    temperature 0, the first that agrees with people's choice."""
    teacher = load(args.teacher)

    def build(pairs, seed):
        rng = random.Random(seed)
        records = [swap_at_random(pair, rng) for pair in pairs]
        questions = [comparison(record) for record in records]
        results = [("", None)] * len(records)
        for attempt in range(args.num_samples):
            left = [i for i, (_, record) in enumerate(results) if not record]
            temperature = args.temperature if attempt > 0 else 0.0
            texts = ask(teacher, [questions[i] for i in left], temperature, f"{seed} {attempt}",
                        check=attempt == 0)
            for i, text in zip(left, texts):
                case, trace = read_trace(text, WINNERS[records[i]["winner"]])
                results[i] = (case, {**records[i], "response": trace} if trace else None)
        return results

    build_file(args, read_records(args.file, "pair"), build)


# ------------------------------------------------------------------------------------------------
# sift: the best and the worst of N candidates; dpo.py samples those of a generator

def best_of_n(pairs, verdicts, scores, num):
    """(None, best, worst) of `num` candidates, or (the reason, None, None).

    With scores, Sec. 3 of arXiv 2503.05236: of those who won a comparison the one with the highest
    score, of those who lost one the one with the lowest, if its score is lower. Without: the
    highest and the lowest win rate, if they differ; of equals the category rates decide."""
    winners = []
    losers = []
    if scores is not None:
        values = [(score,) for score in scores]
        for pair, verdict in zip(pairs, verdicts):
            if verdict.winner:
                winners.append(pair[verdict.winner - 1])
                losers.append(pair[2 - verdict.winner])
        winners = [i for i in winners if scores[i] is not None]
        losers = [i for i in losers if scores[i] is not None]
    else:
        rates = win_rates(pairs, verdicts, num)
        values = list(zip(rates.overall.tolist(), rates.category.nan_to_num().tolist()))
        winners = losers = [i for i in range(num) if not math.isnan(values[i][0])]
    if not winners or not losers:
        return "undecided", None, None
    best = max(winners, key=values.__getitem__)
    worst = min(losers, key=values.__getitem__)
    if values[best][0] == values[worst][0]:
        return "equal", None, None
    if values[best][0] < values[worst][0]:
        return "scores contradict", None, None
    return None, best, worst


def pair_of(record, candidates, pairs, verdicts, scores=None, rng=random):
    """("kept", training record) of N candidates for a record, else ("dropped: ...", None): the best
    and the worst text as chosen and rejected, or list of frames as a pair in a random order."""
    reason, best, worst = best_of_n(pairs, verdicts, scores, len(candidates))
    if any(isinstance(candidate, Failure) for candidate in candidates):
        reason = "failure"
    elif reason is None and candidates[best] == candidates[worst]:
        reason = "alike"
    if reason:
        return f"dropped: {reason}", None
    chosen = candidates[best]
    rejected = candidates[worst]
    if isinstance(chosen, str):
        return "kept", {**record, "chosen": chosen, "rejected": rejected}
    if len(chosen) > 1:
        media = {"videos": [chosen, rejected], "winner": "Video 1"}
    else:
        media = {"images": [*chosen, *rejected], "winner": "Image 1"}
    return "kept", swap_at_random({**record, **media}, rng)


COMPARE_TEXTS = """\
Two answers to one task about the images above follow. Decide which is better. A good answer: \
{criteria}

Task: {task}

Answer 1: {first}

Answer 2: {second}

Answer with one JSON object and nothing else: {"reason": "what decides, in one or two sentences", \
"winner": "Answer 1 or Answer 2"}"""
GOOD_ANSWER = """it is right, what it says can be seen in the images, and it answers what was \
asked, completely and clearly."""
GOOD_REASONING = """what it says of each candidate can be seen there; its categories and \
sub-dimensions fit this prompt; its scores follow from its reasons, each category's winner from \
the scores, the overall winner from the categories."""
JUDGE_TASK = """Two candidates were generated for a prompt. Judge which serves it better, by \
categories, with reasons and scores. Prompt: """


def rank_texts(judge, records, candidates):
    """[(case, preference or None), ...] of N texts about each record, verdicts or answers to its
    instruction: the best and the worst by win rates. All are compared in both orders, so that a
    judge which goes by the position finds them equal. judge(questions) -> texts; its score_template
    is "{prompt}"."""
    questions = []
    for record, texts in zip(records, candidates):
        fields = {"criteria": GOOD_REASONING, "task": JUDGE_TASK + record.get("prompt", "")}
        if "instruction" in record:
            fields = {"criteria": GOOD_ANSWER, "task": record["instruction"]}
        images = sum(open_media(record), [])
        for first, second in permutations(texts, 2):
            fields |= {"first": first, "second": second}
            prompt = re.sub(r"\{(\w+)\}", lambda name: fields[name[1]], COMPARE_TEXTS)
            questions.append(Candidate(prompt, images))
    verdicts = iter([parse_verdict(text) for text in judge(questions)])
    results = []
    for record, texts in zip(records, candidates):
        pairs = list(permutations(range(len(texts)), 2))
        results.append(pair_of(record, texts, pairs, [next(verdicts) for _ in pairs]))
    return results


def sift(args, load):
    """Preferences between the best and the worst of --num-samples answers of --model."""
    model = load(args.model, score_template="{prompt}")
    args.judge = args.judge or latest_judge()
    judge = load(args.judge, score_template="{prompt}")

    def build(records, seed):
        questions = []
        for record in records:
            questions.append(Candidate(record["instruction"], sum(open_media(record), [])))
        sample = partial(ask, model, temperature=args.temperature, seed=seed)
        answers = sample_texts(sample, questions, args.num_samples)
        return rank_texts(partial(ask, judge, temperature=0.0, seed=seed), records, answers)

    build_file(args, read_records(args.file, "question"), build)


# ------------------------------------------------------------------------------------------------
# rank: preferences between traces

def rank_traces(traces, winner):
    """(case, best, worst) of one pair's traces, where `winner` is people's choice; best and worst
    are None where nothing is preferred.

    Sec. 3.2 of arXiv 2602.02380: right over wrong; all right: the better reasoning; all wrong:
    dropped. Better reasoning is here what can be checked: fewer faults in the verdict, such as
    scores that do not sum to ten."""
    if not traces:
        return "failure", None, None
    verdicts = [parse_verdict(trace) for trace in traces]
    faults = [(verdict.winner != winner, len(verdict.issues)) for verdict in verdicts]
    best = min(faults)                                      # (is it wrong, number of faults)
    worst = max(faults)
    if best[0]:
        return "all wrong", None, None
    case = "mixed" if worst[0] else "all right"
    if best == worst:
        return case, None, None
    return case, traces[faults.index(best)], traces[faults.index(worst)]


def rank_pairs(sample, pairs, num_traces, judge=None):
    """[(case, preference or None), ...] of pairs, from `num_traces` traces of each. A judge of
    reasoning, if given, decides where all are right. sample and judge: questions -> texts."""
    groups = sample_texts(sample, [comparison(pair) for pair in pairs], num_traces)
    results = []
    rivals = {}                                             # {number of a pair: two right traces}
    for i, (pair, traces) in enumerate(zip(pairs, groups)):
        traces = [trace for trace in traces if not isinstance(trace, Failure)]
        case, best, worst = rank_traces(traces, WINNERS[pair["winner"]])
        if best:
            results.append((case, {**pair, "chosen": best, "rejected": worst}))
        else:
            results.append((f"dropped: {case}", None))
        distinct = list(dict.fromkeys(traces))
        if judge and case == "all right" and len(distinct) > 1:
            rivals[i] = distinct[:2]
    if rivals:
        ranked = rank_texts(judge, [pairs[i] for i in rivals], rivals.values())
        for i, (_, record) in zip(rivals, ranked):
            results[i] = ("all right" if record else "dropped: all right", record)
    return results


def build_preferences(judge, pairs, num_traces=4, temperature=0.7, prefer=None):
    """(preference records, {case: number}) of traces that the judge writes of pairs; ties are left
    out. prefer(questions) -> texts of a judge of reasoning."""
    pairs = [pair for pair in pairs if pair["winner"] != "Tie"]
    sample = partial(judge, temperature=temperature)
    results = []
    for start in tqdm(range(0, len(pairs), CHUNK), "traces"):
        results += rank_pairs(sample, pairs[start:start + CHUNK], num_traces, prefer)
    records = [record for _, record in results if record]
    counts = {"kept": len(records)}
    for name in ("mixed", "all right", "all wrong", "failure"):
        counts[name] = sum(name in case for case, _ in results)
    return records, counts


def rank(args, load):
    """Preferences between the --num-samples traces that --model writes of each pair."""
    model = load(args.model)
    judge = load(args.judge, score_template="{prompt}") if args.judge else None

    def build(pairs, seed):
        sample = partial(ask, model, temperature=args.temperature, seed=seed)
        prefer = judge and partial(ask, judge, temperature=0.0, seed=seed)
        return rank_pairs(sample, pairs, args.num_samples, prefer)

    pairs = [pair for pair in read_records(args.file, "pair") if pair["winner"] != "Tie"]
    build_file(args, pairs, build)


# ------------------------------------------------------------------------------------------------
# commands

def check(args):
    """Print what a file holds; every medium is opened. ValueError names the first bad line."""
    records = read_records(args.file)
    kinds = Counter()
    for record in tqdm(records, "check"):
        items = record.get(medium_of(record), [])
        kinds[f"{kind_of(record)} records with {len(items)} {medium_of(record)}"] += 1
        for item in items:
            try:
                load_media(item, 1)
            except ValueError as error:
                raise ValueError(f"{record['where']}: {error}") from None
    for kind, number in kinds.items():
        print(f"{args.file}: {number} {kind}, all well formed")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["check", "distill", "rank", "sift"])
    add("file", help="records (check), pairs (distill, rank) or questions (sift)")
    # models: a folder, a hub id, URLs joined by commas, or FILE.py:function
    add("--teacher", help="distill: writes the traces")
    add("--model", help="rank: the judge that writes traces; sift: answers the questions")
    add("--judge", help="rank: compares the reasoning of right traces  [checkable faults]; sift: "
        "ranks the answers  [the newest of out/judge-*/model]")
    add("--template", help="file with the judge's instruction  [the model's own]")
    add("--num-samples", type=int, default=4,
        help="traces or answers of each record; distill stops at the first right one")
    add("--temperature", type=float, default=0.7, help="of sampled traces and answers")
    add("--max-new-tokens", type=int, help="longest trace or answer  [the model's own]")
    # run
    add("--seed", type=int, default=0)
    add("--out", help="the JSONL file to write; the same command goes on with it")
    args = parser.parse_args(argv)
    writer = "teacher" if args.command == "distill" else "model"
    for name in [writer, "out"] if args.command != "check" else []:
        if not getattr(args, name):
            parser.error(f"{args.command} needs --{name}")
    if args.num_samples < 1:
        parser.error(f"--num-samples is {args.num_samples}; expected at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    logging.set_verbosity_error()                           # their notices drown the counts
    logging.disable_progress_bar()
    try:
        if args.command == "check":
            return check(args)
        template = Path(args.template).read_text(encoding="utf-8") if args.template else None
        load = partial(load_judge, template=template, max_new_tokens=args.max_new_tokens)
        {"distill": distill, "rank": rank, "sift": sift}[args.command](args, load)
    except (OSError, ValueError) as error:
        raise SystemExit(f"data.py: {error}") from error


if __name__ == "__main__":
    main()
