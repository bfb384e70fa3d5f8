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
from transformers import AutoModelForImageTextToText

from data import batch_indices, build_preferences, comparison, encode, open_records, read_records, write_jsonl, WINNERS
from reward import LocalJudge, TEMPLATE, evaluate_judge, format_verdict, load_processor
# toolbox from sft.py; paste that block here to stand alone
from sft import (Log, add_lora, adapters_off, draw_curves, draw_verdict, gather, has_bf16, load_checkpoint, make_optimizers, merge_lora,
                 optimizer_step, peak_gib, replicate, save_adapter, save_checkpoint, set_lr, start_ranks, total, trainable)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    # model
    add("--model", default="out/judge-sft/model", help="folder or hub id of the judge to start from")
    add("--template", help="file with the judge's instruction, {prompt} and {medium} in it; default: the model's own, or reward.TEMPLATE")
    # data
    add("--data", default="toy", help="JSONL of pairs, to sample traces for, or of preferences; toy: pairs made as needed")
    add("--data-num", type=int, default=800, help="pairs that traces are sampled for")
    add("--num-traces", type=int, default=4, help="traces per pair")
    add("--temperature", type=float, default=.7, help="of the sampled traces")
    add("--eval-data", default="toy:test", help="JSONL of pairs that are not trained on")
    add("--eval-num", type=int, default=600, help="records of it that are used, before and after")
    add("--max-tokens", type=int, default=8192, help="a longer record is refused, never cut")
    add("--skip-bad", action=flag, default=False, help="drop malformed lines and print how many")
    # lora
    add("--lora-rank", type=int, default=16, help="0: all weights are trained, against a frozen copy")
    add("--lora-alpha", type=float, help="default: the rank")
    add("--lora-targets", default=r"(q|k|v|o|gate|up|down)_proj$", help="regex on the names of linear layers")
    # loss
    add("--beta", type=float, default=.3, help="strength of the tie to the reference; paper: 0.1")
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
    add("--bf16", action=flag, help="autocast to bfloat16; default: where the hardware multiplies in it")
    add("--max-new-tokens", type=int, default=256, help="longest verdict written; real judges need about 2048")
    add("--seed", type=int, default=0)
    add("--out", default="out/judge-dpo", help="run folder")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint in --out")
    args = parser.parse_args(argv)
    for name, value in dict(lora_alpha=args.lora_rank, bf16=has_bf16()).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def response_logps(model, batch):
    """Log-probabilities (nats) of the labelled tokens summed per record, (B,), and the number of those tokens, (B,).

    Position t predicts token t + 1. Logits are made only where there is a label and the softmax is taken in float32.
    """
    batch = dict(batch)
    targets = batch.pop("labels")[:, 1:]
    on = targets != -100                                                        # (B, T-1)
    hidden = getattr(model, model.base_model_prefix)(**batch, use_cache=False).last_hidden_state[:, :-1]
    logits = model.get_output_embeddings()(hidden[on])                          # (N, V)
    logps = torch.zeros(on.shape, device=on.device)
    logps[on] = -F.cross_entropy(logits.float(), targets[on], reduction="none")
    return logps.sum(1), on.sum(1)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """(losses, chosen rewards, rejected rewards), each (B,), from summed log-probabilities (B,).

    Eq. 7 of arXiv 2305.18290: -log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))). Equal policy and
    reference give ln 2. A reward is beta times the log-ratio to the reference.
    """
    chosen_rewards, rejected_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards.detach(), rejected_rewards.detach()


def sample_preferences(args, judge, ranks):
    """The preference records of --data. Pairs are sampled for, split over the ranks, and kept in --out/preferences.jsonl."""
    path = Path(args.out, "preferences.jsonl")
    if Path(args.data).is_file() and '"chosen"' in Path(args.data).read_text().partition("\n")[0]:
        return read_records(args.data, "preference", args.skip_bad)
    if not args.resume:
        torch.manual_seed(args.seed + ranks.rank)
        pairs = open_records(args.data, "pair", args.data_num, args.seed, args.skip_bad)
        chosen = random.Random(args.seed).sample(range(len(pairs)), min(len(pairs), args.data_num))
        mine = [pairs[i] for i in chosen[ranks.rank::ranks.world]]
        found, counts = build_preferences(judge, mine, args.num_traces, args.temperature, progress=ranks.rank == 0)
        counts = {k: int(total(v, ranks)) for k, v in counts.items()}
        found = gather(found, ranks)
        if ranks.rank == 0:
            print(f"{args.num_traces} traces for each of {len(chosen)} pairs: " + ", ".join(f"{v} {k}" for k, v in counts.items()))
            write_jsonl(path, found)
        gather([], ranks)                                                       # the file is there
    return read_records(path, "preference")


def main(argv=None):
    args, ranks = parse_args(argv), start_ranks()
    if args.model.startswith("out/") and not Path(args.model).exists():
        raise SystemExit(f"{args.model} is not there yet. Make the judge first: python sft.py")
    torch.manual_seed(args.seed)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).to(ranks.device).train()
    model.set_attn_implementation("sdpa" if ranks.device.type == "cuda" else "eager")
    processor, kept = load_processor(args.model), Path(args.template or Path(args.model, "template.txt"))
    template = kept.read_text() if args.template or kept.exists() else TEMPLATE
    judge = LocalJudge(model=model, processor=processor, template=template, batch_size=200, max_new_tokens=args.max_new_tokens,
                       dtype=torch.bfloat16 if args.bf16 else None)
    held_out = open_records(args.eval_data, "pair", args.eval_num, 1) if ranks.rank == 0 else []
    held_out = [held_out[i] for i in range(min(len(held_out), args.eval_num))]
    labels = [WINNERS[p["winner"]] for p in held_out]

    def evaluate():
        return evaluate_judge(judge, [comparison(p) for p in held_out], labels, random.Random(0))

    before = evaluate() if ranks.rank == 0 else None
    records = sample_preferences(args, judge, ranks)
    reference = None if args.lora_rank else copy.deepcopy(model).requires_grad_(False).eval()
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets)
    params = trainable(model)
    replicate(model, ranks)
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
            pairs = [records[k] for k in indices[i:i + args.batch_size]]
            responses = [p["chosen"] for p in pairs] + [p["rejected"] for p in pairs]
            batch = {k: v.to(ranks.device) for k, v in encode(processor, pairs * 2, responses, template, args.max_tokens).items()}
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.bf16):
                with torch.no_grad(), contextlib.nullcontext() if reference else adapters_off(model):
                    ref_logps, _ = response_logps(reference or model, batch)    # (2B,)
                logps, lengths = response_logps(model, batch)
            (chosen, rejected), (ref_chosen, ref_rejected) = (rearrange(x, "(two b) -> two b", two=2) for x in (logps, ref_logps))
            losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta)
            (losses.sum() / per_step).backward()
            for name, value in {"loss": losses, "nll": -chosen / lengths.chunk(2)[0], "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
                                "rewards/margin": chosen_rewards - rejected_rewards,
                                "rewards/accuracy": (chosen_rewards > rejected_rewards).float()}.items():
                sums[name] = sums.get(name, 0) + value.sum().item()
        grad_norm = optimizer_step(list(params.values()), optimizers, ranks, args.max_norm)
        row = {name: total(value, ranks) / per_step for name, value in sums.items()}
        log.write(step=step + 1, **row, lr=lr, grad_norm=grad_norm, records_per_s=per_step / (time.time() - began), peak_gib=peak_gib())
        bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['rewards/accuracy']:.2f}")
        if step + 1 in (1, args.max_steps) or (step + 1) % args.save_every == 0:
            save_checkpoint(args.out, step + 1, params, optimizers, vars(args), ranks)

    if ranks.rank == 0:
        if args.lora_rank:
            save_adapter(Path(args.out, "adapter"), {"base_model.model.": model})
            merge_lora(model)
        model.save_pretrained(Path(args.out, "model"))
        processor.save_pretrained(Path(args.out, "model"))
        Path(args.out, "model", "template.txt").write_text(template)
        draw_curves(log.rows, ["loss", "rewards/margin", "rewards/accuracy"], Path(args.out, "curves.png"))
        after = evaluate()
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
        draw_verdict(pair.media_1 + pair.media_2, texts, Path(args.out, "verdict.png"))
        log.write(**{f"{name}_{when}": v for when, d in (("before", before), ("after", after)) for name, v in d.items() if isinstance(v, float)})


if __name__ == "__main__":
    main()
