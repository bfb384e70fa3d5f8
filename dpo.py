"""Prefer: direct preference optimisation of a judge on pairs of its own verdict traces.

    python dpo.py                                                      the toy judge that sft.py made
    torchrun --nproc_per_node=8 dpo.py --model JUDGE --data pairs.jsonl --lora-rank 64 --optim adamw --lr 5e-6

From preference pairs, people's choices between two images: the judge writes several traces a pair, traces with the right winner
are preferred to traces with the wrong one (data.rank_traces), and the margin between them is widened. From preference records,
{"chosen", "rejected"}, as they are. The reference is the judge before: adapters off, or a frozen copy when all weights train.
Legend: B pairs, T tokens, V vocabulary.
"""
import argparse
import contextlib
import copy
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from data import batch_indices, build_preferences, comparison, encode, in_world, open_records, read_records, write_jsonl, WINNERS
from reward import Comparison, LocalJudge, TEMPLATE, evaluate_judge, format_verdict
# toolbox from sft.py; paste that block here to stand alone
from sft import (Log, adapters_off, draw_curves, draw_verdict, enter, gather, has_bf16, load_checkpoint, make_optimizers, optimizer_step,
                 peak_gib, prepare_training, save_adapter, save_checkpoint, save_whole, set_lr, shard, start_ranks, token_logps, total, trainable)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    # model
    add("--model", help="folder or hub id of the judge to start from  [out/judge-sft/model; video world out/video-...]")
    add("--template", help="file with the judge's instruction, {prompt} and {medium} in it; default: the model's own, or reward.TEMPLATE")
    # data
    add("--data", default="toy", help="JSONL of pairs, to sample traces for, or of preferences; toy: pairs made as needed")
    add("--data-num", type=int, default=800, help="pairs that traces are sampled for")
    add("--num-traces", type=int, default=4, help="traces per pair")
    add("--temperature", type=float, default=.7, help="of the sampled traces")
    add("--eval-data", default="toy:test", help="JSONL of pairs that are not trained on")
    add("--eval-num", type=int, default=400, help="records of it that are used, before and after")
    add("--judge-batch", type=int, help="pairs judged at a time  [200, where verdicts are long 16]")
    add("--max-tokens", type=int, default=8192, help="a longer record is refused, never cut")
    add("--skip-bad", action=flag, default=False, help="drop malformed lines and print how many")
    add("--world", choices=["image", "video"], default="image", help="which toy world is meant by toy: still or in motion")
    # lora
    add("--lora-rank", type=int, default=16, help="0: all weights are trained, against a frozen copy")
    add("--lora-alpha", type=float, help="default: the rank")
    add("--lora-targets", default=r"(language|text)_model\..*_proj\w*$", help="regex on the names of linear layers")
    add("--adapter", help="folder of a LoRA adapter, ours or PEFT's, to train on; instead of a new one, and off in the reference")
    add("--freeze", nargs="*", default=[], choices=["vision", "projector", "language"], help="parts of the judge that stay as they are")
    add("--merge", action=flag, default=True, help="write and examine the whole model; without, a LoRA run leaves only its adapter")
    # loss
    add("--beta", type=float, default=.3, help="strength of the tie to the reference; paper: 0.1")
    add("--precompute-ref", action=flag, default=False, help="the reference's log-probabilities of all records before training, not at every step")
    add("--share-prompt", action=flag, help="chosen and rejected after one copy of images and prompt  [where the model can]")
    # optim
    add("--optim", choices=["adamw", "muon"], default="adamw")
    add("--lr", type=float, default=3e-4, help="peak learning rate")
    add("--weight-decay", type=float, default=0.0)
    add("--warmup-steps", type=int, default=5)
    add("--max-steps", type=int, default=60, help="optimizer steps")
    add("--batch-size", type=int, default=16, help="pairs per rank per micro-step")
    add("--accumulation", type=int, default=1, help="micro-steps per optimizer step")
    add("--max-norm", type=float, default=1.0, help="the gradient norm is clipped to this")
    # run
    add("--bf16", action=flag, help="compute in bfloat16, keep what is trained in float32; default: where the hardware multiplies in it")
    add("--fsdp", action=flag, default=False, help="split weights, gradients and optimizer over the ranks (FSDP2) instead of copying them")
    add("--grad-ckpt", action=flag, default=False, help="gradient checkpointing: less memory, a third more time")
    add("--compile", action=flag, default=False, help="torch.compile each block")
    add("--max-new-tokens", type=int, help="longest verdict written  [toy data 256, else 2048]")
    add("--seed", type=int, default=0)
    add("--out", help="run folder  [out/judge-dpo; video world out/video-...]")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint in --out")
    args = parser.parse_args(argv)
    args.max_new_tokens = args.max_new_tokens or (256 if args.data.split(":")[0] == "toy" else 2048)
    out = in_world(args)
    for name, value in dict(model=f"{out}judge-sft/model", out=f"{out}judge-dpo", lora_alpha=args.lora_rank, bf16=has_bf16(),
                            judge_batch=200 if args.max_new_tokens <= 256 else 16).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# ---------------------------------------------------------------- the log-probabilities of two responses

def can_share_prompt(model):
    """Whether the model's attention may be masked at will: no layer is recurrent or has a sliding window."""
    config = model.config.get_text_config()
    return set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"} and not getattr(config, "sliding_window", None)


def side_by_side(model, batch):
    """The batch with an attention mask (B, 1, T, T) and positions under which the responses after one prompt do not see each other and
    each begins at the prompt's end, as if it were alone. Rows are `segments` of encode: 0 prompt, 1 chosen, 2 rejected."""
    batch = dict(batch)
    segments, mask = batch.pop("segments"), batch["attention_mask"]                                     # (B, T)
    if hasattr(model.model, "get_rope_index"):                                  # Qwen-VL: time, height and width, (3, B, T)
        wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions, _ = model.model.get_rope_index(**{k: v for k, v in batch.items() if k in wanted})
    else:
        positions = mask.cumsum(1) - 1
    batch["position_ids"] = positions - (segments == 1).sum(1, keepdim=True) * (segments == 2)
    keys, queries = rearrange(segments, "b t -> b 1 1 t"), rearrange(segments, "b t -> b 1 t 1")
    seen = ((keys == 0) | (keys == queries)) & rearrange(mask, "b t -> b 1 1 t").bool()
    seen = seen.tril()                                                          # (B, 1, T, T)
    dtype = next(model.parameters()).dtype
    batch["attention_mask"] = torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)
    return batch


def response_logps(model, batch):
    """(logps, lengths), each (2, B): log-probabilities (nats) summed over the tokens of the chosen and rejected responses of B pairs,
    and the number of those tokens. The batch has B rows that hold both responses, or 2B rows, the chosen ones first.

    Position t predicts token t + 1, except that a second response's first token is predicted by the prompt's last position.
    """
    batch, segments = dict(batch), batch["segments"]
    targets, shared = batch.pop("labels"), segments.max() > 1
    if not shared:
        batch.pop("segments")
    hidden = getattr(model, model.base_model_prefix)(**(side_by_side(model, batch) if shared else batch), use_cache=False).last_hidden_state
    row, at = (targets != -100).nonzero(as_tuple=True)                          # (N,) labelled tokens
    first = segments[row, at] != segments[row, at - 1]
    before = torch.where(first, (segments == 0).int().argmin(1)[row], at) - 1   # the place that predicts each
    logps = token_logps(model, hidden[row, before], targets[row, at])
    num = len(targets) if shared else len(targets) // 2
    side = segments[row, at] - 1 if shared else row // num                      # 0 chosen, 1 rejected
    logps = logps.double()                                                      # thousands of nats, of which small differences count
    out = logps.new_zeros(2, num).index_put((side, row % num), logps, accumulate=True)
    return out, torch.zeros_like(out).index_put((side, row % num), torch.ones_like(logps), accumulate=True)


# ---------------------------------------------------------------- the loss

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """(losses, chosen rewards, rejected rewards), each (B,), from summed log-probabilities (B,).

    Eq. 7 of arXiv 2305.18290: -log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))). Equal policy and
    reference give ln 2. A reward is beta times the log-ratio to the reference.
    """
    chosen_rewards, rejected_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards.detach(), rejected_rewards.detach()


def sample_preferences(args, judge, ranks):
    """The preference records made of the pairs of --data, whose traces the ranks sample in shares. They are kept in --out/preferences.jsonl."""
    path = Path(args.out, "preferences.jsonl")
    if not (args.resume and path.exists() and any(Path(args.out).glob("step_*"))):                  # a checkpoint vouches for their options
        torch.manual_seed(args.seed + ranks.rank)
        pairs = open_records(args.data, "pair", args.data_num, args.seed, args.skip_bad)
        chosen = random.Random(args.seed).sample(range(len(pairs)), min(len(pairs), args.data_num))
        mine = [pairs[i] for i in chosen[ranks.rank::ranks.world]]
        found, counts = build_preferences(judge, mine, args.num_traces, args.temperature, progress=ranks.rank == 0)
        counts = {k: int(total(v, ranks)) for k, v in counts.items()}
        found = gather(found, ranks)
        if not found:
            raise ValueError(f"no pair of traces is worth preferring: {counts}. All wrong: are verdicts cut at --max-new-tokens {args.max_new_tokens}, or is "
                             "the judge untrained?  All right: take harder pairs or a higher --temperature")
        if ranks.rank == 0:
            print(f"{args.num_traces} traces for each of {len(chosen)} pairs: " + ", ".join(f"{v} {k}" for k, v in counts.items()))
            write_jsonl(path, found)
        gather([], ranks)                                                       # the file is there
    return read_records(path, "preference")


def main(argv=None):
    args, ranks = parse_args(argv), start_ranks()
    if args.model.startswith("out/") and not Path(args.model).exists():
        raise SystemExit(f"{args.model} is not there yet. Make the judge first: python sft.py")
    ready = Path(args.data).is_file() and '"chosen"' in open(args.data).readline()
    held_out = open_records(args.eval_data, "pair", args.eval_num, 1) if ranks.rank == 0 else []
    held_out = [held_out[i] for i in range(min(len(held_out), args.eval_num))]
    labels = [WINNERS[p["winner"]] for p in held_out]

    def evaluate(judge):
        return evaluate_judge(judge, [comparison(p) for p in held_out], labels, random.Random(0))

    template = args.template and Path(args.template).read_text()
    judge = LocalJudge(args.model, template=template, batch_size=args.judge_batch, max_new_tokens=args.max_new_tokens)
    before = evaluate(judge) if ranks.rank == 0 else None
    records = read_records(args.data, "preference", args.skip_bad) if ready else sample_preferences(args, judge, ranks)
    del judge                                                                   # its memory is the training's now
    torch.manual_seed(args.seed)
    lora = args.lora_rank or args.adapter
    half = ranks.device.type == "cuda" and args.bf16 and lora                   # what LoRA freezes is bfloat16, what trains float32
    judge = LocalJudge(args.model, template=template, device="cpu" if args.fsdp else ranks.device, dtype=torch.bfloat16 if half else torch.float32)
    model, processor, template = judge.model, judge.processor, judge.templates[Comparison] or TEMPLATE
    model.set_attn_implementation("sdpa" if ranks.device.type == "cuda" else "eager")
    share = can_share_prompt(model) if args.share_prompt is None else args.share_prompt
    reference = None
    if not lora and not args.precompute_ref:
        reference = copy.deepcopy(model).requires_grad_(False).eval()
        shard(reference, ranks, args.fsdp, args.bf16)
    prepare_training(model, ranks, args.lora_rank, args.lora_alpha, args.lora_targets, args.adapter, args.freeze, args.grad_ckpt,
                     args.compile, args.fsdp, args.bf16)
    params = trainable(model)

    def forward(policy, pairs):
        """response_logps of some records, and the share of padding in their batch."""
        responses = [(p["chosen"], p["rejected"]) for p in pairs] if share else [(p[k],) for k in ("chosen", "rejected") for p in pairs]
        batch = encode(processor, pairs if share else pairs * 2, responses, template, args.max_tokens)
        padding = 1 - batch["attention_mask"].float().mean().item()
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.bf16):
            return *enter(policy, response_logps, {k: v.to(ranks.device) for k, v in batch.items()}), padding

    @torch.no_grad()
    def reference_logps(pairs):
        with adapters_off(model) if lora else contextlib.nullcontext():
            return forward(reference or model, pairs)[0]                        # (2, B)

    ref_table = None
    if args.precompute_ref:                                                     # every rank does as many batches, so that none waits in vain
        shares = [range(len(records))[i:i + args.batch_size] for i in range(0, len(records), args.batch_size)]
        rounds = [shares[(i + ranks.rank) % len(shares)] for i in range(0, len(shares), ranks.world)]
        found = [(list(part), reference_logps([records[i] for i in part]).cpu()) for part in tqdm(rounds, desc="reference", disable=ranks.rank > 0)]
        ref_table = torch.empty(2, len(records), dtype=torch.float64)
        for part, values in gather(found, ranks):
            ref_table[:, part] = values
    optimizers = make_optimizers(params, args.optim, args.lr, args.weight_decay)
    first = load_checkpoint(args.out, params, optimizers, vars(args), ranks) if args.resume else 0
    log = Log(args.out, vars(args), ranks, first)

    per_step = args.batch_size * args.accumulation * ranks.world
    if ranks.rank == 0:
        print(f"{sum(p.numel() for p in params.values()) / 1e6:.2f}M trained parameters, {len(records)} preferences, "
              f"{per_step} a step = {args.batch_size} x {args.accumulation} accumulated x {ranks.world} ranks", flush=True)
    bar = tqdm(range(first, args.max_steps), initial=first, total=args.max_steps, disable=ranks.rank > 0)
    for step in bar:
        began, sums = time.time(), {}
        lr = set_lr(optimizers, args.lr, step, args.warmup_steps, args.max_steps)
        indices = batch_indices(records, per_step, step, args.seed, window=8)[ranks.rank::ranks.world]
        for i in range(0, len(indices), args.batch_size):
            mine = indices[i:i + args.batch_size]
            pairs = [records[k] for k in mine]
            ref_chosen, ref_rejected = reference_logps(pairs) if ref_table is None else ref_table[:, mine].to(ranks.device)
            (chosen, rejected), lengths, padding = forward(model, pairs)
            losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta)
            (losses.sum() / per_step).backward()
            for name, value in {"loss": losses, "nll": -chosen / lengths[0], "rewards/chosen": chosen_rewards,
                                "rewards/rejected": rejected_rewards, "rewards/margin": chosen_rewards - rejected_rewards,
                                "rewards/accuracy": (chosen_rewards > rejected_rewards).float(),
                                "padding": torch.full_like(losses, padding)}.items():
                sums[name] = sums.get(name, 0) + value.sum().item()
        grad_norm = optimizer_step(list(params.values()), optimizers, ranks, args.max_norm)
        row = {name: total(value, ranks) / per_step for name, value in sums.items()}
        log.write(step=step + 1, **row, lr=lr, grad_norm=grad_norm, records_per_s=per_step / (time.time() - began), peak_gib=peak_gib())
        bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['rewards/accuracy']:.2f}")
        if step + 1 in (1, args.max_steps) or (step + 1) % args.save_every == 0:
            save_checkpoint(args.out, step + 1, params, optimizers, vars(args), ranks)

    folder = Path(args.out, "model")
    if lora:
        save_adapter(Path(args.out, "adapter"), {"base_model.model.": model})
    if merged := args.merge or not lora:
        save_whole(lambda: model.save_pretrained(folder), [model], ranks)
    if ranks.rank == 0:
        draw_curves(log.rows, ["loss", "rewards/margin", "rewards/accuracy"], Path(args.out, "curves.png"))
    if ranks.rank == 0 and merged:
        processor.save_pretrained(folder)
        Path(folder, "template.txt").write_text(template)
        after = evaluate(LocalJudge(folder, batch_size=args.judge_batch, max_new_tokens=args.max_new_tokens))
        print(f"{len(held_out)} held-out pairs".ljust(24), "before   after")
        for name, value in before.items():
            if isinstance(value, float):
                print(f"  {name:22s} {value:6.3f}  {after[name]:6.3f}")
        right = [[v.winner and (3 - v.winner if flip else v.winner) == label for v, flip, label in zip(d["verdicts"], d["flipped"], labels)]
                 for d in (before, after)]
        mended = [i for i in range(len(labels)) if right[1][i] and not right[0][i]]              # shown: one whose categories stayed, if any
        stayed = [sum(a.winner == b.winner for a, b in zip(*(d["verdicts"][i].categories for d in (before, after)))) for i in mended]
        shown = mended[stayed.index(max(stayed))] if mended else 0
        pair = comparison(held_out[shown], swap=before["flipped"][shown])
        texts = [f"{when}\n\n{format_verdict(d['verdicts'][shown], pair.prompt)}" for when, d in (("before", before), ("after", after))]
        draw_verdict([pair.media_1, pair.media_2], texts, Path(args.out, "verdict.png"))
        log.write(**{f"{name}_{when}": v for when, d in (("before", before), ("after", after)) for name, v in d.items() if isinstance(v, float)})


if __name__ == "__main__":
    main()
