"""Records in, batches out; a diffusers pipeline as a policy; a teacher's traces.

    python data.py check FILE                                         names the first bad line
    python data.py eval PAIRS --model JUDGE                           a judge's accuracy
    python data.py distill PAIRS --model TEACHER --out traces.jsonl   traces for sft.py

A file holds one JSON object a line. Paths in it are relative to the file.
    pair         {"prompt", "images": [first, second], "winner": "Image 1" | "Image 2" | "Tie"}
    trace        {"prompt", "images", "response"}             the verdict to imitate
    preference   {"prompt", "images", "chosen", "rejected"}   two verdicts on the same pair
    question     {"instruction" or "question", "images"}      for a vision-language model to answer
    image        {"prompt", "images": [one]}                  a captioned image for a base generator
    prompt       {"prompt"} for generators, "source": an image to edit or animate; or a .txt file
                 with a prompt a line
Videos: "videos" for "images" and "Video 1" for "Image 1"; an mp4, a GIF or a folder of frames. A
trace or preference with "instruction" in place of "prompt" is of any other task. ShareGPT's and
TRL's records are read as they are. Shapes: B records, T tokens, S steps.
"""
import argparse, copy, functools, hashlib, inspect, json, math, os, pickle, random, re, shutil
from collections import Counter
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from einops import rearrange
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils import logging
from reward import (Candidate, Comparison, Failure, ServerJudge, build_messages, chat_text,
                    load_judge, load_media, parse_verdict)

KINDS = {  # the fields of a kind beside prompt and media; a record is of the first kind that fits
    "preference": ["chosen", "rejected"], "trace": ["response"], "pair": ["winner"],
    "question": ["instruction"], "image": [], "prompt": []}
WINNERS = {"Image 1": 1, "Image 2": 2, "Video 1": 1, "Video 2": 2, "Tie": 0}
PLACE = re.compile("<image>|<video>")   # of a medium in an instruction of another project
CHUNK = 128                             # records that are judged at a time, their media in memory

# ---------- records
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
    name = medium_of(record)
    if kind != "prompt":
        check_media(record, kind, task)
        record[name] = [folder / str(item) for item in record[name]]
    if "source" in record:
        record["source"] = folder / str(record["source"])
    for path in [*(record[name] if kind != "prompt" else []), record.get("source", folder)]:
        if not path.exists():
            raise ValueError(f"{path} does not exist. Paths are relative to the JSONL file; "
                             "download what is a URL.")
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
    """All records of a .jsonl or .txt file, checked; kind None: each as the kind it is. "where" in
    a record is its file and line. ValueError names the first bad line."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist. Expected a file of {kind or ''} records; "
                         "`python tests/toy.py` writes those in out/toy.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = {"prompt": line} if path.suffix == ".txt" else json.loads(line)
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

def open_media(record):
    """The media of a record, in memory: lists of PIL images."""
    return [load_media(item) for item in record[medium_of(record)]]

def as_question(record, swap=False):
    """The record as a question to a judge: which of two media is better (`swap` shows the second
    one first), or its instruction as it is."""
    media = open_media(record)
    if "instruction" in record:
        return Candidate(record["instruction"], sum(media, []))
    return Comparison(record["prompt"], *(media[::-1] if swap else media))

def swap_at_random(record, rng):
    """The pair with its media in a random order, the label moved along."""
    if rng.random() < 0.5:
        return record
    name = medium_of(record)
    winner = record["winner"].translate(str.maketrans("12", "21"))
    return {**record, name: record[name][::-1], "winner": winner}

# ---------- records of other projects
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
    is_chat = isinstance(record.get("prompt", record.get("chosen")), list)
    if is_chat or "conversations" in record or "messages" in record:
        return from_chat(record)
    return record

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

# ---------- batches
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
        template_of_record = "{prompt}" if "instruction" in record else template
        messages, media = build_messages(as_question(record), template_of_record)
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
        if len(prompt) + len(target) > max_tokens:
            raise ValueError(f"{record.get('where', 'a record')}: {len(prompt)} + {len(target)} "
                             f"tokens, more than the {max_tokens} of the model. Use smaller images "
                             "or a shorter response: nothing is truncated.")
        input_ids.append(torch.cat([prompt, torch.tensor(target)]))
        labels.append(torch.cat([torch.full_like(prompt, -100), torch.tensor(target)]))
    mask = [torch.ones_like(row) for row in input_ids]
    batch["input_ids"] = pad_sequence(input_ids, True, tokenizer.pad_token_id)
    batch["attention_mask"] = pad_sequence(mask, True, 0)
    batch["labels"] = pad_sequence(labels, True, -100)
    if "mm_token_type_ids" in batch:                        # 1 at image tokens; responses have none
        types = torch.zeros_like(batch["labels"])
        types[:, :batch["mm_token_type_ids"].shape[1]] = batch["mm_token_type_ids"]
        batch["mm_token_type_ids"] = types
    return batch

# ---------- media of a generator: pipe is a diffusers pipeline, call the arguments of its call
def num_frames_of(pipe, call):
    """How many frames a call of the pipeline makes; 1 where it makes images."""
    option = inspect.signature(type(pipe).__call__).parameters.get("num_frames")
    if option is None:
        return 1
    num_frames = call.get("num_frames", option.default)
    factor = getattr(pipe, "vae_scale_factor_temporal", None)
    is_whole = not factor or num_frames % factor == 1
    return num_frames if is_whole else num_frames // factor * factor + 1        # as Wan rounds it

def source_images(records):
    """{"image": ...} for the pipeline's call where prompt records carry a source image to edit or
    animate, else {}: one image where all have the same, else a list."""
    if "source" not in records[0]:
        return {}
    sources = [record["source"] for record in records]
    if len(set(map(str, sources))) == 1:
        return {"image": load_media(sources[0])[0]}
    return {"image": [load_media(source)[0] for source in sources]}

def encode_records(pipe, records, call):
    """(N, ...) clean latents on the CPU of the one image or video of every record. ValueError: a
    video has more or fewer frames than the pipeline makes."""
    num_frames = num_frames_of(pipe, call)
    latents = []
    for start in range(0, len(records), 64):
        media = []
        for record in records[start:start + 64]:
            item = record[medium_of(record)][0]
            frames = load_media(item, num_frames + 1)
            if len(frames) != num_frames:
                count = "more" if len(frames) > num_frames else len(frames)
                raise ValueError(f"{record.get('where', 'a record')}: {item} has {count} frames, "
                                 f"the pipeline makes {num_frames}: num_frames in --pipe-args")
            media.append(frames)
        latents.append(encode_media(pipe, media, call).cpu())
    return torch.cat(latents)

@torch.no_grad()
def encode_media(pipe, media, call):
    """Clean latents of media, lists of PIL frames, as the pipeline denoises them: the mean of the
    VAE, shifted, scaled and packed. An image VAE sees a video frame by frame: (B, C, F, H, W).
    ValueError: a pipeline that encodes in another way, media of several sizes without height and
    width in `call`."""
    vae = getattr(pipe, "vae", None)
    pack = getattr(pipe, "_pack_latents", None)
    if vae is None or pack and len(inspect.signature(pack).parameters) != 5:
        raise ValueError(f"{type(pipe).__name__} has no VAE or packs latents in a way of its own: "
                         "media cannot be encoded for it")
    size = {key: call[key] for key in ("height", "width") if key in call}
    sizes = {frame.size for frames in media for frame in frames}
    if not size and len(sizes) > 1:
        raise ValueError(f"media of different sizes, as {sorted(sizes)[:2]}: pass height and "
                         "width, to which they are resized, in --pipe-args")
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

        @functools.wraps(scheduler.set_timesteps)    # pipelines inspect its signature
        def set_timesteps(*args, **kwargs):
            scheduler.set_timesteps(*args, **kwargs)
            given = self.given_timesteps
            self.timesteps = scheduler.timesteps if given is None else given
            self.i = -1

        @functools.wraps(scheduler.step)
        def step(v, timestep, x, *args, **kwargs):
            if self.step_fn is None:
                return scheduler.step(v, timestep, x, *args, **kwargs)
            self.i += 1
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
    """What the denoiser predicts: "flow" (the velocity noise - x0), "epsilon" or "v_prediction".
    ValueError: something else."""
    scheduler = getattr(pipe.scheduler, "scheduler", pipe.scheduler)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction":
        return "flow"
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"{type(pipe).__name__}'s scheduler predicts {kind!r}; expected epsilon, "
                         "v_prediction or a flow")
    return kind

def denoisers(pipe):
    """nn.ModuleDict of what is trained in a pipeline: its transformers or its UNet."""
    parts = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")}
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

def load_pipeline(path, device, dtype=torch.float32, fsdp=False):
    """The pipeline in a folder or hub repository, driven by a PolicyScheduler. pipe.call_args are
    the arguments of its call that lie in its folder as pipe_args.json."""
    local = Path(path).is_dir()                      # whose own code (*.py) is trusted
    folder = path if local else diffusers.DiffusionPipeline.download(path)
    for turn in range(dist.get_world_size() if dist.is_initialized() else 1):
        if not dist.is_initialized() or turn == dist.get_rank():     # as code goes to one cache
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                folder, torch_dtype=dtype, trust_remote_code=local)
        if dist.is_initialized():
            dist.barrier()
    pipe.folder = folder
    call_args = Path(folder, "pipe_args.json")
    pipe.call_args = json.loads(call_args.read_text()) if call_args.exists() else {}
    return drive(pipe, device, fsdp)

def drive(pipe, device, fsdp=False):
    """The pipeline on its device, all but its denoisers frozen, its scheduler, first latents and
    prompt encoder wrapped. With fsdp the denoisers stay on the CPU until shard_model.
    ValueError: a pipeline whose latents move in another way than by one scheduler.step, or that is
    offloaded by hooks, under which nothing gets a gradient."""
    name = type(pipe).__name__
    source = inspect.getsource(inspect.unwrap(type(pipe).__call__))
    if source.count("scheduler.step(") != 1 or "deepcopy(self.scheduler)" in source:
        raise ValueError(f"{name} calls scheduler.step at several places or copies the scheduler; "
                         "the driver stands in for one call")
    for method in ("prepare_latents", "encode_prompt"):
        if not hasattr(pipe, method):
            raise ValueError(f"{name} has no {method}, which the driver wraps")
    prediction_type(pipe)                            # ValueError: one that cannot be trained
    policy = denoisers(pipe)
    if any(hasattr(module, "_hf_hook") for module in policy.modules()):
        raise ValueError(f"{name} is offloaded by hooks and would get no gradient: load it without")
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            module.requires_grad_(part in policy).eval()
            if not (fsdp and part in policy):
                module.to(device)
            if device.type == "cpu" and part in policy:
                module.set_attention_backend("_native_math")    # faster for a few tokens
    vars(pipe)["scheduler"] = PolicyScheduler(pipe.scheduler)   # setattr would register it
    pipe.first_latents = None
    pipe.prepare_latents = functools.partial(prepare_latents, pipe, pipe.prepare_latents)
    pipe.encode_prompt = functools.partial(encode_prompt, pipe.encode_prompt, {})
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

@torch.no_grad()
def encode_prompt(stock, memory, /, *args, **kwargs):
    """The pipeline's own, remembered for 32 calls."""
    key = pickle.dumps((args, kwargs))
    if key not in memory:
        memory[key] = stock(*args, **kwargs)
    if len(memory) > 32:
        memory.pop(next(iter(memory)))
    return memory[key]

def run_pipeline(pipe, step_fn=None, latents=None, timesteps=None, **call):
    """One call of the pipeline, with gradients as torch's grad mode says; None if step_fn raised
    StopPipeline."""
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

def predict(pipe, x, t, **call):
    """What the denoiser predicts (prediction_type) at latents x and timestep t, () or (B,), after
    the pipeline's guidance. For epsilon and v, x is sqrt(acp) x0 + sqrt(1 - acp) noise."""
    if t.ndim and (pipe.config.get("boundary_ratio") or pipe.config.get("expand_timesteps")):
        rows = []                                    # Wan 2.2 takes one timestep a call
        for i, prompt in enumerate(call["prompt"]):
            rows.append(predict(pipe, x[i:i + 1], t[i], **{**call, "prompt": [prompt]}))
        return torch.cat(rows)
    predictions = []

    def step_fn(i, x, v):
        predictions.append(v)
        raise StopPipeline
    run_pipeline(pipe, step_fn, x, t[None], **{**call, "num_inference_steps": 1})
    v = predictions[0]
    if v.shape != x.shape:                           # a video UNet's step sees frames
        v = rearrange(v, "(b f) c h w -> b c f h w", b=len(x))
    return v

def unguided(pipe, call):
    """The call without classifier-free guidance, which belongs to sampling; a denoiser that takes
    the guidance as an input keeps it."""
    for model in denoisers(pipe).values():
        if model.config.get("guidance_embeds") or model.config.get("time_cond_proj_dim"):
            return call
    known = "guidance_scale" in inspect.signature(type(pipe).__call__).parameters
    return {**call, "guidance_scale": 0.0} if known else call

@torch.no_grad()
def sample_media(pipe, records, seeds, batch_size, call):
    """Samples for prompt records by the stock (ODE) sampler, a list of frames each; sample i is a
    function of records[i] and seeds[i]. Of edits, whose sources differ, one at a time is made."""
    media = []
    batch_size = 1 if "source" in records[0] else batch_size
    for start in range(0, len(records), batch_size):
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

def seeded_noise(shape, *seed):
    """Standard normal noise, float32 on the CPU, that is a function of `seed`."""
    return torch.randn(shape, generator=seeded_generator(*seed))

# ---------- a judge's accuracy
def mean(values):
    return sum(values) / len(values) if values else math.nan

def evaluate_judge(judge, pairs, seed=0):
    """({name: number}, (record, was it swapped, Verdict) of the first pair): how good a judge is on
    pair records. Every pair is shown in a random order and then in the other one; winners are
    turned back, so that they name the record's media. An undecided verdict is wrong.
    winner_accuracy leaves out the pairs that people call a tie ("diff" of GenAI-Bench), in
    tau_accuracy "tie" is right there; swap_consistency: the same winner in both orders."""
    rng = random.Random(seed)
    swaps = [rng.random() < 0.5 for _ in pairs]
    shown = list(zip([*pairs, *pairs], [*swaps, *[not swap for swap in swaps]]))
    verdicts = []
    for start in tqdm(range(0, len(shown), CHUNK), "judge", disable=None):
        questions = [as_question(pair, swap) for pair, swap in shown[start:start + CHUNK]]
        verdicts += [parse_verdict(text) for text in judge(questions)]
    winners = []
    complete = []
    tens = []
    for verdict, (_, swap) in zip(verdicts, shown):
        turned = {1: 2, 2: 1}.get(verdict.winner, verdict.winner)
        winners.append(turned if swap else verdict.winner)
        anchors = {category.anchor for category in verdict.categories}
        complete.append(verdict.winner is not None and anchors >= {"A", "B", "C"})
        for category in verdict.categories:
            tens += [criterion.total() == 10 for criterion in category.criteria]
    labels = [WINNERS[pair["winner"]] for pair in pairs]
    right = [winner == label for winner, label in zip(winners, labels)]
    again = winners[len(pairs):]                            # in the other order
    numbers = {
        "winner_accuracy": mean([ok for ok, label in zip(right, labels) if label != 0]),
        "tau_accuracy": mean(right),
        "parse_rate": mean(complete),
        "sum10_rate": mean(tens),
        "swap_consistency": mean([a is not None and a == b for a, b in zip(winners, again)]),
        "first_position_share": mean([v.winner == 1 for v in verdicts if v.winner]),
        "failures": sum(isinstance(verdict.text, Failure) for verdict in verdicts)}
    return numbers, (pairs[0], swaps[0], verdicts[0])

# ---------- distill: a teacher's traces
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

def distill_pairs(teacher, pairs, args, seed):
    """[(case, trace record or None), ...] of pairs in a random order: of up to --num-samples texts,
    the first at temperature 0, the first that agrees with people's choice."""
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
        texts = teacher([questions[i] for i in left], temperature=temperature)
        if attempt == 0 and len(texts) > 1 and all(isinstance(text, Failure) for text in texts):
            raise ValueError(f"none of {len(texts)} questions is answered: {texts[0]}. Mend that, "
                             "then give the same command again: it goes on")
        for i, text in zip(left, texts):
            case, trace = read_trace(text, WINNERS[records[i]["winner"]])
            results[i] = (case, {**records[i], "response": trace} if trace else None)
    return results

def distill(args, teacher):
    """Write --out from distill_pairs of the file's pairs, and print how often each case occurs.
    OUT.progress is a journal, a line a chunk, after whose last whole line a killed run goes on.
    ValueError: it was begun with other options."""
    pairs = read_records(args.file, "pair")
    journal = Path(f"{args.out}.progress")
    options = {name: re.sub("^https?://[^#]*", "server", str(value))        # servers move
               for name, value in vars(args).items() if name != "out"}
    options["digest"] = hashlib.sha256(Path(args.file).read_bytes()).hexdigest()
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    lines = lines or [json.dumps(options)]
    if json.loads(lines[0]) != options or Path(args.out).exists() and not journal.exists():
        raise ValueError(f"{args.out} is there or was begun with other options: {lines[0]}. Give "
                         f"the same ones, name another --out, or remove it and {journal}.")
    results = sum([json.loads(line) for line in lines[1:]], [])
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
    """Print what a file holds; every medium is opened. ValueError names the first bad line."""
    kinds = Counter()
    for record in tqdm(read_records(args.file), "check"):
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
    add("command", choices=["check", "eval", "distill"])
    add("file", help="records (check) or pairs")
    add("--model", help="the judge: a folder, a hub id, URLs joined by commas or FILE.py:function")
    add("--template", help="file with the judge's instruction  [the model's own]")
    add("--max-new-tokens", type=int, help="longest verdict  [the model's own]")
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
        template = Path(args.template).read_text(encoding="utf-8") if args.template else None
        judge = load_judge(args.model, template=template, max_new_tokens=args.max_new_tokens)
        if args.command == "distill":
            return distill(args, judge)
        numbers, _ = evaluate_judge(judge, read_records(args.file, "pair"), args.seed)
        for name, number in numbers.items():
            print(f"{name:24s}{number:9.3f}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"data.py: {error}") from error

if __name__ == "__main__":
    main()
