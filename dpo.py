"""Stage 2, preference: direct preference optimisation of a judge on pairs of its own verdict traces
(Sec. 3.2 of arXiv 2602.02380), or of a generator on pairs of images or videos.

    python dpo.py                           the toy judge that sft.py made
    python dpo.py --task generator          the toy generator, on pairs of its own samples
    torchrun --nproc_per_node=8 dpo.py --model out/judge-sft/model --data pairs.jsonl \\
        --eval-data held_out.jsonl --lora-rank 64 --lr 2e-5 --batch-size 1 --accumulation 4

A judge learns from preferences between two verdicts, {"chosen", "rejected"}, or from people's
choices between two images: it then writes several verdicts on each pair of them, and a right one is
chosen over a wrong one. A generator learns from such choices (Diffusion-DPO, arXiv 2311.12908), or
from prompts: it then makes several candidates for each, and a judge finds the best and the worst.

Compare with sft.py: only the data, the reference and the loss differ.

Shapes: B pairs, T tokens, N response tokens, G candidates of a prompt; (...) latents.
"""
import argparse
import copy
import random
from collections import Counter
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (WINNERS, batch_indices, build_preferences, encode_records, kind_of, medium_of,
                  pair_of, read_records, write_jsonl)
from reward import (Candidate, Comparison, Failure, LocalJudge, latest_judge, load_judge,
                    load_media, parse_score, parse_verdict, sample_pairs)
# the toolbox and the driver lie at the end of sft.py
from sft import (autocast, call_sharded, denoisers, disable_lora, encode_responses,
                 evaluate_folder, evaluate_samples, finish_args, finish_log, gather_list, get_rank,
                 get_world_size, has_bf16, learning_rate, load_checkpoint, load_pipeline,
                 load_trained_judge, log_row, make_optimizers, micro_batches, optimizer_step,
                 parse_pipe_arg, predict, prediction_type, prepare_training, progress,
                 response_states, sample_media, save_checkpoint, save_generator, save_judge,
                 seeded_generator, seeded_noise, setup_distributed, shard_model, split_over_ranks,
                 start_log, sum_over_ranks, token_logps, unguided, weights_dtype, write_html)

DEFAULTS = {
    "judge": {
        "model": "out/judge-sft/model", "data": "out/toy/pairs.jsonl",
        "eval_data": "out/toy/pairs_test.jsonl", "out": "out/judge-dpo", "num_samples": 4,
        "lora_rank": 16, "beta": 0.3, "lr": 3e-4, "max_steps": 60, "batch_size": 16},
    "generator": {
        "model": "out/generator-sft/model", "data": "out/toy/prompts.txt",
        "eval_data": "out/toy/prompts_test.txt", "out": "out/generator-dpo", "num_samples": 8,
        "lora_rank": 32, "beta": 50.0, "lr": 1e-3, "max_steps": 200, "batch_size": 32},
}
NUM_PROMPTS = 640                       # the first ones of --data, that candidates are made for
CHUNK = 12                              # prompts whose candidates are in memory


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    # model
    add("--task", choices=["judge", "generator"], default="judge", help="what is trained")
    add("--model", help="folder or hub id to start from  [the model of sft.py in out/]")
    # data
    add("--data", help="JSONL of pairs or preferences (judge), of pairs or prompts (generator)")
    add("--eval-data", help="held-out pairs (judge) or prompts (generator)")
    add("--watch", default="tests/toy_oracle.py:true",
        help="generator: what is measured on its samples, FILE.py:function, clip or none")
    add("--num-samples", type=int,
        help="verdicts a pair  [judge 4], candidates a prompt  [generator 8]")
    add("--temperature", type=float, default=0.7, help="judge: of the sampled verdicts")
    add("--judge", help="who ranks: the reasoning of right verdicts (judge)  [their checkable "
        "faults], candidates (generator)  [the newest judge in out/]")
    # generator
    add("--pipe-args", type=parse_pipe_arg, nargs="*", default=[],
        help="key=value of the pipeline's call, as height=512")
    add("--sigma-mean", type=float, default=1.5, help="noise levels are sigmoid(N(this, 1))")
    # lora
    add("--lora-rank", type=int,
        help="0: the weights themselves are trained  [judge 16, generator 32]")
    add("--lora-alpha", type=float, help="adapters are scaled by alpha / rank  [the rank]")
    add("--targets", help="regex: the linear layers with adapters or, without LoRA, what trains")
    # loss
    add("--beta", type=float, help="strength of the KL constraint  [judge .3, generator 50]")
    # optim
    add("--lr", type=float, help="peak learning rate  [judge 3e-4, generator 1e-3]")
    add("--warmup-steps", type=int, default=5)
    add("--max-steps", type=int, help="optimizer steps  [judge 60, generator 200]")
    add("--batch-size", type=int, help="pairs per rank and micro-step  [judge 16, generator 32]")
    add("--accumulation", type=int, default=1, help="micro-steps per optimizer step")
    # run
    add("--bf16", action=flag, default=has_bf16(), help="compute in bfloat16, train in float32")
    add("--fsdp", action=flag, default=False, help="shard the model across ranks (FSDP2)")
    add("--grad-ckpt", action=flag, default=False, help="activation checkpointing")
    add("--seed", type=int, default=0)
    add("--out", help="run folder  [out/judge-dpo, out/generator-dpo]")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint in --out")
    return finish_args(parser.parse_args(argv), DEFAULTS)


# ------------------------------------------------------------------------------------------------
# The loss of both tasks

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """(losses, chosen rewards, rejected rewards), each (B,), from log-probabilities (B,).

    Eq. 7 of arXiv 2305.18290; a reward is beta times the log-ratio to the reference. A policy that
    equals the reference gives ln 2.
    """
    chosen_rewards = beta * (chosen - ref_chosen)
    rejected_rewards = beta * (rejected - ref_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def loss_stats(losses, chosen_rewards, rejected_rewards):
    """{name: sum over the pairs} of what is logged."""
    margins = chosen_rewards - rejected_rewards
    return {"loss": losses.sum().item(), "rewards/chosen": chosen_rewards.sum().item(),
            "rewards/rejected": rejected_rewards.sum().item(),
            "rewards/margin": margins.sum().item(), "rewards/accuracy": (margins > 0).sum().item()}


def frozen_copy(policy, args, device):
    """The reference where the weights themselves are trained."""
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    for model in reference.values() if isinstance(reference, nn.ModuleDict) else [reference]:
        shard_model(model, args, device)
    return reference


# ------------------------------------------------------------------------------------------------
# The judge: log-probabilities of two responses

def response_logps(model, batch):
    """(2B,) log-probabilities (nats) of the responses, summed over their tokens; the batch is of
    `encode`, chosen responses first. In float64: small differences of sums of thousands count."""
    hidden, labels = response_states(model, batch)
    is_response = labels != -100                                                # (2B, T-1)
    logps = token_logps(model, hidden[is_response], labels[is_response])        # (N,)
    rows = is_response.nonzero()[:, 0]
    sums = torch.zeros(len(labels), dtype=torch.float64, device=logps.device)
    return sums.index_add(0, rows, logps.double())


def main(argv=None):
    args = parse_args(argv)
    device = setup_distributed(args)
    if args.task == "generator":
        return train_generator(args, device)

    # data: preferences, if need be between verdicts of the judge that training starts from
    before = evaluate_folder(args.model, args, device)
    records = load_or_sample(args, "preference", sample_preferences, device)

    # model: without its adapters it is the reference
    judge = load_trained_judge(args, device)
    model = judge.model
    reference = model if args.lora_rank else frozen_copy(model, args, device)
    prepare_training(model, args, device)
    optimizers = make_optimizers(model)
    start = load_checkpoint(args, model, optimizers) if args.resume else 0
    per_step = args.batch_size * args.accumulation * get_world_size()
    start_log(args, model, f"{len(records)} preferences, {per_step} a step")

    for step in progress(start, args):
        indices = batch_indices(len(records), per_step, step, args.seed)
        stats = Counter()
        for part in micro_batches(indices, args.batch_size):
            pairs = [records[i] for i in part]
            responses = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
            batch = encode_responses(judge, pairs + pairs, responses)           # (2B, T)

            with autocast(args, device):
                with torch.no_grad(), disable_lora(model) if args.lora_rank else nullcontext():
                    reference_logps = call_sharded(reference, response_logps, batch)
                logps = call_sharded(model, response_logps, batch)              # (2B,)
            chosen, rejected = logps.chunk(2)
            ref_chosen, ref_rejected = reference_logps.chunk(2)
            losses, chosen_rewards, rejected_rewards = dpo_loss(
                chosen, rejected, ref_chosen, ref_rejected, args.beta)
            loss = losses.sum() / per_step
            loss.backward()
            stats.update(loss_stats(losses, chosen_rewards, rejected_rewards))
        lr = learning_rate(step, args)
        grad_norm = optimizer_step(model, optimizers, lr)

        row = {name: total / per_step for name, total in sum_over_ranks(stats).items()}
        log_row(args, step, {**row, "lr": lr, "grad_norm": grad_norm})
        save_checkpoint(args, step, model, optimizers)

    save_judge(args, judge)
    after = evaluate_folder(Path(args.out, "model"), args, device)
    finish_log(args, {"before": before, "after": after})


# ------------------------------------------------------------------------------------------------
# The generator: log-probabilities of two samples

def add_noise(pipe, x0, args, step, indices):
    """(x, t, target): clean latents x0 (B, ...) at random noise levels, their timesteps (B,), and
    what the denoiser should predict there. Noise and level are functions of (seed, step, index),
    so that winner and loser of a pair have the same."""
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
    alpha = alpha.view(-1, *[1] * (x0.ndim - 1))
    sigma = sigma.view(-1, *[1] * (x0.ndim - 1))
    targets = {"flow": noise - x0, "epsilon": noise, "v_prediction": alpha * noise - sigma * x0}
    return alpha * x0 + sigma * noise, t, targets[kind]


def denoising_logps(pipe, x, t, target, call):
    """(B,) minus half the mean squared denoising error, in float64: with it dpo_loss is Eq. 14 of
    arXiv 2311.12908 as its authors compute it, T omega(lambda_t) and the size folded into beta."""
    error = predict(pipe, x, t, **call).double() - target
    return -error.pow(2).flatten(1).mean(1) / 2


def train_generator(args, device):
    # model: without its adapters it is the reference
    pipe = load_pipeline(args.model, device, weights_dtype(args, device), fsdp=args.fsdp)
    policy = denoisers(pipe)
    check_pipeline(pipe, args)
    call = {**pipe.call_args, **args.pipe_args}
    reference = policy if args.lora_rank else frozen_copy(policy, args, device)
    prepare_training(policy, args, device)
    policy.eval()                       # dropout would set policy and reference apart
    optimizers = make_optimizers(policy)
    media_before, before = evaluate_samples(pipe, args, call)

    # data: pairs, if need be of samples of the generator that training starts from
    records = load_or_sample(args, "pair", sample_best_and_worst, pipe, call)
    pairs = [record for record in records if record["winner"] != "Tie"]
    if not pairs:
        raise ValueError(f"{args.data} holds nothing but ties: nothing is preferred")
    latents = encode_pairs(pipe, pairs, call)                                   # (2, number, ...)
    start = load_checkpoint(args, policy, optimizers) if args.resume else 0
    per_step = args.batch_size * args.accumulation * get_world_size()
    num_ties = len(records) - len(pairs)
    start_log(args, policy, f"{len(pairs)} pairs without {num_ties} ties, {per_step} a step")

    for step in progress(start, args):
        indices = batch_indices(len(pairs), per_step, step, args.seed)
        stats = Counter()
        for part in micro_batches(indices, args.batch_size):
            x0 = latents[:, part].flatten(0, 1)                                 # (2B, ...)
            noised = add_noise(pipe, x0, args, step, part + part)
            x, t, target = [tensor.to(device) for tensor in noised]
            prompts = [pairs[i]["prompt"] for i in part]
            inputs = {**unguided(pipe, call), "prompt": prompts + prompts}

            with autocast(args, device):
                with torch.no_grad(), reference_policy(pipe, reference, args):
                    reference_logps = denoising_logps(pipe, x, t, target, inputs)
                logps = denoising_logps(pipe, x, t, target, inputs)             # (2B,)
            chosen, rejected = logps.chunk(2)
            ref_chosen, ref_rejected = reference_logps.chunk(2)
            losses, chosen_rewards, rejected_rewards = dpo_loss(
                chosen, rejected, ref_chosen, ref_rejected, args.beta)
            loss = losses.sum() / per_step
            loss.backward()
            stats.update(loss_stats(losses, chosen_rewards, rejected_rewards))
            # where both errors rise, those of the reference tell drift from harder noise levels
            for name, values in {"winner": chosen, "winner_ref": ref_chosen,
                                 "loser": rejected, "loser_ref": ref_rejected}.items():
                stats[f"error/{name}"] -= 2 * values.sum().item()
        lr = learning_rate(step, args)
        grad_norm = optimizer_step(policy, optimizers, lr)

        row = {name: total / per_step for name, total in sum_over_ranks(stats).items()}
        log_row(args, step, {**row, "lr": lr, "grad_norm": grad_norm})
        save_checkpoint(args, step, policy, optimizers)

    save_generator(args, pipe, call)
    media, after = evaluate_samples(pipe, args, call)
    prompts = [record["prompt"] for record in read_records(args.eval_data, "prompt")[:32]]
    figures = []
    for prompt, frames_before, frames in zip(prompts, media_before, media):
        figures.append((f"before: {prompt}", frames_before, False))
        figures.append(("after", frames, False))
    write_html(args, "before_after.html", "held-out samples before and after", figures)
    finish_log(args, {"before": before, "after": after})


def check_pipeline(pipe, args):
    """ValueError: a pipeline or options that do not fit the loss."""
    kind = prediction_type(pipe)
    if kind not in ("flow", "epsilon", "v_prediction"):
        raise ValueError(f"{args.model}: its scheduler predicts {kind!r}; expected epsilon, "
                         "v_prediction or a flow")
    if args.fsdp and len(denoisers(pipe)) > 1:
        raise ValueError("--fsdp: ranks at different noise levels would gather the shards of "
                         "different experts. Train without it")


@contextmanager
def reference_policy(pipe, reference, args):
    """The pipeline as before training: its adapters off, or its denoisers the frozen ones."""
    policy = denoisers(pipe)
    vars(pipe).update(reference)
    with disable_lora(policy) if args.lora_rank else nullcontext():
        yield
    vars(pipe).update(policy)


def encode_pairs(pipe, records, call):
    """(2, number of records, ...) clean latents on the CPU, of the winners and of the losers."""
    winners = []
    losers = []
    for record in records:
        name = medium_of(record)
        media = record[name] if WINNERS[record["winner"]] == 1 else record[name][::-1]
        winners.append({**record, name: media[:1]})
        losers.append({**record, name: media[1:]})
    return encode_records(pipe, winners + losers, call).unflatten(0, (2, -1))


# ------------------------------------------------------------------------------------------------
# Sampling what is compared

def load_or_sample(args, kind, sample, *inputs):
    """The records of --data if they are of this kind, else those that sample(args, *inputs) makes
    of them on all ranks, kept in args.out. ValueError: there are none."""
    if kind_of(read_records(args.data)[0]) == kind:
        return read_records(args.data, kind)
    path = Path(args.out, f"{kind}s.jsonl")
    has_checkpoint = any(Path(args.out).glob("step_*"))         # which vouches for the options
    if not (args.resume and has_checkpoint and path.exists()):
        records, counts = sample(args, *inputs)
        if not records:
            raise ValueError(f"{args.data}: of what was sampled nothing is preferred: {counts}")
        if get_rank() == 0:
            print(f"{path}: {counts}", flush=True)
            write_jsonl(path, records)
        gather_list([])                                         # wait until the file is there
    return read_records(path, kind)


def sample_preferences(args, device):
    """(preferences between verdicts of the judge, {case: number}): --num-samples verdicts on each
    pair of --data, ranked by whether they agree with people (data.rank_traces)."""
    torch.manual_seed(args.seed + get_rank())
    judge = LocalJudge(args.model, device=device)
    prefer = load_judge(args.judge, score_template="{prompt}") if args.judge else None
    pairs = read_records(args.data, "pair")[get_rank()::get_world_size()]
    records, counts = build_preferences(judge, pairs, args.num_samples, args.temperature, prefer)
    return gather_list(records), sum_over_ranks(counts)


def sample_best_and_worst(args, pipe, call):
    """(pairs of the best and the worst of --num-samples candidates, {case: number}), for the first
    NUM_PROMPTS prompts of --data. A candidate is a function of (seed, prompt's number, member)."""
    name = str(args.judge or latest_judge())
    judge = load_judge(name)
    is_scored = Path(name, "score_template.txt").exists()
    prompts = read_records(args.data, "prompt")
    indices = range(len(prompts))[:NUM_PROMPTS]
    if get_rank() == 0:
        print(f"{args.num_samples} candidates for each of the first {len(indices)} of "
              f"{len(prompts)} prompts of {args.data}, which {name} ranks", flush=True)

    def sample_and_rank(chunk):
        groups = []
        for i in chunk:
            seeds = [(args.seed, i, member) for member in range(args.num_samples)]
            with autocast(args, pipe.device):
                groups.append(sample_media(pipe, [prompts[i]] * args.num_samples, seeds,
                                           args.batch_size, call))
        return rank_groups(judge, is_scored, prompts, chunk, groups, args.seed)

    cases = []
    size = CHUNK * get_world_size()
    for start in tqdm(range(0, len(indices), size), "candidates", disable=get_rank() > 0):
        cases += split_over_ranks(sample_and_rank, indices[start:start + size])
    counts = dict(Counter(case for case, _ in cases))
    return [record for _, record in cases if record], counts


def rank_groups(judge, is_scored, prompts, indices, groups, seed):
    """[(case, pair record or None), ...]: the best and the worst of each group, in random order.

    A judge that compares: by win rates, each candidate meeting its next two on a ring. One that
    also scores: by G / 2 comparisons and G scores (Sec. 3 of arXiv 2503.05236), see best_of_n.
    """
    schedule = []
    questions = []
    candidates = []
    for i, group in zip(indices, groups):
        rng = random.Random(f"{seed} {i}")
        pairs = sample_pairs(len(group), f"ring:{min(2, len(group) // 2)}", rng)
        if is_scored:
            pairs = [rng.sample((k, k + 1), 2) for k in range(0, len(group) - 1, 2)]
        prompt = prompts[i]["prompt"]
        media = [load_media(frames) for frames in group]
        schedule.append(pairs)
        questions += [Comparison(prompt, media[first], media[second]) for first, second in pairs]
        candidates += [Candidate(prompt, frames) for frames in media]
    texts = judge(questions)
    if all(isinstance(text, Failure) for text in texts):
        raise ValueError(f"the judge answers none of {len(texts)} questions: {texts[0]}")
    verdicts = iter([parse_verdict(text) for text in texts])
    scores = iter([parse_score(text).value for text in judge(candidates)] if is_scored else [])
    cases = []
    for i, group, pairs in zip(indices, groups, schedule):
        group_verdicts = list(islice(verdicts, len(pairs)))
        group_scores = list(islice(scores, len(group))) if is_scored else None
        cases.append(pair_of(prompts[i], group, pairs, group_verdicts, group_scores,
                             random.Random(f"{seed} {i} order")))
    return cases


if __name__ == "__main__":
    main()
