"""Imitate: supervised fine-tuning of a judge on verdict traces, or of a generator on captioned images.

    python sft.py                                                      the toy judge, from nothing
    python sft.py --task generator                                     the toy generator, from nothing
    torchrun --nproc_per_node=8 sft.py --model Qwen/Qwen3-VL-8B-Instruct --data traces.jsonl --eval-data pairs.jsonl --optim adamw \\
        --lr 2.5e-6 --batch-size 1 --accumulation 4 --fsdp --grad-ckpt

One loop, two losses: cross-entropy on the response of a vision-language model, and flow matching for a diffusers pipeline.
The file opens with two ruled blocks that dpo.py and grpo.py import: the toolbox (processes, LoRA, optimizers, checkpoints, log)
and the driver (any diffusers pipeline as a policy). Legend: B records, T tokens, V vocabulary, C H W latent.
"""
import argparse
import random
import time

from tqdm import tqdm

from data import WINNERS, batch_indices, comparison, encode, in_world, know_toy_classes, load_frames, medium_of, open_records, toy_models, toy_world
from reward import Candidate, Comparison, LocalJudge, TEMPLATE, evaluate_judge, format_verdict

# ================================================================================================ toolbox
# What every stage needs and nobody tweaks per stage. Plain arguments in, no name from outside: paste the block to stand alone.
import contextlib
import hashlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


class Ranks(NamedTuple):
    """This process among all: RANK decides who prints and writes, LOCAL_RANK picks the device."""
    rank: int
    world: int
    device: torch.device


def start_ranks():
    """Join torchrun's process group (NCCL on GPUs, gloo on CPUs), or be the only rank."""
    for library in (transformers, diffusers):                                   # their notices drown the numbers
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")            # the name that older diffusers know, too
    torch.set_flush_denormal(True)                                              # sharp attention is full of them; a CPU crawls
    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=4))     # rank 0 may judge while others wait
    return Ranks(*((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)), device)


def gather(items, ranks):
    """The lists of all ranks, joined in the order of the ranks."""
    if ranks.world == 1:
        return list(items)
    out = [None] * ranks.world
    dist.all_gather_object(out, list(items))
    return [item for part in out for item in part]


def total(value, ranks):
    """The sum of a number over all ranks."""
    return sum(gather([float(value)], ranks))


def sync_gradients(params, ranks):
    """Sum the gradients over ranks, in buckets of 2^26 numbers; sharded ones are summed already. None counts as zero, so that a
    parameter unused on one rank cannot hang the others."""
    params = [p for p in params if not isinstance(p, DTensor)] if ranks.world > 1 else []
    while params:
        bucket = [params.pop()]
        while params and sum(p.numel() for p in bucket) + params[-1].numel() < 2 ** 26:
            bucket.append(params.pop())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        dist.all_reduce(flat)
        for p, grad in zip(bucket, flat.split([p.numel() for p in bucket])):
            p.grad = grad.view_as(p)


def blocks(model):
    """The repeated blocks of a model, the members of its outermost nn.ModuleLists: the units of sharding and compiling."""
    lists = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in lists):
            lists.append(name)
    return [block for name in lists for block in model.get_submodule(name)]


def shard(model, ranks, fsdp=False, bf16=False):
    """The sharding hook; the model comes out on its device. By default every rank keeps a whole copy, made equal to rank 0's, and
    sync_gradients sums the gradients (DDP).

    With fsdp, FSDP2: each block's weights lie split over the ranks, are gathered (in bfloat16 with bf16) while the block computes,
    and gradients are summed in float32. Ranks must have built equal models.
    """
    if not fsdp or ranks.world == 1:
        model.to(ranks.device)
        for p in model.parameters() if ranks.world > 1 else []:
            dist.broadcast(p.data, 0)
    else:
        # inputs stay float32: in bfloat16 a timestep of 999 would be 1000; autocast casts what may be cast
        policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
        for part in [*blocks(model), model]:
            fully_shard(part, mp_policy=policy)
            part.set_gradient_divide_factor(1.0)                                # sums, as the loss is divided already
            part.set_force_sum_reduction_for_comms(True)
        model.enter = lambda function, *args: function(model, *args)
        register_fsdp_forward_method(model, "enter")
        model.to(ranks.device)                                                  # what is no parameter; shards are there already


def enter(model, function, *args):
    """function(model, *args) as one forward pass of the model, so that FSDP has its outermost weights (embeddings, head) at hand."""
    return model.enter(function, *args) if isinstance(model, FSDPModule) else function(model, *args)


def whole(x):
    """A tensor as it is, a shard gathered from all ranks (who all must ask); anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def fetch(x):
    """`whole` on the CPU of rank 0, nothing on the other ranks; anything but a tensor as it is."""
    if not torch.is_tensor(x):
        return x
    x = whole(x.detach())
    return None if dist.is_initialized() and dist.get_rank() else x.cpu().contiguous()


def like(x, p):
    """A whole tensor split over the ranks as the parameter p is."""
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements) if isinstance(p, DTensor) else x


class TokenLogps(torch.autograd.Function):
    """log softmax(hidden W^T)[target] of N tokens, (N,) in float32, without the (N, V) logits: they are made for `rows` tokens at a time.

    Where the head W (V, H) is frozen, d logp / d hidden = W[target] - softmax W is (N, H) and is formed in the same pass, so that
    backward computes nothing twice. Where it trains, backward makes the logits of each chunk again. Call token_logps.
    """
    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, grad):
        slope = torch.empty_like(hidden) if grad and not weight.requires_grad else None         # (N, H)
        logps = torch.empty(len(hidden), device=hidden.device)
        for h, target, at in zip(hidden.split(rows), targets.split(rows), torch.arange(len(hidden)).split(rows)):
            logits = (h @ weight.T).float()                                     # (rows, V)
            norm = logits.logsumexp(1, keepdim=True)
            logps[at[0]:at[-1] + 1] = (logits.gather(1, target[:, None]) - norm).squeeze(1)
            if slope is not None:
                slope[at[0]:at[-1] + 1] = weight[target] - logits.sub_(norm).exp_().to(h.dtype) @ weight
        ctx.rows = rows
        ctx.save_for_backward(*((slope,) if slope is not None else (hidden, weight, targets)))
        return logps

    @staticmethod
    def backward(ctx, grad):
        if len(ctx.saved_tensors) == 1:
            return (ctx.saved_tensors[0] * grad[:, None]).to(ctx.saved_tensors[0].dtype), None, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for h, d, target, g in zip(*(x.split(ctx.rows) for x in (hidden, d_hidden, targets, grad))):
            slope = (h @ weight.T).float().softmax(1).mul_(-g[:, None])         # (rows, V)
            slope.scatter_add_(1, target[:, None], g[:, None])
            slope = slope.to(h.dtype)
            d.copy_(slope @ weight)
            d_weight += slope.T @ h
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def token_logps(model, hidden, targets):
    """Log-probabilities (nats) of the tokens `targets` (N,), by the model's output layer from the hidden states (N, H) before them."""
    device, head, config = hidden.device.type, model.get_output_embeddings(), model.config.get_text_config()
    if bent := [name for name in ("final_logit_softcapping", "logits_scaling", "logit_scale") if getattr(config, name, None) not in (None, 1, 1.0)]:
        raise ValueError(f"{type(model).__name__} bends its logits ({bent[0]}), which token_logps leaves out")
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"the output layer is {head}; expected a plain nn.Linear without bias. Keep adapters off it")
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    rows = max(1, 2 ** 25 // len(head.weight))                                  # 128 MiB of logits at a time
    with torch.autocast(device, enabled=False):
        return TokenLogps.apply(hidden.to(dtype), head.weight.to(dtype), targets, rows, torch.is_grad_enabled() and hidden.requires_grad)


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen and B = 0 at the start, so the model is the base (arXiv 2106.09685)."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.rank, self.scale, self.enabled = base, rank, alpha / rank, True
        at = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **at))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **at))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def __getattr__(self, name):                     # pipelines ask for .weight, .bias, .in_features of the layer
        return super().__getattr__(name) if name in ("base", "lora_A", "lora_B") else getattr(super().__getattr__("base"), name)

    def forward(self, x, *args, **kwargs):
        y = self.base(x, *args, **kwargs)
        if not self.enabled:
            return y
        return y + (F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scale).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self):
        """The base layer's weight with the adapter added, gathered where it is sharded."""
        weight = whole(self.base.weight)
        return (weight.float() + self.scale * whole(self.lora_B) @ whole(self.lora_A)).to(weight.dtype)


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


PARTS = {"projector": r"merger|projector|connector|qformer", "vision": r"(^|\.)(visual|vision_\w+|image_encoder)\.", "language": ""}


def part_of(name):
    """Which part of a vision-language model a parameter belongs to: projector, vision or language."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name))


def add_lora(model, rank, alpha, targets, skip=()):
    """Freeze the model and put adapters on every nn.Linear whose full name matches the regular expression `targets`, outside the parts
    in `skip`."""
    model.requires_grad_(False)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(targets, n) and part_of(n) not in skip]
    if not names:
        raise ValueError(f"--lora-targets {targets!r} matches no linear layer of {type(model).__name__} outside {list(skip)}.")
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha))


def whole_state(model):
    """{name: tensor on the CPU} of a model without adapters: they are merged, shards are gathered. All ranks call it, rank 0 gets it."""
    layers, out, seen = lora_layers(model), {}, set()
    for name, x in model.state_dict(keep_vars=True).items():
        layer, _, leaf = name.rpartition(".base.")
        if id(x) in seen or re.search(r"\.lora_[AB]$", name):                   # tied weights come once
            continue
        seen.add(id(x))
        out[f"{layer}.{leaf}" if layer in layers else name] = fetch(layers[layer].merged_weight() if layer in layers and leaf == "weight" else x)
    return out


def save_whole(save, modules):
    """Call save(), some save_pretrained, on rank 0, in which the state_dict of the `modules` is their whole_state. All ranks call it."""
    states = [whole_state(module) for module in modules]
    if dist.is_initialized() and dist.get_rank():
        return
    for module, state in zip(modules, states):
        module.state_dict = lambda *args, state=state, **kwargs: state
    save()
    for module in modules:
        del module.state_dict


def save_judge(folder, model, processor, template, score_template=None):
    """A folder for from_pretrained, servers and LocalJudge, which reads the wording of the questions in it. All ranks call it."""
    def save():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        Path(folder, "template.txt").write_text(template)
        if score_template:
            Path(folder, "score_template.txt").write_text(score_template)
    save_whole(save, [model])


@contextlib.contextmanager
def adapters_off(*models):
    """The reference policy: the same models without their adapters."""
    layers = [layer for model in models for layer in lora_layers(model).values()]
    assert layers, "adapters_off needs adapters"
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def save_adapter(folder, modules, filename="adapter_model.safetensors"):
    """Write the adapters of {prefix of the names: module} in the layout of PEFT ("base_model.model.") or diffusers ("transformer.").

    alpha / r is folded into B and alpha = r is written, since readers disagree about alpha and silently halve the strength. All ranks
    call it, rank 0 writes.
    """
    layers, tensors = {f"{prefix}{name}": layer for prefix, m in modules.items() for name, layer in lora_layers(m).items()}, {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = fetch(layer.lora_A), fetch(layer.lora_B * layer.scale)
    if dist.is_initialized() and dist.get_rank():
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, filename), metadata={"format": "pt"})
    rank = next(iter(layers.values())).rank
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none",
              "target_modules": sorted(name.removeprefix("base_model.model.") for name in layers)}
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=1))


def load_adapter(model, folder):
    """Put the LoRA adapter of a folder, ours or PEFT's, on the model; its layers train on. ValueError names what does not fit."""
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    changed = [k for k in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out") if config.get(k)]
    if config["peft_type"] != "LORA" or config.get("bias", "none") != "none" or changed:
        raise ValueError(f"{folder}: an adapter with {changed or config['peft_type']}; only plain LoRA of one rank is read")
    tensors = {name.removeprefix("base_model.model."): x for name, x in load_file(Path(folder, "adapter_model.safetensors")).items()}
    names = {name.rpartition(".lora_")[0] for name in tensors}
    strange = sorted(names - {name for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    if strange:
        raise ValueError(f"{folder}: adapters for layers that {type(model).__name__} does not have, as {strange[0]}")
    alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
    add_lora(model, config["r"], alpha, "^(" + "|".join(map(re.escape, names)) + ")$")
    for name, layer in lora_layers(model).items():
        layer.lora_A.data.copy_(tensors[f"{name}.lora_A.weight"])
        layer.lora_B.data.copy_(tensors[f"{name}.lora_B.weight"])


def prepare_training(model, ranks, lora_rank=0, lora_alpha=None, lora_targets="", adapter=None, freeze=(), grad_ckpt=False,
                     compile=False, fsdp=False, bf16=False):
    """Add adapters, freeze the parts in `freeze` (any of PARTS), set up recomputation, compile and shard; the model comes out on its
    device, and what trains is trainable(model). grad_ckpt: blocks keep their inputs alone and compute once more in backward."""
    if adapter:
        load_adapter(model, adapter)
    elif lora_rank:
        add_lora(model, lora_rank, lora_alpha or lora_rank, lora_targets, freeze)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and part_of(name) not in freeze)
    if not trainable(model):
        raise ValueError(f"--freeze {' '.join(freeze)} leaves nothing to train")
    if grad_ckpt and hasattr(model, "gradient_checkpointing_enable"):           # transformers
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif grad_ckpt:                                                             # diffusers
        model.enable_gradient_checkpointing()
    for block in blocks(model) if compile else []:
        block.compile()
    shard(model.train(), ranks, fsdp, bf16)


def has_bf16():
    """Whether this machine multiplies in bfloat16 natively: a GPU, or a CPU that says so."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))


def frozen_dtype(ranks, bf16, lora):
    """What a loaded model's weights are held in: bfloat16 where LoRA freezes them on a GPU that computes in it; what trains is float32."""
    return torch.bfloat16 if ranks.device.type == "cuda" and bf16 and lora else torch.float32


def need(path, command):
    """Stop with the command that makes `path`, a folder or file of an earlier stage in out/, where it is not there yet."""
    if path.startswith("out/") and not Path(path).exists():
        raise SystemExit(f"{path} is not there yet. Make it first: {command}")


def peak_gib():
    """The most memory this process has had, in GiB: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made nearly orthogonal, at the RMS of AdamW's updates (arXiv 2502.16982). torch.optim.Muon multiplies in
    bfloat16 whatever the machine; on a CPU without it that alone took 3/4 of a step. Here bfloat16 only where has_bf16()."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = torch.bfloat16 if has_bf16() else torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"]).to(self.dtype)     # Nesterov's
                x = x.T if len(x) > len(x.T) else x                             # the smaller Gram matrix
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):                                              # Newton-Schulz: singular values go to about 1
                    gram = x @ x.T
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x if x.shape == p.shape else x.T, alpha=-.2 * group["lr"] * math.sqrt(max(p.shape)))


def make_optimizers(params, kind, lr, weight_decay):
    """adamw: one AdamW. muon: Muon on the matrices of numbered blocks, AdamW on the rest."""
    if kind == "muon" and any(isinstance(p, DTensor) for p in params.values()):
        raise ValueError("Muon needs whole matrices and --fsdp splits them: pass --optim adamw")
    matrices = {n: p for n, p in params.items() if kind == "muon" and p.ndim == 2 and re.search(r"\.\d+\.", n)}
    rest = [p for n, p in params.items() if n not in matrices]
    out = [torch.optim.AdamW(rest, lr, betas=(.9, .98), weight_decay=weight_decay, eps=1e-10)] if rest else []
    if matrices:
        out.append(Muon(matrices.values(), lr, weight_decay))
    return out


def set_lr(optimizers, lr, step, warmup, max_steps):
    """Linear warm-up over `warmup` steps times a cosine from `lr` to 2 % of it at max_steps; returns the value set."""
    lr *= min(1, (step + 1) / max(warmup, 1)) * (.02 + .98 * (.5 + .5 * math.cos(math.pi * min(1, step / max_steps))))
    for group in [g for o in optimizers for g in o.param_groups]:
        group["lr"] = lr
    return lr


def optimizer_step(params, optimizers, ranks, max_norm):
    """Sum over ranks, clip, step, zero; returns the norm before clipping. A gradient that is not finite stops the run."""
    sync_gradients(params, ranks)
    norm = whole(nn.utils.clip_grad_norm_(params, max_norm)).item()
    if not math.isfinite(norm):
        raise RuntimeError(f"the gradient norm is {norm}: lower the learning rate, or look at the last batch")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def digest(path):
    """blake2b of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def save_checkpoint(run, step, params, optimizers, args, ranks):
    """Write run/step_000123/ aside and rename it: weights.safetensors, state.pt (optimizers, RNG of each rank), args.json, which closes
    with the digests of both. A kill at any moment leaves the checkpoints before. Shards are gathered, so all ranks call it."""
    rng = gather([[torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if ranks.device.type == "cuda" else [])], ranks)
    weights, states = {n: fetch(p) for n, p in params.items()}, [tree_map(fetch, o.state_dict()) for o in optimizers]
    if ranks.rank == 0:
        aside = Path(run, "aside")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(weights, aside / "weights.safetensors")
        torch.save({"step": step, "optimizers": states, "rng": rng}, aside / "state.pt")
        digests = {file.name: digest(file) for file in aside.iterdir()}
        Path(aside, "args.json").write_text(json.dumps({"args": args, "digests": digests}, indent=1))
        aside.rename(Path(run, f"step_{step:06d}"))
        for old in sorted(Path(run).glob("step_*"))[:-2]:
            shutil.rmtree(old)
    if ranks.world > 1:
        dist.barrier()


def load_checkpoint(run, params, optimizers, args, ranks):
    """Restore the newest checkpoint of `run` and return its step, 0 where there is none yet; ValueError if it is damaged or belongs to
    other weights, options or ranks, naming what differs."""
    folders = sorted(Path(run).glob("step_*"))
    found = set(gather([folder.name for folder in folders[-1:]] or [None], ranks))
    if len(found) > 1:
        raise ValueError(f"--resume: ranks see different checkpoints in {run}: {found}. --out must lie on a disk that all nodes share")
    if not folders:
        if ranks.rank == 0:
            print(f"--resume: no checkpoint in {run} yet, starting from the first step", flush=True)
        return 0
    folder = folders[-1]
    try:
        saved = json.loads(Path(folder, "args.json").read_text())
        damaged = [name for name, known in saved["digests"].items() if digest(folder / name) != known]
    except (OSError, ValueError, KeyError) as error:
        damaged = [f"{type(error).__name__}: {error}"]
    if damaged:
        raise ValueError(f"--resume: {folder} is damaged ({', '.join(damaged)}). Remove it to resume from the one before")
    differs = [f"{k} {saved['args'].get(k)!r} -> {v!r}" for k, v in args.items()
               if saved["args"].get(k) != v and k not in ("resume", "out", "save_every", "eval_every")]
    if differs:
        raise ValueError(f"--resume: {folder} was made with other options: {', '.join(differs)}")
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if len(state["rng"]) != ranks.world:
        raise ValueError(f"--resume: {folder} was made by {len(state['rng'])} ranks, these are {ranks.world}: start as many")
    with torch.no_grad(), safe_open(folder / "weights.safetensors", "pt") as weights:
        if set(weights.keys()) != params.keys():
            raise ValueError(f"--resume: {folder} holds other weights: missing {sorted(params.keys() - set(weights.keys()))[:3]}, "
                             f"unexpected {sorted(set(weights.keys()) - params.keys())[:3]}")
        for name, p in params.items():
            p.copy_(like(weights.get_tensor(name), p))
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        owners = [p for group in optimizer.param_groups for p in group["params"]]
        for i, slots in saved["state"].items():
            saved["state"][i] = {k: like(x, owners[i]) if x.dim() else x for k, x in slots.items()}
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"][ranks.rank][0])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng"][ranks.rank][1])
    return state["step"]


class Log:
    """run/log.jsonl: a first row with options, versions, device and commit, then one row a step; kept by rank 0."""

    def __init__(self, run, args, ranks, resumed_step=0):
        self.path, self.rank, self.rows = Path(run, "log.jsonl"), ranks.rank, []
        if self.rank:
            return
        if resumed_step:                                    # the last line may be torn; only lines up to the checkpoint are kept
            rows = [json.loads(line) for line in open(self.path) if line.endswith("}\n")]
            self.rows = [row for row in rows if row.get("step", 0 if "args" in row else math.inf) <= resumed_step]
        else:
            for old in Path(run).glob("step_*"):            # of an earlier run, which --resume would take for ours
                print(f"{old} of an earlier run is removed")
                shutil.rmtree(old)
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
            name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
            self.rows = [{"args": args, "torch": torch.__version__, "device": name, "ranks": ranks.world, "commit": commit}]
        aside = Path(run, "log.jsonl.aside")
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        aside.rename(self.path)

    def write(self, **row):
        """Append a row; floats are rounded to six significant digits."""
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        if not self.rank:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")


def tile(rows, gap=0):
    """One image of equally large ones in rows."""
    width, height = (side + gap for side in rows[0][0].size)
    sheet = Image.new("RGB", (max(map(len, rows)) * width, len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    return sheet


def draw_curves(rows, names, path, width=420, height=240):
    """A PNG with one small plot per name: the value against the step, raw in grey and its running mean in blue."""
    panels, left, top, right, bottom = [], 58, 26, width - 12, height - 26
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row and "step" in row]
        if len(points) < 2:
            continue
        xs, ys = zip(*points)
        low, high, mean, smooth, span = min(ys), max(max(ys), min(ys) + 1e-9), ys[0], [], max(len(ys) / 40, 1)
        for y in ys:
            mean += (y - mean) / span
            smooth.append(mean)
        place = lambda x, y: (left + (x - xs[0]) / (xs[-1] - xs[0]) * (right - left), bottom - (y - low) / (high - low) * (bottom - top))
        panels.append(Image.new("RGB", (width, height), "white"))
        draw = ImageDraw.Draw(panels[-1])
        draw.line([place(*point) for point in points], fill=(205, 205, 205))
        draw.line([place(*point) for point in zip(xs, smooth)], fill=(40, 90, 210), width=2)
        draw.rectangle([left, top, right, bottom], outline=(150, 150, 150))
        for text, at in ((name, (left, 6)), (f"{high:.3g}", (6, top - 6)), (f"{low:.3g}", (6, bottom - 8)), (f"step {xs[-1]}", (right - 60, bottom + 6))):
            draw.text(at, text, fill="black", font=ImageFont.load_default(13))
    if panels:
        tile([panels[i:i + 3] for i in range(0, len(panels), 3)]).save(path)


def draw_grid(rows, path):
    """A PNG of rows of equally large media, lists of frames, of which up to 4 stand side by side. Of clips a GIF too, in which they move."""
    side, length = max(rows[0][0][0].size), max(len(frames) for row in rows for frames in row)
    zoom = 2 if side < 128 else min(1, 256 / side)
    size, kind = [round(zoom * pixels) for pixels in rows[0][0][0].size], Image.NEAREST if zoom > 1 else Image.LANCZOS

    def sheet(shown):                                # numbers of the frames
        return tile([[tile([[frames[i % len(frames)].resize(size, kind) for i in shown]]) for frames in row] for row in rows], 2)

    sheet(range(0, length, math.ceil(length / 4))).save(path)
    if length > 1:
        first, *rest = map(sheet, ([i] for i in range(length)))
        first.save(Path(path).with_suffix(".gif"), save_all=True, append_images=rest, duration=300, loop=0)


def draw_before_after(before, after, path, num=48):
    """draw_grid of up to `num` samples of two lists of media, a row before and a row after."""
    width, num = (12 if len(before[0]) == 1 else 6), min(num, len(before))
    draw_grid([media[i:min(i + width, num)] for i in range(0, num, width) for media in (before, after)], path)


def draw_verdict(media, texts, path):
    """A PNG with a pair of images, or the frames of a pair of clips, on the left and one column per text beside them."""
    length = max(map(len, media))
    size, font = (240, 240) if length == 1 else (120, 120), ImageFont.load_default(13)
    parts = [tile([[frame.resize(size, Image.NEAREST) for frame in frames] for frames in media], 20)]
    for text in texts:
        text = text.translate(dict.fromkeys(map(ord, "│├└─"), " "))            # the font has no such glyphs
        *_, right, bottom = ImageDraw.Draw(parts[0]).multiline_textbbox((0, 0), text, font=font)
        parts.append(Image.new("RGB", (math.ceil(right) + 30, math.ceil(bottom) + 10), "white"))
        ImageDraw.Draw(parts[-1]).multiline_text((0, 0), text, fill="black", font=font)
    sheet, x = Image.new("RGB", (10 + sum(part.width for part in parts), 10 + max(part.height for part in parts)), "white"), 10
    for part in parts:
        sheet.paste(part, (x, 10))
        x += part.width
    sheet.save(path)


# ================================================================================================ end of toolbox

# ================================================================================================ driver
# A diffusers pipeline as the policy: guidance, schedule and conditioning stay the pipeline's own, RL is a stand-in scheduler.
import copy
import functools
import inspect
import pickle

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from einops import rearrange


class Done(Exception):
    """Raised by a visit that has seen enough: leaves the pipeline before it decodes."""


class Tap:
    """Stands in for pipe.scheduler: the stock schedule, but visit(i, x, v), if there is one, chooses the next x."""

    def __init__(self, stock):
        self.stock, self.visit, self.x, self.keep, self.grid = stock, None, None, None, None

        @functools.wraps(stock.set_timesteps)                                   # pipelines inspect this signature
        def set_timesteps(*args, **kwargs):
            stock.set_timesteps(*args, **kwargs)
            sigmas, timesteps = getattr(stock, "sigmas", None), stock.timesteps
            if self.grid is not None:                                           # exactly these timesteps, (S,) or (S, B)
                timesteps = self.grid
            elif self.keep is not None:                                         # these steps of the stock schedule
                sigmas, timesteps = torch.cat([sigmas[self.keep], sigmas[-1:]]), timesteps[self.keep]
            self.sigmas, self.timesteps, self.i = sigmas, timesteps, -1

        @functools.wraps(stock.step)
        def step(v, timestep, x, *args, **kwargs):
            if self.visit is None:
                return stock.step(v, timestep, x, *args, **kwargs)
            self.i += 1
            x = self.visit(self.i, x, v)
            return SchedulerOutput(prev_sample=x) if kwargs.get("return_dict", True) else (x,)
        self.set_timesteps, self.step = set_timesteps, step

    def __getattr__(self, name):
        return getattr(self.__dict__["stock"], name)

    def scale_model_input(self, x, timestep=None):                              # what a visit sees is scaled already
        return x if self.visit or not hasattr(self.stock, "scale_model_input") else self.stock.scale_model_input(x, timestep)


def prediction_type(pipe):
    """What the pipeline's model predicts: "flow" (the velocity noise - x0), "epsilon", "v_prediction" or "sample"."""
    kind = pipe.scheduler.config.get("prediction_type", "epsilon")
    return "flow" if "FlowMatch" in type(getattr(pipe.scheduler, "stock", pipe.scheduler)).__name__ or kind == "flow_prediction" else kind


def install(pipe, park=False, device=None, cache_size=32):
    """Tap the pipeline's scheduler, initial latents and prompt encoder (memoised: the newest `cache_size` calls). Once a pipeline.

    With `park`, text encoders wait on the CPU, outside the pipeline, while nothing is encoded. ValueError: a pipeline that moves its latents
    in another way than by one scheduler.step, or whose weights are fetched by offloading hooks, which would leave no gradient.
    """
    name, source = type(pipe).__name__, inspect.getsource(inspect.unwrap(type(pipe).__call__))
    if (steps := source.count("scheduler.step(")) != 1 or "deepcopy(self.scheduler)" in source:
        raise ValueError(f"{name} moves its latents by {steps} calls of scheduler.step or copies its scheduler; the driver stands in for exactly one")
    if missing := [method for method in ("prepare_latents", "encode_prompt") if not hasattr(pipe, method)]:
        raise ValueError(f"{name} has no {missing[0]}, which the driver taps")
    if any(hasattr(module, "_hf_hook") for part in denoisers(pipe).values() for module in part.modules()):
        raise ValueError(f"{name} is offloaded by hooks, under which nothing gets a gradient: load it without")
    tap = vars(pipe)["scheduler"] = Tap(pipe.scheduler)                         # setattr would write it into model_index.json
    stock_latents, encode_prompt, cache = pipe.prepare_latents, pipe.encode_prompt, {}
    device, pipe.parked = device or pipe.device, {}
    if park:
        pipe.parked = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None}

    def move_encoders(back):
        for name, part in pipe.parked.items():
            part.to(device if back else "cpu")
            vars(pipe)[name] = part if back else None
    move_encoders(False)

    def prepare_latents(*args, **kwargs):
        out = stock_latents(*args, **kwargs)
        first, *rest = out if isinstance(out, tuple) else [out]
        if tap.x is not None and tap.x.shape != first.shape:
            raise ValueError(f"latents of shape {tuple(tap.x.shape)} where this call of the pipeline denoises {tuple(first.shape)}: the sizes of the media "
                             "and --pipe-arg height, width and num_frames must agree")
        first = first.float() if tap.x is None else tap.x                      # pipelines round timesteps to the latents' type
        return (first, *rest) if isinstance(out, tuple) else first

    @torch.no_grad()
    def encode_once(*args, **kwargs):
        key = pickle.dumps((args, kwargs))
        if key not in cache:
            move_encoders(True)
            cache[key] = encode_prompt(*args, **kwargs)
            move_encoders(False)
            if len(cache) > cache_size:
                cache.pop(next(iter(cache)))
        return cache[key]

    pipe.prepare_latents, pipe.encode_prompt = prepare_latents, encode_once
    pipe.set_progress_bar_config(disable=True)
    return pipe


def takes_one_image(pipe):
    """Whether a call of the pipeline takes one source image for all its prompts, as Wan's image-to-video does, not one for each."""
    check = inspect.getsource(type(pipe).check_inputs)
    return "isinstance(image, PIL.Image.Image)" in check and "isinstance(image, list)" not in check


def run(pipe, visit=None, x=None, keep=None, grid=None, grad=False, autocast=None, **kwargs):
    """One call of the pipeline under visit(i, x, v), from latents x if given; with grad, without the pipeline's no_grad.

    `keep` lists the steps of the stock schedule to walk, `grid` gives timesteps instead. Returns the pipeline's output, or None if
    the visit left early. ValueError: several source images where the pipeline takes one.
    """
    tap, call = pipe.scheduler, type(pipe).__call__
    if isinstance(kwargs.get("negative_prompt"), str) and isinstance(kwargs["prompt"], list):         # with images, some count one for each
        kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(kwargs["prompt"])
    if isinstance(images := kwargs.get("image"), list) and takes_one_image(pipe):
        if any(image != images[0] for image in images):
            raise ValueError(f"{type(pipe).__name__} takes one source image a call, not {len(images)}: pass a --batch-size that divides --group-size")
        kwargs["image"] = images[0]
    tap.visit, tap.x, tap.keep, tap.grid = visit, x, keep, grid
    kwargs = {k: copy.copy(v) if isinstance(v, list) else v for k, v in kwargs.items()}     # some pipelines write into them
    amp = torch.autocast(pipe.device.type, autocast, cache_enabled=False) if autocast else contextlib.nullcontext()
    try:
        with amp:
            return (call.__wrapped__ if grad else call)(pipe, **kwargs)
    except Done:
        return None
    finally:
        tap.visit = tap.x = tap.keep = tap.grid = None


def predict(pipe, x, t, grad=True, **kwargs):
    """What the policy predicts (velocity, epsilon or v, as its scheduler says) at latents x and timestep t, () or (B,), after the pipeline's own
    guidance. For epsilon and v, x preserves variance, sqrt(acp) x0 + sqrt(1 - acp) noise, whatever the scheduler."""
    if t.ndim and (pipe.config.get("boundary_ratio") or pipe.config.get("expand_timesteps")):       # Wan 2.2 takes one timestep a call
        rows = [{**kwargs, "prompt": [prompt]} for prompt in kwargs["prompt"]]
        return torch.cat([predict(pipe, x[i:i + 1], t[i], grad, **row) for i, row in enumerate(rows)])
    seen = []

    def visit(i, x, v):
        seen.append(v)
        raise Done
    run(pipe, visit, x=x, grid=t[None], grad=grad, **{**kwargs, "num_inference_steps": 1})
    return seen[0] if seen[0].shape == x.shape else rearrange(seen[0], "(b f) c h w -> b c f h w", b=len(x))      # a video UNet's step sees frames


def velocity(pipe, x, sigma, grad=True, **kwargs):
    """The policy's velocity at latents x and noise level sigma, () or (B,), after the pipeline's own guidance."""
    return predict(pipe, x, sigma * pipe.scheduler.config.num_train_timesteps, grad, **kwargs)


def prepare(pipe, device, park=False, unsharded=False):
    """The pipeline on its device with the driver installed, everything frozen but its denoisers. `unsharded`: those stay on the CPU, from where
    FSDP2 takes them block by block; whole they may be larger than a GPU."""
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            module.requires_grad_(name in denoisers(pipe)).eval()
            if not (unsharded and name in denoisers(pipe)):
                module.to(device)
            if device.type == "cpu" and name in denoisers(pipe):
                module.set_attention_backend("_native_math")                    # faster for a handful of tokens
    return install(pipe, park, device)


def load_pipeline(path, device, dtype=torch.float32, **options):
    """The diffusers pipeline in a folder or hub repository, prepared with the options, all its parts in `dtype`."""
    return prepare(diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=dtype), device, **options)


def denoisers(pipe):
    """{name: module} of what is trained in a pipeline: its transformers or its UNet."""
    names = ("transformer", "transformer_2", "unet")
    return {n: getattr(pipe, n) for n in names if getattr(pipe, n, None) is not None}


def num_frames_of(pipe, call):
    """How many frames a call of the pipeline with the arguments `call` makes; 1 where it makes images."""
    option, factor = inspect.signature(type(pipe).__call__).parameters.get("num_frames"), getattr(pipe, "vae_scale_factor_temporal", None)
    if not option:
        return 1
    num = call.get("num_frames", option.default)
    return num if not factor or num % factor == 1 else num // factor * factor + 1           # as Wan rounds it


@torch.no_grad()
def encode_media(pipe, media, **size):
    """Clean latents of media, lists of PIL frames, in the shape the pipeline denoises: the VAE's mean, shifted and scaled as its configuration says,
    and packed where the pipeline packs. An image VAE sees a video frame by frame: (B, C, F, H, W). `size`: the height and width to bring them to."""
    vae, pack = getattr(pipe, "vae", None), getattr(pipe, "_pack_latents", None)
    if vae is None or pack and len(inspect.signature(pack).parameters) != 5:
        raise ValueError(f"{type(pipe).__name__} {'packs latents in a way of its own' if pack else 'has no VAE'}: its latents cannot be made from media here")
    if not size and len(sizes := {frame.size for frames in media for frame in frames}) > 1:
        raise ValueError(f"media of different sizes, as {sorted(sizes)[:2]}: pass --pipe-arg height=... width=..., to which they are brought")
    deep, video = any(p.ndim == 5 for p in vae.parameters()), hasattr(pipe, "video_processor")               # deep: convolves over time
    processor = pipe.video_processor if video else pipe.image_processor
    media = [[processor.resize(frame, *processor.get_default_height_width(frame, **size)) for frame in frames] for frames in media]
    pixels = processor.preprocess_video(media) if video else processor.preprocess([frames[0] for frames in media])
    if video and not deep:
        pixels = rearrange(pixels, "b c f h w -> (b f) c h w")
    elif deep and not video:
        pixels = rearrange(pixels, "b c h w -> b c 1 h w")
    coded = vae.encode(pixels.to(pipe.device, vae.dtype))
    x = (coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded.latent).float()
    shift, spread = (torch.tensor(value).view(1, -1, *[1] * (x.ndim - 2)).to(x) for value in (
        vae.config.get("latents_mean") or vae.config.get("shift_factor") or 0.0, vae.config.get("latents_std") or 1.0))
    x = (x - shift) / spread * (vae.config.get("scaling_factor") or 1)
    if pack:
        return pack(x, *x.shape[:2], *x.shape[-2:])
    return rearrange(x, "(b f) c h w -> b c f h w", b=len(media)) if video and not deep else x


def generator(*seed):
    """A CPU generator that is a function of the numbers and strings `seed`: the same on any rank, in any order of calls."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=7).digest(), "big"))


def seeded_noise(shape, *seed):
    """Standard normal noise, float32 on the CPU, that is a function of `seed`."""
    return torch.randn(shape, generator=generator(*seed))


def frames_of(output):
    """[frames, ...] of a pipeline's output: a list of PIL images for each sample, one for an image, all of them for a video."""
    return [list(item) if isinstance(item, (list, tuple)) else [item] for item in output[0]]


def sample_media(pipe, prompts, seeds, batch_size=64, **kwargs):
    """frames_of samples by the stock (ODE) sampler; sample i is a function of its prompt, its seed and its image=[...], if there are any."""
    media, batch_size = [], 1 if isinstance(kwargs.get("image"), list) and takes_one_image(pipe) else batch_size
    for i in range(0, len(prompts), batch_size):
        part = {k: v[i:i + batch_size] for k, v in {"prompt": list(prompts), "image": kwargs.get("image")}.items() if isinstance(v, list)}
        generators = [generator(seed) for seed in seeds[i:i + batch_size]]
        media += frames_of(run(pipe, generator=generators, **{"output_type": "pil", **kwargs, **part}))
    return media


def sample_shares(pipe, prompts, seeds, ranks, batch_size, image=None, **kwargs):
    """sample_media, of which every rank makes an equal share, as sharded models need, and gets all."""
    mine = [i % len(prompts) for i in range(ranks.rank, math.ceil(len(prompts) / ranks.world) * ranks.world, ranks.world)]
    own = {"image": [image[i] for i in mine]} if image else {}
    media = sample_media(pipe, [prompts[i] for i in mine], [seeds[i] for i in mine], batch_size, **own, **kwargs)
    found = dict(gather(zip(mine, media), ranks))
    return [found[i] for i in range(len(prompts))]


def save_pipeline(pipe, folder):
    """save_pretrained with the stock scheduler in its place, adapters merged and shards gathered. All ranks call it."""
    tap = pipe.scheduler
    vars(pipe).update(pipe.parked, scheduler=tap.stock)
    save_whole(lambda: pipe.save_pretrained(folder), denoisers(pipe).values())
    vars(pipe).update(dict.fromkeys(pipe.parked), scheduler=tap)


def pipe_arg(text):
    """("key", value) of a command line's key=value; numbers, true, false and null are read as JSON, all else is text."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


# ================================================================================================ end of driver


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    # model
    add("--task", choices=["judge", "generator"], default="judge", help="what is trained: a judge or a diffusers pipeline")
    add("--model", default="toy", help="folder or hub id; toy: a tiny one from nothing")
    add("--template", help="file with the judge's instruction, {prompt} and {medium} in it; default: the model's own, or reward.TEMPLATE")
    # data
    add("--data", default="toy", help="JSONL of traces (judge) or captioned images (generator); toy: made as needed")
    add("--eval-data", default="toy:test", help="JSONL of pairs (judge) or prompts (generator) that are not trained on")
    add("--eval-num", type=int, help="records of it that are used  [judge 400, generator 256]")
    add("--judge-batch", type=int, help="pairs judged at a time  [200, where verdicts are long 16]")
    add("--data-num", type=int, default=16000, help="toy images rendered for the generator")
    add("--max-tokens", type=int, default=8192, help="a longer record is refused, never cut")
    add("--skip-bad", action=flag, default=False, help="drop malformed lines and print how many")
    add("--world", choices=["image", "video"], default="image", help="which toy world is meant by toy: still or in motion")
    # generator
    add("--pipe-arg", type=pipe_arg, nargs="*", default=[], help="key=value for the pipeline's call, as height=512; with classifier-free guidance "
        "add guidance_scale=1, or the guided velocity is trained")
    add("--sigma-mean", type=float, default=1.5, help="noise levels are sigmoid(N(this, 1))")
    # lora
    add("--lora-rank", type=int, default=0, help="0: all weights are trained")
    add("--lora-alpha", type=float, help="default: the rank")
    add("--lora-targets", default=r"(language|text)_model\..*_proj\w*$|to_(q|k|v|out\.0)$", help="regex on the names of linear layers")
    add("--adapter", help="folder of a LoRA adapter, ours or PEFT's, to train on; instead of a new one")
    add("--freeze", nargs="*", default=[], choices=["vision", "projector", "language"], help="parts of the judge that stay as they are")
    add("--merge", action=flag, default=True, help="write and examine the whole model; without, a LoRA run leaves only its adapter")
    # optim
    add("--optim", choices=["adamw", "muon"], default="muon")
    add("--lr", type=float, help="peak learning rate  [judge 2e-3, generator 4e-3]")
    add("--weight-decay", type=float, default=.01)
    add("--warmup-steps", type=int, default=60)
    add("--max-steps", type=int, help="optimizer steps  [judge 1200, generator 750; in the video world 1100 and 1000]")
    add("--batch-size", type=int, help="records per rank per micro-step  [judge 16, generator 128]")
    add("--accumulation", type=int, default=1, help="micro-steps per optimizer step")
    add("--max-norm", type=float, default=1.0, help="the gradient norm is clipped to this")
    # run
    add("--bf16", action=flag, help="compute in bfloat16, keep what is trained in float32; default: where the hardware multiplies in it")
    add("--fsdp", action=flag, default=False, help="split weights, gradients and optimizer over the ranks (FSDP2) instead of copying them")
    add("--grad-ckpt", action=flag, default=False, help="gradient checkpointing: less memory, a third more time")
    add("--compile", action=flag, default=False, help="torch.compile each block")
    add("--max-new-tokens", type=int, help="longest verdict written in evaluations  [toy 256, else 2048]")
    add("--seed", type=int, default=0)
    add("--out", help="run folder  [out/judge-sft, out/generator-sft; video world out/video-...]")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint in --out")
    args = parser.parse_args(argv)
    args.pipe_arg = dict(args.pipe_arg)
    judge = args.task == "judge"
    out, args.data, args.eval_data = in_world(args.world, args.data, args.eval_data)
    defaults = dict(lr=2e-3 if judge else 4e-3, max_steps=(1200 if judge else 750) if args.world == "image" else 1100 if judge else 1000, batch_size=16 if judge else 128,
                    eval_num=400 if judge else 256, out=f"{out}{args.task}-sft", bf16=has_bf16(),
                    max_new_tokens=256 if args.model == "toy" else 2048)
    defaults["judge_batch"] = 200 if (args.max_new_tokens or defaults["max_new_tokens"]) <= 256 else 16
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    return args


# ---------------------------------------------------------------- the judge: cross-entropy on the response

def response_loss(model, batch):
    """Summed cross-entropy (nats) over the labelled tokens of a batch; the mean per token is this over their number.

    Only labelled positions go through the output layer, chunk by chunk: the logits, (B, T, V), are never there at once.
    """
    batch = dict(batch)
    targets = batch.pop("labels")[:, 1:]                                        # position t predicts token t + 1
    hidden = getattr(model, model.base_model_prefix)(**batch, use_cache=False).last_hidden_state[:, :-1]
    return -token_logps(model, hidden[targets != -100], targets[targets != -100]).sum()


class Judge:
    """Any image-text-to-text model of transformers, on trace records."""
    adapter_file, curves = "adapter_model.safetensors", ["loss", "grad_norm", "lr"]

    def __init__(self, args, ranks):
        if args.model == "toy":
            self.model, self.processor = toy_models().make_judge(args.seed, world=toy_world(args.world))
            self.template = toy_models().INSTRUCTION.replace("image", args.world)
        else:
            judge = LocalJudge(args.model, template=args.template and Path(args.template).read_text(), device="cpu" if args.fsdp else ranks.device,
                               dtype=frozen_dtype(ranks, args.bf16, args.lora_rank or args.adapter))
            self.model, self.processor, self.template = judge.model, judge.processor, judge.templates[Comparison] or TEMPLATE
            self.score_template = judge.templates[Candidate]
        self.model.set_attn_implementation("sdpa" if ranks.device.type == "cuda" else "eager")
        self.modules, self.args, self.device = {"base_model.model.": self.model}, args, ranks.device
        self.records = open_records(args.data, "trace", args.max_steps * args.batch_size * args.accumulation * ranks.world, args.seed,
                                    args.skip_bad)
        if args.model == "toy":                                                 # asked for scores in the words it is taught with
            scores = isinstance(self.records, list) and any(record.get("type") == "score" for record in self.records)
            self.score_template = toy_world().SCORE_INSTRUCTION if scores else None
        sizes = [len(r["response"]) for r in self.records] if isinstance(self.records, list) else [1]
        self.window = 8 if max(sizes) > 2 * min(sizes) else 1                   # else batches by length save little and are less mixed

    def batch(self, indices, step):
        """(what loss() takes, its number of labelled tokens, the share of padding) for these records."""
        records = [self.records[i] for i in indices]
        batch = encode(self.processor, records, [r["response"] for r in records], self.template, self.args.max_tokens)
        num_targets, padding = (batch["labels"] != -100).sum().item(), 1 - batch["attention_mask"].float().mean().item()
        return {k: v.to(self.device) for k, v in batch.items()}, num_targets, padding

    def loss(self, batch):
        return enter(self.model, response_loss, batch)

    def evaluate(self, out):
        """Numbers on held-out pairs, and verdict.png: one verdict next to its two images."""
        pairs = list(open_records(self.args.eval_data, "pair", self.args.eval_num, 1))[:self.args.eval_num]
        judge = LocalJudge(out / "model", batch_size=self.args.judge_batch, max_new_tokens=self.args.max_new_tokens)
        result = evaluate_judge(judge, [comparison(p) for p in pairs], [WINNERS[p["winner"]] for p in pairs], random.Random(0))
        shown = comparison(pairs[0], swap=result["flipped"][0])
        draw_verdict([shown.media_1, shown.media_2], [format_verdict(result["verdicts"][0], shown.prompt)], out / "verdict.png")
        return {k: v for k, v in result.items() if isinstance(v, (int, float))}

    def save(self, folder):
        save_judge(folder, self.model, self.processor, self.template, self.score_template)


# ---------------------------------------------------------------- the generator: flow matching

class Generator:
    """A diffusers flow-matching pipeline, on captioned images. Latents are made once, before training."""
    window, adapter_file, curves = 1, "pytorch_lora_weights.safetensors", ["loss", "grad_norm", "lr"]

    def __init__(self, args, ranks):
        if args.model == "toy":
            self.pipe = prepare(toy_models().GENERATORS[args.world](args.seed), ranks.device)
            args.pipe_arg = {**toy_models().CALLS[type(self.pipe).__name__], **args.pipe_arg}
        else:
            args.pipe_arg = {**know_toy_classes(args.model), **args.pipe_arg}
            self.pipe = load_pipeline(args.model, ranks.device, frozen_dtype(ranks, args.bf16, args.lora_rank or args.adapter))
        self.modules, self.args = {f"{name}.": module for name, module in denoisers(self.pipe).items()}, args
        self.records = list(open_records(args.data, "image", args.data_num, args.seed, args.skip_bad))
        size, length = {k: v for k, v in args.pipe_arg.items() if k in ("height", "width")}, num_frames_of(self.pipe, args.pipe_arg)
        self.latents = torch.cat([encode_media(self.pipe, [load_frames(r, r.pop(medium_of(r))[0], length, self.pipe) for r in self.records[i:i + 256]], **size)
                                  for i in range(0, len(self.records), 256)])   # (N, ...)

    def batch(self, indices, step):
        """(what loss() takes, the number of records, no padding): noise and noise levels are functions of (seed, step, record)."""
        x0, seed = self.latents[indices], self.args.seed
        noise = torch.stack([seeded_noise(x0.shape[1:], seed, step, i) for i in indices]).to(x0)
        sigma = torch.stack([seeded_noise((), seed, step, i, "sigma") for i in indices]).add(self.args.sigma_mean).sigmoid().to(x0)   # (B,)
        return (x0, noise, sigma, [self.records[i]["prompt"] for i in indices]), len(indices), 0.0

    def loss(self, batch):
        """Flow matching (arXiv 2210.02747): the mean squared error of the velocity noise - x0 at x = (1 - sigma) x0 + sigma noise, summed over B."""
        x0, noise, sigma, prompts = batch
        level = sigma.view(-1, *[1] * (x0.ndim - 1))
        v = velocity(self.pipe, (1 - level) * x0 + level * noise, sigma, prompt=prompts, **self.args.pipe_arg)
        return (v.float() - (noise - x0)).pow(2).flatten(1).mean(1).sum()

    def evaluate(self, out):
        """samples.png, and in the toy world the share of samples that the pixel oracle finds true to their prompts."""
        prompts = list(open_records(self.args.eval_data, "prompt", self.args.eval_num, 1))[:self.args.eval_num]
        know_toy_classes(out / "model")
        pipe = load_pipeline(out / "model", self.pipe.device)
        media = sample_media(pipe, [p["prompt"] for p in prompts], range(len(prompts)), self.args.batch_size, **self.args.pipe_arg)
        draw_grid([media[i:i + 8] for i in range(0, min(len(media), 64), 8)], out / "samples.png")
        return toy_world(self.args.world).truth(prompts, media) if "toy_prompt" in prompts[0] else {}

    def save(self, folder):
        save_pipeline(self.pipe, folder)


# ---------------------------------------------------------------- the loop

def main(argv=None):
    args, ranks = parse_args(argv), start_ranks()
    torch.manual_seed(args.seed)
    task = Judge(args, ranks) if args.task == "judge" else Generator(args, ranks)
    for module in task.modules.values():
        prepare_training(module, ranks, args.lora_rank, args.lora_alpha, args.lora_targets, args.adapter, args.freeze, args.grad_ckpt,
                         args.compile, args.fsdp, args.bf16)
    params = {prefix + name: p for prefix, module in task.modules.items() for name, p in trainable(module).items()}
    optimizers = make_optimizers(params, args.optim, args.lr, args.weight_decay)
    first = load_checkpoint(args.out, params, optimizers, vars(args), ranks) if args.resume else 0
    log = Log(args.out, vars(args), ranks, first)

    per_step = args.batch_size * args.accumulation * ranks.world
    if ranks.rank == 0:
        print(f"{args.task}: {sum(p.numel() for p in params.values()) / 1e6:.2f}M trained parameters, {len(task.records)} records, "
              f"{per_step} a step = {args.batch_size} x {args.accumulation} accumulated x {ranks.world} ranks", flush=True)
    bar = tqdm(range(first, args.max_steps), initial=first, total=args.max_steps, disable=ranks.rank > 0)
    for step in bar:
        began = time.time()
        indices = batch_indices(task.records, per_step, step, args.seed, task.window)[ranks.rank::ranks.world]
        batches = [task.batch(indices[i:i + args.batch_size], step) for i in range(0, len(indices), args.batch_size)]
        lr = set_lr(optimizers, args.lr, step, args.warmup_steps, args.max_steps)
        num_targets = total(sum(n for _, n, _ in batches), ranks)               # of the whole global batch
        padding = total(sum(share for *_, share in batches), ranks) / (args.accumulation * ranks.world)
        loss = 0.0
        for batch, *_ in batches:
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.bf16):
                part = task.loss(batch) / num_targets
            part.backward()
            loss += part.item()
        grad_norm = optimizer_step(list(params.values()), optimizers, ranks, args.max_norm)
        loss = total(loss, ranks)
        log.write(step=step + 1, loss=loss, lr=lr, grad_norm=grad_norm, targets=int(num_targets), padding=padding,
                  records_per_s=per_step / (time.time() - began), peak_gib=peak_gib())
        bar.set_postfix(loss=f"{loss:.3f}")
        if step + 1 in (1, args.max_steps) or (step + 1) % args.save_every == 0:
            save_checkpoint(args.out, step + 1, params, optimizers, vars(args), ranks)

    if args.lora_rank or args.adapter:
        save_adapter(Path(args.out, "adapter"), task.modules, task.adapter_file)
    if merged := args.merge or not (args.lora_rank or args.adapter):
        task.save(Path(args.out, "model"))
    if ranks.rank == 0:
        draw_curves(log.rows, task.curves, Path(args.out, "curves.png"))
        result = task.evaluate(Path(args.out)) if merged else {}
        log.write(**result)
        print("\n".join(f"  {k:22s} {v:.3f}" for k, v in result.items()))
        print(f"model, log.jsonl and pictures are in {args.out}/")


if __name__ == "__main__":
    main()
