"""Records in, batches out; a diffusers pipeline as a policy; a teacher's traces.

    python data.py check FILE                                         names the first bad line
    python data.py eval PAIRS --model JUDGE                           a judge's accuracy
    python data.py distill PAIRS --model TEACHER --out traces.jsonl   traces for sft.py

A file holds a JSON object a line, or an array of them. Paths in it are relative to the file.
    pair         {"prompt", "images": [first, second], "winner": "Image 1" | "Image 2" | "Tie"}
    trace        {"prompt", "images", "response"}             the verdict to imitate
    preference   {"prompt", "images", "chosen", "rejected"}   two verdicts on the same pair
    image        {"prompt", "images": [one]}                  a captioned image for a base generator
    prompt       {"prompt"}, "source": an image to edit or animate; or a .txt file of prompts
Videos: "videos" for "images" and "Video 1" for "Image 1"; an mp4, a GIF or a folder of frames. With
"instruction" in place of "prompt" a trace or preference is of any other task. ShareGPT's, Alpaca's
and TRL's records are read as they are. Shapes: B records, T tokens, S steps."""
import argparse, codecs, copy, functools, hashlib, inspect, json, math, os, random, re, shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import diffusers
import torch
import torch.distributed as dist
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from einops import rearrange
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils import logging
from reward import (Candidate, Comparison, Failure, ServerJudge, add_judge_options, ask,
                    build_messages, chat_text, check_text, judge_options, leave_out_video,
                    load_function, load_judge, load_media, parse_score, parse_verdict, read_winner)

KINDS = {  # the fields of a kind beside prompt and media; a record is of the first kind that fits
    "preference": ["chosen", "rejected"], "trace": ["response"], "pair": ["winner"],
    "image": [], "prompt": []}
WINNERS = {"Image 1": 1, "Image 2": 2, "Video 1": 1, "Video 2": 2, "Tie": 0}
UNREADABLE = {UnicodeDecodeError: "not UTF-8 text. Convert or unpack it: ",
              json.JSONDecodeError: "not JSON. A line holds one object: "}
PLACE = re.compile("<image>|<video>")   # of a medium in an instruction of another project
CHUNK = 128                             # records that are judged at a time, their media in memory

# ---------- records
def medium_of(record):                  # the field's name
    return "videos" if "videos" in record else "images"

def kind_of(record):
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
    has_task = "instruction" in record and kind in ("trace", "preference")
    task = "instruction" if has_task else "prompt"
    for name in [task, *KINDS[kind]]:
        value = record.get(name)
        if not (isinstance(value, str) and value.strip()):
            raise ValueError(f"'{name}' is {value!r}. A {kind} record needs it as non-empty text.")
    if kind == "pair":
        winner = read_winner(record["winner"])
        if winner is None or not re.search("[A-Za-z]", record["winner"]):   # some count from 0
            raise ValueError(f"'winner' is {record['winner']!r}. Expected Image 1, Image 2 or Tie.")
        noun = medium_of(record)[:-1].title()
        record["winner"] = ("Tie", f"{noun} 1", f"{noun} 2")[winner]
    if kind == "preference" and record["chosen"] == record["rejected"]:
        raise ValueError("'chosen' equals 'rejected'. Drop the line: it prefers nothing.")
    name = medium_of(record)
    if kind == "prompt" and name in record:
        raise ValueError(f"'{name}' beside a prompt. An image to edit or animate is its 'source'.")
    if kind != "prompt":
        check_media(record, kind, task)
        record[name] = [check_path(folder, item, name == "videos") for item in record[name]]
    for text in [task, *KINDS[kind]]:
        check_text(record[text])
    if "source" in record:
        record["source"] = check_path(folder, record["source"])
    return record

def check_path(folder, item, is_video=False):
    path = folder / str(item)
    if not str(item).strip() or not os.path.exists(path) or path.is_dir() and not is_video:
        raise ValueError(f"{str(item)!r} is no file in {folder}. Paths are relative to the JSONL "
                         "file; download what is a URL.")
    return path

def check_media(record, kind, task):
    """Removes "<image>" before an instruction's text. ValueError: media that do not fit."""
    name = medium_of(record)
    num = len(record[name]) if isinstance(record.get(name), list) else 0
    expected = 1 if kind == "image" else 2 if task == "prompt" else max(num, 1)
    if num != expected:
        raise ValueError(f"'{name}' holds {num} paths. A {kind} record needs {expected}.")
    if task == "instruction":
        places = len(PLACE.findall(record[task]))
        record[task] = re.sub(rf"^(\s*({PLACE.pattern}))+\s*", "", record[task])
        if places not in (0, num) or PLACE.search(record[task]):
            raise ValueError(f"{places} of <image>, <video> for {num} media, or inside the text.")

def read_records(path, kind=None):
    """All records of a .jsonl, .json or .txt file, checked; kind None: each as the kind it is.
    "where" in a record is its file and line, in an array the item. ValueError: the first bad."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; `python tests/toy.py` writes what is in out/toy")
    records = []
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}:{number}"
        try:
            line = line.decode()
            if not line.strip():
                continue
            record = {"prompt": line.strip()} if path.suffix == ".txt" else json.loads(line)
            records.append({**check_record(record, kind, path.parent.absolute()), "where": where})
        except (ValueError, RecursionError) as error:
            reason = UNREADABLE.get(type(error), "")
            raise ValueError(f"{where}: {reason}{error}") from None
        if ("source" in records[-1]) != ("source" in records[0]):
            raise ValueError(f"{where}: some records have a 'source', some none. Split the file.")
    if not records:
        raise ValueError(f"{path}: no {kind or 'good'} records in it.")
    return records

def read_lines(path):
    """The lines of a file as bytes; of a JSON array each item as a line."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if path.suffix == ".txt" or not content.lstrip().startswith(b"["):
        return content.split(b"\n")
    try:
        return [json.dumps(item).encode() for item in json.loads(content)]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON array ({error})") from None

def save_medium(item, folder, name):
    """The medium as `folder`'s record names it: saved as a PNG, a list as a folder of PNGs."""
    if not isinstance(item, (Image.Image, list)):
        return item
    target = folder / name
    if isinstance(item, Image.Image):
        target.parent.mkdir(parents=True, exist_ok=True)
        item.save(f"{target}.png")
        return f"{name}.png"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for i, frame in enumerate(item):
        frame.save(target / f"{i:04d}.png")
    return name

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

def as_question(record, swap=False):
    """A pair as a Comparison, whose second medium comes first with `swap`, or an instruction."""
    media = [load_media(item) for item in record[medium_of(record)]]
    if "instruction" in record:
        return Candidate(record["instruction"], sum(media, []))
    return Comparison(record["prompt"], *(media[::-1] if swap else media), source_of(record))

def source_of(record):
    """[the image that the prompt asks to edit or animate], [] without one."""
    return load_media(record["source"]) if "source" in record else []

def swap_at_random(record, rng):
    """The pair with its media in a random order, the label moved along."""
    if rng.random() < 0.5:
        return record
    name = medium_of(record)
    winner = record["winner"].translate(str.maketrans("12", "21"))
    return {**record, name: record[name][::-1], "winner": winner}

# ---------- records of other projects
def normalize_record(record):
    record = dict(record)
    renamed = {"image": "images", "video": "videos", "completion": "response"}
    if "prompt" not in record:
        renamed |= {"question": "instruction", "caption": "prompt", "output": "response"}
    for name in renamed.keys() & record.keys():
        record[renamed[name]] = record.pop(name)
    for name in ("images", "videos", "system", "input", "history"):
        if name in record and not record[name]:
            del record[name]
    if {"images", "videos"} <= record.keys() or "history" in record:
        raise ValueError("'images' and 'videos' together, or a 'history': split the record.")
    name = medium_of(record)
    if isinstance(record.get(name), str):
        record[name] = [record[name]]
    turns = record.get("prompt", record.get("chosen"))         # a list in TRL's chats
    if isinstance(turns, list) or "conversations" in record or "messages" in record:
        record = from_chat(record)
    elif "instruction" in record:                             # the other two are Alpaca's
        parts = [record.pop(part, None) for part in ("system", "instruction", "input")]
        record["instruction"] = "\n\n".join(filter(None, parts))
    if {"system", "input"} & record.keys():
        raise ValueError("'system' or 'input' beside a 'prompt': make them part of it.")
    return record

def read_turn(turn):
    """(role, text) of TRL's {"role", "content"} or ShareGPT's {"from", "value"}."""
    role = turn["role"] if "role" in turn else turn["from"]
    content = turn["content"] if "content" in turn else turn["value"]
    if isinstance(content, list):
        content = "".join(part.get("text", "<image>") for part in content)
    return {"human": "user", "gpt": "assistant"}.get(role, role), content

def from_chat(record):
    """The record of ShareGPT's "conversations" (LLaMA-Factory) or TRL's "messages" or "prompt"."""
    turns = record.pop("conversations", None) or record.pop("messages", None)
    turns = turns or record.pop("prompt", None) or record["chosen"][:-1]    # both begin alike
    turns = [read_turn(turn) for turn in turns]
    if "system" in record:
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
        raise ValueError(f"the turns are of {roles}: expected a user's, a system's before at most")
    return {**record, "instruction": "\n\n".join(text for _, text in turns)}

# ---------- batches
def batch_indices(num_records, batch_size, step, seed):
    """The `batch_size` record indices of a global step, a function of (seed, step) alone."""
    indices = []
    while len(indices) < batch_size:
        epoch, start = divmod(step * batch_size + len(indices), num_records)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(num_records, generator=generator).tolist()
        indices += order[start:start + batch_size - len(indices)]
    return indices

def encode(processor, records, responses, template=None, max_tokens=8192):
    """A right-padded batch on the CPU: input_ids, attention_mask and labels, each (B, T), and what
    the processor makes of the images. Labels are the response and the end-of-turn token, -100
    elsewhere. ValueError: more than max_tokens; nothing is truncated."""
    tokenizer = processor.tokenizer
    texts = []
    images = []
    for record, response in zip(records, responses, strict=True):
        template_of_record = "{prompt}" if "instruction" in record else template
        messages, media = build_messages(as_question(record), template_of_record)
        texts.append(chat_text(processor, messages))
        images.append(media)
        check_text(response)
    batch = dict(processor(text=texts, images=images, padding=True, padding_side="right",
                           add_special_tokens=False, return_tensors="pt"))
    input_ids = []
    labels = []
    for i, (record, response) in enumerate(zip(records, responses)):
        prompt = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        target = tokenizer(response + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        if len(prompt) + len(target) > max_tokens:
            raise ValueError(f"{record.get('where', 'a record')}: {len(prompt)} + {len(target)} "
                             f"tokens, the model takes {max_tokens}. Nothing is truncated.")
        input_ids.append(torch.cat([prompt, torch.tensor(target)]))
        labels.append(torch.cat([torch.full_like(prompt, -100), torch.tensor(target)]))
    batch["input_ids"] = pad_sequence(input_ids, True, tokenizer.pad_token_id)
    batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in input_ids], True)
    batch["labels"] = pad_sequence(labels, True, -100)
    types = batch.get("mm_token_type_ids")                  # 1 at image tokens; responses have none
    if types is not None:
        missing = batch["labels"].shape[1] - types.shape[1]
        batch["mm_token_type_ids"] = nn.functional.pad(types, (0, missing))
    return batch

# ---------- media of a generator: pipe is a diffusers pipeline, call the arguments of its call
def num_frames_of(pipe, call):
    """How many frames a call of the pipeline makes."""
    options = inspect.signature(type(pipe).__call__).parameters
    name = "frames" if "frames" in options else "num_frames"
    if name not in options:
        return 1
    num_frames = call.get(name, options[name].default)
    factor = getattr(pipe, "vae_scale_factor_temporal", None)
    return num_frames // factor * factor + 1 if factor else num_frames          # as Wan rounds it

def source_images(records):
    """{"image": one or a list} for the pipeline's call where prompts have a source, else {}."""
    if "source" not in records[0]:
        return {}
    is_one = len({str(record["source"]) for record in records}) == 1
    images = [source_of(record)[0] for record in records[:1 if is_one else None]]
    return {"image": images[0] if is_one else images}

def encode_records(pipe, records, call):
    """N clean latents (...) on the CPU, of every record's medium. ValueError: other frames."""
    num_frames = num_frames_of(pipe, call)
    latents = []
    for start in tqdm(range(0, len(records), 4), "latents", leave=False, disable=None):
        media = []
        for record in records[start:start + 4]:
            item = record[medium_of(record)][0]
            frames = load_media(item, num_frames + 1)
            if len(frames) != num_frames:
                count = "more" if len(frames) > num_frames else len(frames)
                raise ValueError(f"{record.get('where', 'a record')}: {item} has {count} frames, "
                                 f"the pipeline makes {num_frames}: num_frames in --pipe-args")
            media.append(frames)
        latents += [x.clone() for x in encode_media(pipe, media, call).cpu()]   # a view pickles all
    return latents

@torch.no_grad()
def encode_media(pipe, media, call):
    """Clean latents of media, lists of PIL frames, cropped to `call`'s height and width: the mean
    of the VAE, shifted, scaled, packed. ValueError: a pipeline that encodes otherwise."""
    vae = getattr(pipe, "vae", None)
    pack = getattr(pipe, "_pack_latents", None)
    if vae is None or pack and len(inspect.signature(pack).parameters) != 5:
        raise ValueError(f"{type(pipe).__name__} has no VAE or packs latents in a way of its own")
    size = {key: call[key] for key in ("height", "width") if key in call}
    sizes = {frame.size for frames in media for frame in frames}
    if not size and len(sizes) > 1:
        raise ValueError(f"media of different sizes, as {sorted(sizes)[:2]}: pass height and "
                         "width, to which they are cropped, in --pipe-args")
    of_video = hasattr(pipe, "video_processor")
    over_time = any(p.ndim == 5 for p in vae.parameters())          # the VAE convolves over frames
    processor = pipe.video_processor if of_video else pipe.image_processor
    resized = []
    for frames in media:
        height, width = processor.get_default_height_width(frames[0], **size)
        resized.append([ImageOps.fit(frame, (width, height), Image.LANCZOS) for frame in frames])
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

# ========== Driver: a diffusers pipeline as a policy, with its own guidance and conditioning
class StopPipeline(Exception):
    """Raised by a step function to leave the pipeline before it decodes."""

class PolicyScheduler:
    """Stands in for pipe.scheduler: the stock schedule, but step_fn(i, x, v), if there is one,
    returns the next latents, and given_timesteps, (S,) or (S, B), replace the schedule's."""
    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.step_fn = None
        self.given_timesteps = None
        self.i = None

        @functools.wraps(scheduler.set_timesteps)    # pipelines inspect its signature
        def set_timesteps(*args, **kwargs):
            if self.step_fn and self.i is not None:
                raise ValueError("the pipeline sets its schedule twice in a call: not supported")
            scheduler.set_timesteps(*args, **kwargs)
            given = self.given_timesteps
            self.timesteps = scheduler.timesteps if given is None else given
            self.i = -1

        @functools.wraps(scheduler.step)
        def step(v, timestep, x, *args, **kwargs):
            if self.step_fn is None:
                return scheduler.step(v, timestep, x, *args, **kwargs)
            self.i += 1
            if v.shape != x.shape:
                raise ValueError(f"{tuple(v.shape)} is predicted for latents {tuple(x.shape)}")
            expected = torch.as_tensor(self.timesteps[self.i])
            if (torch.as_tensor(timestep).to(expected) - expected).abs().max() > 1e-3:
                raise ValueError(f"step {self.i} of the pipeline is at timestep {timestep}, its "
                                 f"schedule says {expected}: leave out `strength` and the like")
            x = self.step_fn(self.i, x, v)
            return SchedulerOutput(prev_sample=x) if kwargs.get("return_dict", True) else (x,)
        self.set_timesteps = set_timesteps
        self.step = step

    def __getattr__(self, name):                     # config, sigmas, order, ...
        return getattr(self.__dict__["scheduler"], name)

    def scale_model_input(self, x, timestep=None):   # what a step function sees is scaled already
        if self.step_fn or not hasattr(self.scheduler, "scale_model_input"):
            return x
        return self.scheduler.scale_model_input(x, timestep)

def prediction_type(pipe):
    """"flow" (the denoiser predicts noise - x0), "epsilon" or "v_prediction"; else a ValueError."""
    scheduler = getattr(pipe.scheduler, "scheduler", pipe.scheduler)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction":
        return "flow"
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"the scheduler predicts {kind!r}: expected epsilon, v_prediction, a flow")
    return kind

def denoisers(pipe):
    """nn.ModuleDict of what is trained in a pipeline: its transformers or its UNet."""
    parts = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")}
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

def stored_dtype(folder):
    """bfloat16 if all of a model's weights in a folder are, else float32."""
    files = [safe_open(path, "pt") for path in folder.glob("*.safetensors")]
    kinds = {file.get_slice(name).get_dtype() for file in files for name in file.keys()}
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32

def load_pipeline(path, device, dtype=torch.float32, frozen=torch.float32, fsdp=False):
    """The pipeline in a folder or hub repository, driven; its pipe.call_args: pipe_args.json. Its
    denoisers are of `dtype`, "auto" is the stored one, all else is of the type `frozen`."""
    leave_out_video()
    local = Path(path).is_dir()                      # whose own code (*.py) is trusted
    folder = path if local else diffusers.DiffusionPipeline.download(path)
    if dist.is_initialized() and dist.get_rank():    # rank 0 first, as code goes to one cache
        dist.barrier()
    dtypes = {name: stored_dtype(Path(folder, name)) if dtype == "auto" else dtype
              for name in ("transformer", "transformer_2", "unet")}
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, torch_dtype={"default": frozen, **dtypes}, trust_remote_code=local)
    if dist.is_initialized() and not dist.get_rank():
        dist.barrier()
    pipe.folder = folder
    call_args = Path(folder, "pipe_args.json")
    pipe.call_args = json.loads(call_args.read_text()) if call_args.exists() else {}
    return drive(pipe, device, fsdp)

def drive(pipe, device, fsdp=False):
    """The pipeline on its device, all but its denoisers frozen, its scheduler and first latents
    wrapped. With fsdp denoisers stay on the CPU. ValueError: latents move otherwise than by one
    scheduler.step."""
    name = type(pipe).__name__
    source = inspect.getsource(inspect.unwrap(type(pipe).__call__))
    if source.count("scheduler.step(") != 1 or "deepcopy(self.scheduler)" in source:
        raise ValueError(f"{name} copies the scheduler or has several scheduler.step: not driven")
    if not hasattr(pipe, "prepare_latents"):
        raise ValueError(f"{name} has no prepare_latents, which the driver wraps")
    prediction_type(pipe)                            # ValueError: one that cannot be trained
    policy = denoisers(pipe)
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            module.requires_grad_(part in policy).eval()
            if not (fsdp and part in policy):
                module.to(device)
            if device.type == "cpu" and part in policy:
                module.set_attention_backend("_native_math")    # faster for a few tokens
    vars(pipe)["scheduler"] = PolicyScheduler(pipe.scheduler)   # setattr would register it
    pipe.one_by_one = bool(pipe.config.get("boundary_ratio") or pipe.config.get("expand_timesteps"))
    pipe.first_latents = None
    pipe.prepare_latents = functools.partial(prepare_latents, pipe, pipe.prepare_latents)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def prepare_latents(pipe, stock, *args, **kwargs):
    """pipe.first_latents, or the pipeline's own in float32, to whose type timesteps are rounded."""
    output = stock(*args, **kwargs)
    latents, *rest = output if isinstance(output, tuple) else [output]
    given = pipe.first_latents
    if given is not None and given.shape != latents.shape:
        raise ValueError(f"latents of shape {tuple(given.shape)}, but this call makes others, of "
                         f"{tuple(latents.shape)}: height, width and num_frames in --pipe-args")
    latents = latents.float() if given is None else given
    return (latents, *rest) if isinstance(output, tuple) else latents

def run_pipeline(pipe, step_fn=None, latents=None, timesteps=None, **call):
    """One call of the pipeline, with gradients; None if step_fn raised StopPipeline."""
    call = {name: copy.copy(x) if isinstance(x, list) else x for name, x in call.items()}
    call = {"output_type": "pil", **call}            # by default videos are arrays
    negative = call.get("negative_prompt")           # lists are copied: pipelines write into them
    if isinstance(negative, str) and isinstance(call["prompt"], list):
        call["negative_prompt"] = [negative] * len(call["prompt"])
    pipe.first_latents = latents
    pipe.scheduler.step_fn = step_fn
    pipe.scheduler.given_timesteps = timesteps
    try:
        return inspect.unwrap(type(pipe).__call__)(pipe, **call)    # without its own no_grad
    except StopPipeline:
        return None
    finally:
        pipe.first_latents = pipe.scheduler.step_fn = pipe.scheduler.given_timesteps = None
        pipe.scheduler.i = None

def predict(pipe, x, t, **call):
    """What the denoiser predicts (prediction_type) at latents x and timestep t, () or (B,), after
    the pipeline's guidance. For epsilon and v, x is sqrt(acp) x0 + sqrt(1 - acp) noise."""
    if t.ndim and pipe.one_by_one:                   # as Wan 2.2, which takes one timestep a call
        return torch.cat([predict(pipe, x[i:i + 1], t[i], **{**call, "prompt": [prompt]})
                          for i, prompt in enumerate(call["prompt"])])
    predictions = []

    def step_fn(i, x, v):
        predictions.append(v)
        raise StopPipeline
    run_pipeline(pipe, step_fn, x, t[None], **{**call, "num_inference_steps": 1})
    v = predictions[0]
    if torch.is_grad_enabled() and not v.requires_grad:
        raise RuntimeError("what is trained does not reach what is predicted: see --targets")
    if v.shape != x.shape:                           # a video UNet's step sees frames
        v = rearrange(v, "(b f) c h w -> b c f h w", b=len(x))
    return v

def unguided(pipe, call):
    """The call without classifier-free guidance; a denoiser that has it as an input keeps it."""
    options = inspect.signature(type(pipe).__call__).parameters
    off = {"true_cfg_scale": 1.0, "guidance_scale": 0.0}
    for model in denoisers(pipe).values():
        if model.config.get("guidance_embeds") or model.config.get("time_cond_proj_dim"):
            off.pop("guidance_scale", None)
    return call | {name: scale for name, scale in off.items() if name in options}

def report_long_prompts(pipe, records, call):
    """Print how many prompts have more tokens than the text encoder with the longest text takes."""
    option = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    limit = call.get("max_sequence_length", option and option.default) or math.inf
    parts = [getattr(part, "tokenizer", part) for name, part in pipe.components.items()
             if re.match("tokenizer", name) and part]
    tokenizer = max(parts, key=lambda tokenizer: tokenizer.model_max_length)
    limit = min(limit, tokenizer.model_max_length)
    long = [r for r in records if len(tokenizer(r.get("prompt", ""))["input_ids"]) > limit]
    if long and not (dist.is_initialized() and dist.get_rank()):
        print(f"{len(long)} of {len(records)} prompts have more than the {limit} tokens that the "
              f"text encoder takes, the rest is cut. The first: {long[0].get('where')}", flush=True)

@torch.no_grad()
def sample_media(pipe, records, seeds, batch_size, call):
    """Samples for prompt records by the stock (ODE) sampler, a list of frames each; sample i is a
    function of records[i] and seeds[i]. Of edits, whose sources differ, one at a time is made."""
    media = []
    batch_size = 1 if "source" in records[0] else batch_size
    for start in tqdm(range(0, len(records), batch_size), "samples", leave=False, disable=None):
        batch = records[start:start + batch_size]
        generators = [seeded_generator(seed) for seed in seeds[start:start + batch_size]]
        output = run_pipeline(pipe, prompt=[record["prompt"] for record in batch],
                              generator=generators, **source_images(batch), **call)
        media += frames_of(output)
    return media

def frames_of(output):
    """[frames, ...] of a pipeline's output: one PIL image of an image, all frames of a video."""
    return [list(item) if isinstance(item, (list, tuple)) else [item] for item in output[0]]

def seeded_generator(*seed):
    """A CPU generator that is a function of the numbers and strings `seed`, on any rank."""
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))

def seeded_noise(shape, *seed):                      # standard normal, on the CPU
    return torch.randn(shape, generator=seeded_generator(*seed))

# ---------- rewards of media, and what --watch measures
@dataclass
class Reward:
    weight: float
    name: str
    function: object        # (media, prompts) -> B numbers, for --watch also {name: B}; None: flex

def load_rewards(text, judge=None):
    """[Reward, ...] of "flex:0.7,FILE.py:function:0.3": flex, verdicts on pairs; score, the judge's
    pointwise scores; FILE.py:function; none. Weights default to 1."""
    def scores(media, prompts):
        questions = [Candidate(p, load_media(frames)) for p, frames in zip(prompts, media)]
        values = [parse_score(text) for text in ask(judge, questions)]
        return [math.nan if value is None else value for value in values]
    rewards = []
    for part in text.split(",") if text != "none" else []:
        name, weight = re.fullmatch(r"(.*?)(?::(-?\d*\.?\d+))?", part.strip()).groups()
        built_in = {"flex": None, "score": scores} if judge else {}
        function = built_in.get(name) or load_function(name)
        if function is None and name not in built_in:
            raise ValueError(f"reward '{name}': pass FILE.py:function, in --reward flex or score")
        rewards.append(Reward(float(weight or 1), name, function))
    return rewards

@torch.no_grad()
def reward_values(reward, media, prompts):
    """{name: (B,) tensor} of a Reward's function; ValueError: not a number for each item."""
    values = reward.function(copy.deepcopy(media), prompts)     # which may write into them
    columns = values if isinstance(values, dict) else {reward.name: values}
    tensors = {}
    for name, column in columns.items():
        try:
            tensors[name] = torch.as_tensor(column, dtype=torch.float32).cpu()
        except (TypeError, ValueError, RuntimeError):
            tensors[name] = torch.zeros(0)
        if tensors[name].shape != (len(media),) or tensors[name].isinf().any():
            raise ValueError(f"reward {name} returned {str(column)[:500]} for {len(media)} items; "
                             "expected one finite number (or NaN) for each")
    return tensors

# ---------- a judge's accuracy
def evaluate_judge(judge, pairs, seed=0, share=lambda function, items: function(items)):
    """{name: number}: how good a judge is on pairs, each shown in a random order and then in the
    other. winner_accuracy leaves out pairs that people call a tie ("diff" of GenAI-Bench), in
    tau_accuracy "tie" is right there; undecided is wrong. share: sft.split_over_ranks."""
    def answer(shown):
        return judge([as_question(pair, swap) for pair, swap in shown])
    rng = random.Random(seed)
    swaps = [rng.random() < 0.5 for _ in pairs]
    shown = [*zip(pairs, swaps), *zip(pairs, [not swap for swap in swaps])]
    verdicts = []
    for start in tqdm(range(0, len(shown), CHUNK), "verdicts", disable=None):
        verdicts += [parse_verdict(text) for text in share(answer, shown[start:start + CHUNK])]
    winners = []
    complete = []
    for verdict, (_, swap) in zip(verdicts, shown):
        turned = {1: 2, 2: 1}.get(verdict.winner, verdict.winner)
        winners.append(turned if swap else verdict.winner)
        anchors = {category.anchor for category in verdict.categories}
        complete.append(verdict.winner is not None and anchors >= {"A", "B", "C"})
    labels = [WINNERS[pair["winner"]] for pair in pairs]
    right = [winner == label for winner, label in zip(winners, labels)]
    again = winners[len(pairs):]                            # in the other order
    return {
        "winner_accuracy": fmean([ok for ok, label in zip(right, labels) if label] or [math.nan]),
        "tau_accuracy": fmean(right),
        "parse_rate": fmean(complete),
        "swap_consistency": fmean([a is not None and a == b for a, b in zip(winners, again)]),
        "first_position_share": fmean([v.winner == 1 for v in verdicts if v.winner] or [math.nan]),
        "failures": sum(isinstance(verdict.text, Failure) for verdict in verdicts)}

# ---------- distill: a teacher's traces
def read_trace(text, winner):
    """("right", the one JSON object in a text) if it is a whole verdict for `winner`."""
    if isinstance(text, Failure):
        return "dropped: failure", None
    answer = text.rpartition("</think>")[2]
    trace = answer[answer.find("{"):answer.rfind("}") + 1]  # without fences and words around it
    try:
        json.loads(trace)
        check_text(trace)
    except (ValueError, RecursionError):
        return "dropped: unparsed", None
    verdict = parse_verdict(text)
    anchors = {category.anchor for category in verdict.categories}
    if verdict.winner is None or not anchors >= {"A", "B", "C"}:
        return "dropped: unparsed", None
    return ("right", trace) if verdict.winner == winner else ("dropped: contradicts", None)

def distill_pairs(teacher, pairs, args, seed):
    """[(case, trace record or None), ...]: the first of --num-samples texts that is right."""
    rng = random.Random(seed)
    records = [swap_at_random(pair, rng) for pair in pairs]
    questions = [as_question(record) for record in records]
    results = [("", None)] * len(records)
    for attempt in range(args.num_samples):
        left = [i for i, (_, record) in enumerate(results) if not record]
        torch.manual_seed(rng.getrandbits(30))
        if isinstance(teacher, ServerJudge):
            teacher.body["seed"] = rng.getrandbits(30)
        temperature = args.temperature if attempt > 0 else 0.0
        asked = [questions[i] for i in left]
        answer = functools.partial(ask, teacher) if attempt == 0 and asked[1:] else teacher
        for i, text in zip(left, answer(asked, temperature=temperature)):
            case, trace = read_trace(text, WINNERS[records[i]["winner"]])
            results[i] = (case, {**records[i], "response": trace} if trace else None)
    return results

def distill(args, teacher):
    """Write --out from distill_pairs of the file's pairs, and print how often each case occurs. A
    killed run goes on where OUT.*.progress ends, one file for each set of options."""
    pairs = read_records(args.file, "pair")
    teacher_name = re.sub("^https?://[^#]*", "server", args.model)              # servers move
    options = [teacher_name, args.template, args.max_new_tokens, args.num_samples,
               args.temperature, args.seed, Path(args.file).read_bytes()]
    journal = Path(f"{args.out}.{hashlib.sha256(repr(options).encode()).hexdigest()[:8]}.progress")
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    if Path(args.out).exists() and not lines:
        raise ValueError(f"{args.out} is there, of other options: name another --out or remove it")
    results = sum([json.loads(line) for line in lines], [])
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.write_text("".join(line + "\n" for line in lines))              # without a torn line
    with open(journal, "a") as file:
        for start in tqdm(range(len(results), len(pairs), CHUNK), "distill"):
            chunk = distill_pairs(teacher, pairs[start:start + CHUNK], args, f"{args.seed} {start}")
            print(json.dumps(chunk, default=str), file=file, flush=True)
            results += chunk
    write_jsonl(args.out, [record for _, record in results if record])
    for case, number in Counter(case for case, _ in results).most_common():
        print(f"  {case:34s}{number:8d}{number / len(results):8.1%}")

# ---------- commands
def check(args):
    """Print what a file holds; every frame is opened. ValueError names the first bad line."""
    kinds = Counter()
    for record in tqdm(read_records(args.file), "check"):
        items = record.get(medium_of(record), [])
        kinds[f"{kind_of(record)} records with {len(items)} {medium_of(record)}"] += 1
        for item in [*items, *filter(None, [record.get("source")])]:
            try:
                load_media(item, 10 ** 9)
            except ValueError as error:
                raise ValueError(f"{record['where']}: {error}") from None
    for kind, number in kinds.items():
        print(f"{args.file}: {number} {kind}, all well formed")

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["check", "eval", "distill"])
    add("file", help="records (check) or pairs")
    add("--model", help="the judge: a folder, hub id, URLs or FILE.py:function")
    add_judge_options(parser)
    add("--num-samples", type=int, default=4, help="distill: traces a pair until one is right")
    add("--temperature", type=float, default=0.7, help="distill: of the traces after the first")
    add("--seed", type=int, default=0)
    add("--out", help="distill: the JSONL file to write; the same command goes on with it")
    args = parser.parse_args(argv)
    for name in {"check": [], "eval": ["model"], "distill": ["model", "out"]}[args.command]:
        if not getattr(args, name):
            parser.error(f"{args.command} needs --{name}")
    return args

def main(argv=None):
    args = parse_args(argv)
    logging.set_verbosity_error()                           # their notices drown the counts
    logging.disable_progress_bar()
    try:
        if args.command == "check":
            return check(args)
        judge = load_judge(args.model, **judge_options(args))
        if args.command == "distill":
            return distill(args, judge)
        numbers = evaluate_judge(judge, read_records(args.file, "pair"), args.seed)
        for name, number in numbers.items():
            print(f"{name:24s}{number:9.3f}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"data.py: {error}") from error

if __name__ == "__main__":
    main()
