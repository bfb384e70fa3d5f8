"""Stage 1, imitation: supervised fine-tuning of a judge on verdict traces (Sec. 3.2 of arXiv
2602.02380), or of a generator on captioned images.

    python sft.py                           the toy judge that `python tests/toy.py` makes
    python sft.py --task generator          the toy generator
    torchrun --nproc_per_node=8 sft.py --model ...      real models: README.md has the commands

After the stage comes the toolbox that all stages share: ranks, LoRA, optimizers, checkpoints, log.
Shapes: B records, T tokens, N response tokens, V vocabulary, H hidden size; (...) latents."""
import argparse, atexit, contextlib, fcntl, hashlib, json, math, os, re
import resource, shutil, subprocess, sys, time, warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from einops import rearrange
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from data import (StopPipeline, as_question, batch_indices, denoisers, encode, encode_records,
                  evaluate_judge, load_pipeline, load_rewards, predict, prediction_type,
                  read_records, report_long_prompts, reward_values, run_pipeline, sample_media,
                  seeded_generator, seeded_noise, unguided)
from reward import (Candidate, Comparison, LocalJudge, add_judge_options, format_verdict,
                    judge_options, load_media, load_processor, parse_verdict, report_html,
                    run_in_threads)

DEFAULTS = {
    "judge": {
        "model": "out/toy/judge", "data": "out/toy/traces.jsonl", "out": "out/judge-sft",
        "eval_data": "out/toy/pairs_test.jsonl", "lr": 2e-3, "max_steps": 1400, "batch_size": 16},
    "generator": {
        "model": "out/toy/generator", "data": "out/toy/images.jsonl", "out": "out/generator-sft",
        "eval_data": "out/toy/prompts_test.txt", "lr": 4e-3, "max_steps": 750, "batch_size": 128}}
FIRST_VERDICT = 150                     # the step after which a verdict is printed

def parse_args(argv=None):
    parser = stage_parser(__doc__, add_help=False)      # what all stages share
    add = parser.add_argument
    add("--task", choices=["judge", "generator"], default="judge", help="what is trained")
    add("--sigma-mean", type=float, default=1.5, help="noise levels are sigmoid(N(this, 1))")
    add("--optim", choices=["adamw", "muon"], default="muon")
    add("--accumulation", type=int, default=1, help="micro-steps per optimizer step")
    parser.set_defaults(**DEFAULTS[parser.parse_known_args(argv)[0].task])
    add("-h", "--help", action="help")  # now, as it prints the defaults
    return parser.parse_args(argv)

# ---------- The judge: cross-entropy on the response
def response_loss(model, batch):
    """Cross-entropy (nats) summed over the response tokens of a batch of `encode`."""
    logps, _ = response_token_logps(model, batch)
    return -logps.sum()

def main(argv=None):
    args = parse_args(argv)
    device = setup_distributed(args)
    if args.task == "generator":
        return train_generator(args, device)

    judge = load_trained_judge(args, device)
    model = judge.model
    prepare_training(model, args, device)
    optimizers = make_optimizers(model, args.optim)
    start = load_checkpoint(args, model, optimizers)

    records = read_records(args.data, "trace")
    pairs = read_records(args.eval_data, "pair")
    per_step = args.batch_size * args.accumulation * get_world_size()
    own = sum("instruction" in record for record in records)
    start_log(args, model, f"{len(records)} traces, {own} in words of their own, {per_step} a step")

    def encode_traces(traces):
        return encode_responses(judge, traces, [trace["response"] for trace in traces])
    encoded = prefetch(encode_traces, records, per_step, start, args)

    for step in progress(start, args):
        batches = next(encoded)
        num_tokens = sum((batch["labels"] != -100).sum().item() for batch in batches)
        num_tokens = sum_over_ranks({"num_tokens": num_tokens})["num_tokens"]   # global batch
        loss_sum = 0.0
        for batch in batches:
            with autocast(args, device):
                loss = call_sharded(model, response_loss, batch) / num_tokens
            loss.backward()
            loss_sum += loss.item()
        row = optimizer_step(model, optimizers, step, args)
        row.update(sum_over_ranks({"loss": loss_sum}), num_tokens=num_tokens)
        log_and_save(args, step, row, model, optimizers)
        if step + 1 == FIRST_VERDICT and get_rank() == 0 and not args.fsdp:
            print(f"\nafter {step + 1} steps the judge says of a held-out pair:")
            print_verdict(judge, pairs[0])
            model.train()

    save_judge(args, judge)
    after = evaluate_folder(Path(args.out, "model"), args, device)
    finish_log(args, {"after": after}, f"python dpo.py --model {args.out}/model")

# ---------- The generator: denoising
def add_noise(pipe, x0, args, step, indices):
    """(x, t, target) for clean latents x0 (B, ...): the latents at random noise levels, which are
    functions of (seed, step, index), their timesteps (B,), and what the denoiser should predict."""
    kind = prediction_type(pipe)
    num_timesteps = pipe.scheduler.config.num_train_timesteps
    noise = torch.stack([seeded_noise(x0.shape[1:], args.seed, step, i) for i in indices])
    if kind == "flow":
        logits = torch.stack([seeded_noise((), args.seed, step, i, "sigma") for i in indices])
        sigma = (logits + args.sigma_mean).sigmoid()
        alpha = 1 - sigma
        t = sigma * num_timesteps
    else:
        generators = [seeded_generator(args.seed, step, i, "t") for i in indices]
        t = torch.cat([torch.randint(num_timesteps, (1,), generator=g) for g in generators])
        signal = pipe.scheduler.alphas_cumprod.cpu()[t]
        alpha = signal.sqrt()
        sigma = (1 - signal).sqrt()
    noise, t, alpha, sigma = [tensor.to(x0.device) for tensor in (noise, t, alpha, sigma)]
    alpha, sigma = [level.view(-1, *[1] * (x0.ndim - 1)) for level in (alpha, sigma)]
    targets = {"flow": noise - x0, "epsilon": noise, "v_prediction": alpha * noise - sigma * x0}
    return alpha * x0 + sigma * noise, t, targets[kind]

def train_generator(args, device):
    pipe, policy, call = load_generator(args, device)
    prepare_training(policy, args, device)
    optimizers = make_optimizers(policy, args.optim)
    start = load_checkpoint(args, policy, optimizers)

    # data: N latents (...) are encoded once; what ranks gather goes by way of the GPU
    records = read_records(args.data, "image")
    dry_run(pipe, records, args, call)
    evaluate_samples(pipe, args, call, num=1)        # so that what is wrong is seen now
    latents = []
    for chunk in split(records, 1024):
        latents += split_over_ranks(lambda part: encode_records(pipe, part, call), chunk)
    per_step = args.batch_size * args.accumulation * get_world_size()
    start_log(args, policy, f"{len(records)} images, {per_step} a step")

    for step in progress(start, args):
        indices = batch_indices(len(records), per_step, step, args.seed)
        loss_sum = 0.0
        for part in micro_batches(indices, args.batch_size):
            prompts = [records[i]["prompt"] for i in part]
            x0 = torch.stack([latents[i] for i in part]).to(device)             # (B, ...)
            x, t, target = add_noise(pipe, x0, args, step, part)
            with autocast(args, device):
                prediction = predict(pipe, x, t, prompt=prompts, **unguided(pipe, call))
            errors = (prediction.float() - target).pow(2).flatten(1).mean(1)    # (B,)
            loss = errors.sum() / per_step
            loss.backward()
            loss_sum += loss.item()
        row = optimizer_step(policy, optimizers, step, args)
        row.update(sum_over_ranks({"loss": loss_sum}))
        log_and_save(args, step, row, policy, optimizers)

    save_generator(args, pipe, call)
    after = evaluate_samples(pipe, args, call)[1]
    finish_log(args, {"after": after}, f"python grpo.py --model {args.out}/model")

# ========== Toolbox: what every stage needs and nobody tweaks per stage
def stage_parser(description, add_help=True):
    parser = argparse.ArgumentParser(description=description, add_help=add_help,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", help="folder or hub id to start from  [%(default)s]")
    add_judge_options(parser)
    add("--data", help="what is trained on, see above  [%(default)s]")
    add("--eval-data", help="held-out pairs (judge) or prompts (generator)  [%(default)s]")
    add("--watch", default="tests/toy_oracle.py:true", help="measures held-out samples, or none")
    add("--pipe-args", type=json.loads, default={}, help='{"height": 512, ...}: media are cropped')
    add("--lora-rank", type=int, default=0, help="0: the weights themselves train  [%(default)s]")
    add("--targets", help="regex: the linear layers with adapters  [all in the blocks]")
    add("--lr", type=float, help="peak learning rate  [%(default)s]")
    add("--warmup-steps", type=int, default=60)
    add("--max-steps", type=int, help="optimizer steps  [%(default)s]")
    add("--batch-size", type=int, help="records or samples per rank at a time  [%(default)s]")
    add("--bf16", action=flag, default=has_bf16(), help="compute in bfloat16, train in float32")
    add("--fsdp", action=flag, default=False, help="shard the model across ranks (FSDP2)")
    add("--grad-ckpt", action=flag, default=False, help="activation checkpointing")
    add("--seed", type=int, default=0)
    add("--out", help="run folder  [%(default)s]")
    add("--save-every", type=int, default=50, help="steps between checkpoints")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint in --out")
    return parser

# ---------- ranks
def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0

def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def lock_folder(out):
    """Keep other processes out of the folder, until this one ends or locks another. SystemExit."""
    Path(out).mkdir(parents=True, exist_ok=True)
    lock_folder.file = open(Path(out, "lock"), "w")             # closed when the process ends
    try:
        fcntl.flock(lock_folder.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"--out {out} is in use by another run: pass another") from None

def setup_distributed(args):
    """This rank's device. SystemExit: inputs are missing or in the way, or --out is in use."""
    for path in (args.model, args.data, args.eval_data):
        if path.startswith("out/") and not Path(path).exists():
            raise SystemExit(f"{path} is not there yet. Run in this order: tests/toy.py, sft.py, "
                             "dpo.py, sft.py --task generator, grpo.py")
    if Path(args.model).resolve() == Path(args.out, "model").resolve():
        raise SystemExit(f"--out {args.out} would overwrite --model: pass another")
    if int(os.environ.get("RANK", 0)) == 0:
        lock_folder(args.out)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`torch_dtype` is|torch.distributed is|Mismatch dtype")
    torch.set_flush_denormal(True)                   # denormal numbers slow a CPU down
    torch.manual_seed(args.seed)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")   # TF32
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=4))
        if backend == "gloo":                        # whose threads may else abort the exit
            atexit.register(dist.destroy_process_group)
    return device

def gather_list(items):
    """The lists of all ranks as one, in the order of the ranks. Also a barrier."""
    parts = [list(items)] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(parts, list(items))
    return sum(parts, [])

def split_over_ranks(function, items):
    """The list function(items), shared by the ranks; equal shares, as sharded models need."""
    world_size = get_world_size()
    num_rounds = math.ceil(len(items) / world_size)
    mine = [items[(i * world_size + get_rank()) % len(items)] for i in range(num_rounds)]
    results = gather_list([function(mine)])                     # a list a rank
    return [results[i % world_size][i // world_size] for i in range(len(items))]

def sum_over_ranks(numbers):
    """{name: sum over the ranks}; all ranks give the same names."""
    if not dist.is_initialized():
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(numbers, values.tolist()))

def split(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]

def micro_batches(indices, batch_size):
    return split(indices[get_rank()::get_world_size()], batch_size)

# ---------- models
def repeated_blocks(model):
    """{name: block}, the members of a model's outermost nn.ModuleLists."""
    blocks = {}
    for name, module in model.named_modules():
        outer = tuple(f"{block}." for block in blocks)
        if isinstance(module, nn.ModuleList) and not name.startswith(outer):
            blocks.update({f"{name}.{i}": block for i, block in enumerate(module)})
    return blocks

def shard_model(model, args, device):
    """Put the model on its device, a copy of rank 0's on every rank (DDP), or with --fsdp sharded:
    FSDP2 gathers a block in bfloat16 while it computes and sums gradients in float32."""
    if not (args.fsdp and dist.is_initialized()):
        model.to(device)
        for p in model.parameters() if dist.is_initialized() else []:
            dist.broadcast(p.data, 0)
        return
    # inputs are not cast: in bfloat16 a timestep of 999 would be 1000
    dtype = torch.bfloat16 if args.bf16 else None
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in [*repeated_blocks(model).values(), model]:       # all anew: pipelines ask a dtype
        fully_shard(module, mp_policy=precision, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)       # sums, as the loss is divided already
        module.set_force_sum_reduction_for_comms(True)
    model.call = lambda function, *inputs: function(model, *inputs)
    register_fsdp_forward_method(model, "call")
    model.to(device)                                 # buffers; the shards are there already

def call_sharded(model, function, *inputs):
    """function(model, *inputs) as one forward pass: FSDP gathers embeddings and head for it."""
    return model.call(function, *inputs) if hasattr(model, "call") else function(model, *inputs)

def prepare_training(policy, args, device):
    """Add adapters, set up activation checkpointing, shard: a model or a dict of denoisers."""
    if args.lora_rank:
        add_lora(policy, args.lora_rank, args.targets)
    elif args.targets:
        raise ValueError("--targets chooses the layers with adapters: pass --lora-rank")
    for model in policy.values() if isinstance(policy, nn.ModuleDict) else [policy]:
        if args.grad_ckpt and hasattr(model, "gradient_checkpointing_enable"):  # transformers
            model.gradient_checkpointing_enable({"use_reentrant": False})
        elif args.grad_ckpt:                                                    # diffusers
            model.enable_gradient_checkpointing()
        shard_model(model.train(), args, device)
        if not args.lora_rank:
            model.float()                            # now: a rank's share, not a copy a rank

def has_bf16():
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))

def weights_dtypes(args, device):
    """(of the model that trains, of what is frozen), when loaded: float32 for weights that train,
    or with --fsdp, until they are shards, as they are stored; bfloat16 for the rest on a GPU."""
    frozen = torch.bfloat16 if device.type == "cuda" and args.bf16 else torch.float32
    whole = "auto" if args.fsdp else torch.float32
    return frozen if args.lora_rank else whole, frozen

def autocast(args, device):
    """bfloat16 with --bf16; without autocast's cache, under which FSDP2 loses gradients."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False)

# ---------- the judge
def load_trained_judge(args, device):
    """The LocalJudge that is trained; with --fsdp it is on the CPU, all of it as it is stored."""
    place = "cpu" if args.fsdp else device
    dtype, _ = weights_dtypes(args, device)
    judge = LocalJudge(args.model, device=place, dtype=dtype, **judge_options(args))
    judge.model.set_attn_implementation("sdpa" if device.type == "cuda" else "eager")
    judge.encoder = load_processor(args.model)       # for a thread: no two may use one tokenizer
    return judge

def encode_responses(judge, records, responses):
    """encode's batch for the judge's processor, wording and context length."""
    max_tokens = judge.model.config.get_text_config().max_position_embeddings
    return encode(judge.encoder, records, responses, judge.templates[Comparison], max_tokens)

def prefetch(encode_batch, records, per_step, start, args):
    """For each step that is left this rank's list of encode_batch(records of a micro-batch). A
    thread makes the list of the next step while the caller trains on this one."""
    def encode_step(step):
        batch = [records[i] for i in batch_indices(len(records), per_step, step, args.seed)]
        return [encode_batch(part) for part in micro_batches(batch, args.batch_size)]
    coming = run_in_threads(encode_step, [(start,)], 1)
    for step in range(start, args.max_steps):
        batches = coming[0].result()
        coming = run_in_threads(encode_step, [(step + 1,)], 1)
        yield batches

def response_token_logps(model, batch):
    """(log-probabilities (N,) of a batch's response tokens, the record's number (N,) of each)."""
    inputs = {name: x.to(model.device) for name, x in batch.items()}
    labels = inputs.pop("labels")[:, 1:]             # position t predicts token t + 1
    backbone = getattr(model, model.base_model_prefix)
    hidden = backbone(**inputs, use_cache=False).last_hidden_state[:, :-1]      # (B, T-1, H)
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    return token_logps(model, hidden[rows, columns], labels[rows, columns]), rows

class TokenLogps(torch.autograd.Function):
    """token_logps for a weight (V, H). Logits are made for `size` tokens at a time, and again in
    backward; autograd under checkpoint() takes 1.4 times as long for it."""
    @staticmethod
    def forward(ctx, hidden, weight, targets, size):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.size = size
        head = weight.to(hidden.dtype)
        logps = []
        for h, target in zip(hidden.split(size), targets.split(size)):
            logits = (h @ head.T).float()                                       # (chunk, V)
            logps.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        hidden_grads = []
        trains = ctx.needs_input_grad[1]
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if trains else None
        for h, target, g in zip(*[x.split(ctx.size) for x in (hidden, targets, grad)]):
            logits_grad = (h @ head.T).float().softmax(1)
            logits_grad[range(len(target)), target] -= 1
            logits_grad = logits_grad.mul_(-g[:, None]).to(h.dtype)
            hidden_grads.append(logits_grad @ head)
            if trains:
                weight_grad += logits_grad.T @ h
        return torch.cat(hidden_grads), weight_grad, None, None

def token_logps(model, hidden, targets):
    """(N,) log-probabilities (nats, float32) of `targets` from the hidden states (N, H)."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"{type(model).__name__} rescales its logits by {name}: not supported")
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"the output layer is {head}; expected nn.Linear, no bias, no adapter")
    device = hidden.device.type
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device) else head.weight.dtype
    with torch.autocast(device, enabled=False):
        size = max(1, 2 ** 25 // head.out_features)         # 128 MiB of logits
        return TokenLogps.apply(hidden.to(dtype), head.weight, targets, size)

def evaluate_folder(folder, args, device):
    """{name: number} of a judge on the pairs of --eval-data; a verdict is printed."""
    judge = LocalJudge(folder, device=device, **judge_options(args))
    pairs = read_records(args.eval_data, "pair")
    numbers = evaluate_judge(judge, pairs, share=split_over_ranks)
    if get_rank() == 0:
        print_verdict(judge, pairs[0])
    return numbers

def print_verdict(judge, pair):
    judge.model.eval()
    text = format_verdict(parse_verdict(judge([as_question(pair)])[0]), pair["prompt"])
    print(text.encode(errors="replace").decode(), flush=True)           # half a character

def save_judge(args, judge):
    """Write args.out/model, with the wording of the questions, and args.out/adapter, if any."""
    folder = Path(args.out, "model")
    save_adapter(args, judge.model, "base_model.model.", "adapter_model.safetensors")
    save_merged(judge.model, folder)
    if get_rank() == 0:
        judge.processor.save_pretrained(folder)
        for kind, name in ((Comparison, "template.txt"), (Candidate, "score_template.txt")):
            if judge.templates[kind]:
                (folder / name).write_text(judge.templates[kind])
    gather_list([])                                  # wait until the files are there

# ---------- the generator
def load_generator(args, device):
    """(the pipeline, a dict of its denoisers, the arguments of its call)"""
    pipe = load_pipeline(args.model, device, *weights_dtypes(args, device), args.fsdp)
    return pipe, denoisers(pipe), {**pipe.call_args, **args.pipe_args}

def dry_run(pipe, records, args, call):
    """Predict for two prompts at two noise levels, and one by one if that is something else.
    ValueError: a flow's denoiser is told other times than 1000 sigma."""
    report_long_prompts(pipe, records, call)
    if args.fsdp and len(denoisers(pipe)) > 1:       # the ranks of grpo.py go in step
        raise ValueError("--fsdp: ranks at other noise levels would gather other experts' shards")
    if "source" in records[0]:
        raise ValueError("with a source image generators are trained by grpo.py alone")
    lengths = sorted([record["prompt"] for record in records], key=len)
    prompts = [lengths[0], lengths[-1]]
    call = unguided(pipe, call)
    seen = []

    def step_fn(i, x, v):
        seen.extend([x, pipe.scheduler.timesteps, getattr(pipe.scheduler, "sigmas", None)])
        raise StopPipeline
    with autocast(args, pipe.device):
        run_pipeline(pipe, step_fn, generator=seeded_generator(0), prompt=prompts, **call)
        x, times, sigmas = seen
        x = x if len(x) == 2 else rearrange(x, "(b f) c h w -> b c f h w", b=2)
        t = times[[0, -1]]
        one = [predict(pipe, x[i:i + 1], t[i], prompt=prompts[i:i + 1], **call) for i in range(2)]
        tolerance = (0.05 if args.bf16 else 1e-3) * one[0].norm()
        with torch.no_grad():
            again = predict(pipe, x[:1], t[0], prompt=prompts[:1], **call)
            try:
                error = (predict(pipe, x, t, prompt=prompts, **call) - torch.cat(one)).norm()
            except (TypeError, ValueError, RuntimeError):
                error = math.inf
    pipe.one_by_one = pipe.one_by_one or not error <= tolerance
    if not (again - one[0]).norm() <= tolerance:
        raise ValueError("the denoiser predicts something else with gradients: omit --grad-ckpt")
    if pipe.one_by_one and get_rank() == 0:
        print("a call takes one noise level: samples are trained on one by one", flush=True)
    scale = pipe.scheduler.config.num_train_timesteps
    is_flow = prediction_type(pipe) == "flow"
    if is_flow and (sigmas[0] > 1 or (times.cpu() - scale * sigmas[:-1].cpu()).abs().max() > 1):
        raise ValueError(f"it tells its denoiser other times than 1000 sigma, {scale * sigmas}")

def evaluate_samples(pipe, args, call, before=None, num=None):
    """({number: frames}, {name: mean}) of samples for --eval-data by --watch. Media stay on the
    rank that made them, but for the first ones, which a page shows."""
    records = read_records(args.eval_data, "prompt")[:num]
    rewards = load_rewards(args.watch)
    num_shared = max(32, get_world_size())
    media = {}

    def sample(indices):
        share = [records[i] for i in indices]
        seeds = [("held out", i) for i in indices]
        with autocast(args, pipe.device):
            samples = sample_media(pipe, share, seeds, args.batch_size, call)
        media.update(zip(indices, samples))
        columns = {}
        for reward in rewards:
            columns |= reward_values(reward, samples, [record["prompt"] for record in share])
        rows = []
        for k, i in enumerate(indices):
            numbers = {name: values[k].item() for name, values in columns.items()}
            rows.append((numbers, load_media(samples[k]) if i < num_shared else None))
        return rows
    numbers, shared = zip(*split_over_ranks(sample, range(len(records))))
    media |= dict(enumerate(shared[:num_shared]))
    figures = [(record["prompt"], (load_media(before[i]) if before else []) + media[i], False)
               for i, record in enumerate(records[:32])]
    if get_rank() == 0:
        name, title = ("before_after", "before and after") if before else ("samples", "held out")
        Path(args.out, f"{name}.html").write_text(report_html(title, figures), errors="replace")
    names = dict.fromkeys(name for row in numbers for name in row)
    columns = {name: torch.tensor([row[name] for row in numbers if name in row]) for name in names}
    return media, {name: values.nanmean().item() for name, values in columns.items()}

def save_generator(args, pipe, call):
    """Write args.out/model, the pipeline's folder with the trained denoisers, and the adapter."""
    policy = denoisers(pipe)
    folder = Path(args.out, "model")
    save_adapter(args, policy, "", "pytorch_lora_weights.safetensors")
    if get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pipe.folder, folder, ignore=shutil.ignore_patterns(*policy))
        (folder / "pipe_args.json").write_text(json.dumps(call))
    for name, model in policy.items():
        save_merged(model, folder / name)
    gather_list([])                                  # wait until the files are there

# ---------- LoRA
class LoRALinear(nn.Module):
    """y = W x + B A x, W frozen; B = 0 at first, so y = W x (arXiv 2106.09685, alpha = rank)."""
    enabled = True                                   # of all layers, see disable_lora

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        options = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def __getattr__(self, name):                     # pipelines ask for .weight, .in_features, ...
        if name in ("base", "lora_A", "lora_B"):
            return super().__getattr__(name)
        return getattr(super().__getattr__("base"), name)

    def forward(self, x, *args, **kwargs):
        y = self.base(x, *args, **kwargs)
        if not self.enabled:
            return y
        update = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return y + update.to(y.dtype)

NO_LORA = r"norm|modulation|adaln|(^|\.)(visual|vision_\w+|image_encoder)\."

def add_lora(model, rank, targets=None):
    """Freeze the model and put adapters on every nn.Linear whose name matches `targets`, by default
    on those of the repeated blocks but norms, modulation and vision encoders."""
    model.requires_grad_(False)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    blocks = tuple(f"{name}." for name in repeated_blocks(model))
    names = [name for name in linear if name.startswith(blocks) and not re.search(NO_LORA, name)]
    if targets:
        names = [name for name in linear if re.search(targets, name)]
    total = sum(p.numel() for block in repeated_blocks(model).values() for p in block.parameters())
    share = sum(model.get_submodule(name).weight.numel() for name in names) / max(total, 1)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank))
    reach = f"LoRA on {len(names)} of {len(linear)} linear layers, {share:.0%} of block weights"
    if not names or share < 0.3 and not targets:
        raise ValueError(f"{reach}: choose others by --targets, a regex of their names")
    if get_rank() == 0:
        print(reach, flush=True)

def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}

@contextlib.contextmanager
def disable_lora():
    """The reference policy: the same model without its adapters."""
    LoRALinear.enabled = False
    try:
        yield
    finally:
        LoRALinear.enabled = True

def save_adapter(args, policy, prefix, filename):
    """Write the adapters, if any, to args.out/adapter in the layout of PEFT or diffusers."""
    tensors = {}
    layers = lora_layers(policy)
    for name, layer in layers.items():
        for part, x in {"lora_A": layer.lora_A, "lora_B": layer.lora_B}.items():
            x = x.full_tensor() if isinstance(x, DTensor) else x
            tensors[f"{prefix}{name}.{part}.weight"] = x.detach().cpu().contiguous()
    if layers and get_rank() == 0:
        folder = Path(args.out, "adapter")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": args.lora_rank, "lora_alpha": args.lora_rank,
                  "bias": "none", "target_modules": sorted(layers)}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))

def save_merged(model, folder):
    """model.save_pretrained(folder), adapters merged and shards gathered. All ranks call it. Sums
    in bfloat16 are right on average: to the nearest, small updates would be lost."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)        # {} but on rank 0
    for name in lora_layers(model) if state else []:
        weight = state[f"{name}.base.weight"]
        x = weight.float() + state.pop(f"{name}.lora_B") @ state.pop(f"{name}.lora_A")
        if weight.dtype == torch.bfloat16:           # 8 bits: rounded at random
            noise = torch.randint(2 ** 16, x.shape, dtype=torch.int32,
                                  generator=seeded_generator(name))
            x = (x.view(torch.int32) + noise >> 16 << 16).view(torch.float32)
        state[f"{name}.base.weight"] = x.to(weight.dtype)
    state = {re.sub(r"\.base\.(weight|bias)$", r".\1", name): x for name, x in state.items()}
    if get_rank() == 0:
        model.state_dict = lambda *args, **kwargs: state        # what save_pretrained writes
        shutil.rmtree(folder, ignore_errors=True)               # a wording beside older weights
        type(model).__name__ = type(model).__name__.removeprefix("FSDP")        # as configs have it
        model.save_pretrained(folder)
        del model.state_dict

# ---------- optimization
class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made nearly orthogonal by Newton-Schulz, at the RMS of AdamW's updates
    (arXiv 2502.16982). torch.optim.Muon takes bfloat16 also on CPUs that lack it."""
    @torch.no_grad()
    def step(self, closure=None):
        dtype = torch.bfloat16 if has_bf16() else torch.float32
        group = self.param_groups[0]
        stacks = defaultdict(list)                   # matrices of one shape are multiplied at once
        for p in group["params"]:
            if p.grad is not None:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                stacks[p.shape].append((p, p.grad.lerp(momentum, 0.95).to(dtype)))
        for shape, stack in stacks.items():
            x = torch.stack([direction for _, direction in stack])              # (number, ...)
            x = x.mT if shape[0] > shape[1] else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):                       # singular values go to about 1
                gram = x @ x.mT
                poly = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
                x = torch.baddbmm(x, poly, x, beta=3.4445)
            for (p, _), update in zip(stack, x.mT if shape[0] > shape[1] else x):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(shape)))

def make_optimizers(policy, kind="adamw"):
    """[AdamW]; with "muon" [Muon for the matrices of numbered blocks, AdamW for the rest]."""
    params = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if kind == "muon" and any(isinstance(p, DTensor) for p in params.values()):
        raise ValueError("Muon needs whole matrices and --fsdp shards them: pass --optim adamw")
    matrices = {name: p for name, p in params.items()
                if kind == "muon" and p.ndim == 2 and re.search(r"\.\d+\.", name)}
    rest = [p for name, p in params.items() if name not in matrices]
    optimizers = [Muon(matrices.values(), {"lr": 0.0, "weight_decay": 0.01})] if matrices else []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, 0.0, (0.9, 0.98), 1e-10, weight_decay=0.01))
    return optimizers

def learning_rate(step, args):
    """Linear warm-up times a cosine from args.lr to 2 % of it."""
    warmup = min(1.0, (step + 1) / max(args.warmup_steps, 1))
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / args.max_steps)
    return args.lr * warmup * (0.02 + 0.98 * cosine)

def optimizer_step(policy, optimizers, step, args):
    """The log's row. Sums gradients over ranks (FSDP has), clips their norm to 1, steps, zeroes."""
    lr = learning_rate(step, args)
    params = [p for p in policy.parameters() if p.requires_grad]
    reached = sum(p.numel() for p in params if p.grad is not None) / sum(p.numel() for p in params)
    if reached < 0.5:                                # of two experts one may be reached
        raise RuntimeError(f"only {reached:.0%} of the weights that train get a gradient")
    for p in params:
        if p.grad is None:                           # other ranks and checkpoints wait for it
            p.grad = torch.zeros_like(p)
        if dist.is_initialized() and not isinstance(p, DTensor):
            dist.all_reduce(p.grad)
    norm = nn.utils.clip_grad_norm_(params, 1.0)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):
        raise RuntimeError(f"the gradient norm is {norm}: lower --lr, or look at the last batch")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"lr": lr, "grad_norm": norm}

# ---------- checkpoints and the log
def training_state(policy, optimizers):
    options = StateDictOptions(ignore_frozen_params=True)
    weights, optimizer_state = get_state_dict(policy, optimizers, options=options)
    return {"weights": weights, "optimizers": optimizer_state}

def save_checkpoint(args, step, policy, optimizers):
    """Write args.out/step_000123/ every --save-every steps, at the last, and at the first, so that
    a broken save fails early. It is renamed when whole; the last two are kept."""
    num_steps = step + 1
    if num_steps not in (1, args.max_steps) and num_steps % args.save_every:
        return
    partial = Path(args.out, "partial")
    if get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    gather_list([])
    dcp.save(training_state(policy, optimizers), checkpoint_id=partial)
    if get_rank() == 0:
        (partial / "args.json").write_text(json.dumps(run_options(args)))
        partial.rename(Path(args.out, f"step_{num_steps:06d}"))
        for old in sorted(Path(args.out).glob("step_*"))[:-2]:
            shutil.rmtree(old)
        plots = Path(__file__).parent / "tests/plots.py"        # curves.png beside the log
        if num_steps > 1 and plots.exists():
            log = f"{args.out}/log.jsonl"
            subprocess.run([sys.executable, plots, log], stdout=subprocess.DEVNULL)
    gather_list([])

MAY_DIFFER = ("resume", "out", "save_every", "judge_batch")
def run_options(args):
    """What a resumed run has to share with the first: options, ranks and the records themselves."""
    digest = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()
    options = {**vars(args), "ranks": get_world_size(), "digest of --data": digest}
    return {name: re.sub("^https?://[^#]*", "server", value) if isinstance(value, str) else value
            for name, value in options.items()}                 # servers move

def load_checkpoint(args, policy, optimizers):
    """With --resume restore the newest checkpoint in args.out and return its step, 0 where there is
    none. ValueError: it was made with other options or data, or is damaged."""
    if not args.resume:
        return 0
    newest = max(Path(args.out).glob("step_*"), default=None)
    if newest is None:
        print(f"--resume: no checkpoint in {args.out}, starting from the first step", flush=True)
        return 0
    saved = json.loads((newest / "args.json").read_text())
    changed = [f"{name} {saved.get(name)!r} -> {value!r}"
               for name, value in run_options(args).items()
               if saved.get(name) != value and name not in MAY_DIFFER]
    if changed:
        raise ValueError(f"--resume: {newest} was made with other options: {', '.join(changed)}")
    state = training_state(policy, optimizers)
    try:
        dcp.load(state, checkpoint_id=newest)
    except dcp.api.CheckpointException as error:
        raise ValueError(f"--resume: {newest} is damaged: remove it, the one before is taken then "
                         f"({str(error)[-300:]})") from None
    options = StateDictOptions(strict=False)                    # frozen weights are not in it
    set_state_dict(policy, optimizers, model_state_dict=state["weights"],
                   optim_state_dict=state["optimizers"], options=options)
    return int(newest.name.removeprefix("step_"))

def start_log(args, policy, description):
    if get_rank() > 0:
        return
    out = Path(args.out)
    for old in [*out.glob("log.jsonl"), *out.glob("step_*")] if not args.resume else []:
        print(f"{old} of an earlier run is removed", flush=True)
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    git = subprocess.run("git rev-parse HEAD", shell=True, capture_output=True, text=True)
    append_log(args, {"args": vars(args), "torch": torch.__version__, "commit": git.stdout.strip()})
    num = sum(p.numel() for p in policy.parameters() if p.requires_grad) / 1e6
    print(f"{num:.2f}M trained parameters, {description}, {get_world_size()} ranks", flush=True)

def append_log(args, row):
    with open(Path(args.out, "log.jsonl"), "a") as file:
        start = "\n" if "args" in row else ""        # a killed run may have left half a line
        file.write(start + json.dumps(row) + "\n")

def progress(start, args):
    """The steps that are left. Each seeds torch anew, for dropout, so that no state is saved."""
    steps = range(start, args.max_steps)
    for step in tqdm(steps, initial=start, total=args.max_steps, disable=get_rank() > 0):
        torch.manual_seed((args.seed * 1_000_003 + step) * 1009 + get_rank())
        yield step

def log_and_save(args, step, numbers, policy, optimizers):
    """Log a row, save_checkpoint. peak_gib: the most memory of this process, or of its GPU."""
    unit = 2 ** (30 if sys.platform == "darwin" else 20)        # bytes or KiB
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if torch.cuda.is_available():
        peak_gib = torch.cuda.max_memory_allocated() / 2 ** 30
    if get_rank() == 0:
        append_log(args, {"step": step + 1, **numbers, "time": time.time(), "peak_gib": peak_gib})
    save_checkpoint(args, step, policy, optimizers)

def finish_log(args, columns, command):
    """Print and log {"before": {name: number}, "after": {...}}; print what to run next."""
    if get_rank() == 0:
        append_log(args, columns)
        for name in columns["after"]:
            cells = [f"{title} {numbers[name]:.3f}  " for title, numbers in columns.items()]
            print(f"  {name:22s}" + "".join(cells))
        print(f"model/, log.jsonl and pages to look at are in {args.out}/. Next: {command}")

if __name__ == "__main__":
    main()
