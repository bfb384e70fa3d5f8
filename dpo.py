"""Stage 2, preference: direct preference optimisation of a judge on pairs of its own verdict traces
(Sec. 3.2 of arXiv 2602.02380), or of a generator on pairs of media (arXiv 2311.12908).

    python dpo.py                           the toy judge that sft.py made
    python dpo.py --task generator          the toy generator, on pairs of its own samples
    torchrun --nproc_per_node=8 dpo.py --model ...      real models: README.md has the commands

Given people's choices, the judge writes several verdicts on each pair of images, and a right one is
chosen over a wrong one. Given prompts, a judge finds the best and the worst of several candidates.
Shapes: B pairs, T tokens, N response tokens, G candidates of a prompt; (...) latents."""
import math, random
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from data import (WINNERS, as_question, batch_indices, encode_records, kind_of, medium_of, predict,
                  read_records, sample_media, swap_at_random, unguided, write_jsonl)
from reward import (FORBIDDEN, Candidate, Failure, ask, compare_groups, judge_options, load_judge,
                    load_media, parse_score, parse_verdict, sample_pairs, win_rates)
from sft import (add_noise, autocast, call_sharded, disable_lora, dry_run, encode_responses,
                 evaluate_folder, evaluate_samples, finish_log, gather_list, get_rank,
                 get_world_size, load_checkpoint, load_generator, load_trained_judge, log_and_save,
                 make_optimizers, micro_batches, optimizer_step, prefetch, prepare_training,
                 progress, response_token_logps, save_generator, save_judge, setup_distributed,
                 split_over_ranks, stage_parser, start_log, sum_over_ranks)

DEFAULTS = {
    "judge": {
        "model": "out/judge-sft/model", "data": "out/toy/pairs.jsonl", "out": "out/judge-dpo",
        "eval_data": "out/toy/pairs_test.jsonl", "num_samples": 4, "lora_rank": 16, "beta": 0.3,
        "lr": 3e-4, "warmup_steps": 5, "max_steps": 60, "batch_size": 16},
    "generator": {
        "model": "out/generator-sft/model", "data": "out/toy/prompts.txt",
        "out": "out/generator-dpo", "eval_data": "out/toy/prompts_test.txt", "num_samples": 8,
        "judge": "out/judge-dpo/model", "lora_rank": 32, "beta": 50.0, "lr": 1e-3,
        "warmup_steps": 5, "max_steps": 200, "batch_size": 32}}
NUM_PROMPTS = 640                       # the first ones of --data, that candidates are made for
CHUNK = 12                              # prompts whose candidates are in memory

def parse_args(argv=None):
    parser = stage_parser(__doc__, add_help=False)      # what all stages share
    add = parser.add_argument
    add("--task", choices=["judge", "generator"], default="judge", help="what is trained")
    add("--num-samples", type=int, help="verdicts or candidates of each record  [%(default)s]")
    add("--sampler", help="judge: who writes the verdicts  [the model itself]")
    add("--temperature", type=float, default=0.7, help="judge: of the sampler")
    add("--judge", help="generator: who ranks the candidates  [out/judge-dpo/model]")
    add("--sigma-mean", type=float, default=1.5, help="noise levels are sigmoid(N(this, 1))")
    add("--beta", type=float, help="strength of the KL constraint  [%(default)s]")
    add("--accumulation", type=int, default=1, help="micro-steps per optimizer step")
    parser.set_defaults(**DEFAULTS[parser.parse_known_args(argv)[0].task])
    add("-h", "--help", action="help")  # now, as it prints the defaults
    args = parser.parse_args(argv)
    if args.lora_rank < 1:
        parser.error("the reference is the model without adapters: pass --lora-rank 1 or more")
    return args

# ---------- The loss of both tasks
def dpo_loss(logps, reference_logps, beta):
    """(losses (B,), {name: sum over the pairs}) of log-probabilities (2B,), of the chosen first.
    Eq. 7 of arXiv 2305.18290: a reward is beta times the log-ratio to the reference."""
    chosen, rejected = (beta * (logps - reference_logps)).chunk(2)              # rewards
    losses = -F.logsigmoid(chosen - rejected)
    stats = {"loss": losses, "rewards/chosen": chosen, "rewards/rejected": rejected,
             "rewards/margin": chosen - rejected, "rewards/accuracy": chosen > rejected}
    return losses, {name: values.sum().item() for name, values in stats.items()}

# ---------- The judge: log-probabilities of two responses
def response_logps(model, batch):
    """(2B,) log-probabilities (nats) of the responses, summed over their tokens; the batch is of
    `encode`, chosen responses first. In float64: small differences of sums of thousands count."""
    logps, rows = response_token_logps(model, batch)                            # N tokens
    sums = torch.zeros(len(batch["labels"]), dtype=torch.float64, device=logps.device)
    return sums.index_add(0, rows, logps.double())

def main(argv=None):
    args = parse_args(argv)
    device = setup_distributed(args)
    if args.task == "generator":
        return train_generator(args, device)

    # data: preferences, if need be between verdicts of the judge that training starts from
    before = evaluate_folder(args.model, args, device)
    records = load_or_sample(args, "preference", sample_preferences)

    # model: without its adapters it is the reference
    judge = load_trained_judge(args, device)
    model = judge.model
    prepare_training(model, args, device)
    optimizers = make_optimizers(model)
    start = load_checkpoint(args, model, optimizers)
    per_step = args.batch_size * args.accumulation * get_world_size()
    start_log(args, model, f"{len(records)} preferences, {per_step} a step")

    def encode_preferences(pairs):
        responses = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
        return encode_responses(judge, pairs + pairs, responses)                # (2B, T)
    encoded = prefetch(encode_preferences, records, per_step, start, args)

    for step in progress(start, args):
        stats = Counter()
        for batch in next(encoded):
            with autocast(args, device):
                with torch.no_grad(), disable_lora():
                    reference_logps = call_sharded(model, response_logps, batch)
                logps = call_sharded(model, response_logps, batch)              # (2B,)
            losses, sums = dpo_loss(logps, reference_logps, args.beta)
            loss = losses.sum() / per_step
            loss.backward()
            stats.update(sums)
        row = optimizer_step(model, optimizers, step, args)
        row |= {name: total / per_step for name, total in sum_over_ranks(stats).items()}
        log_and_save(args, step, row, model, optimizers)

    save_judge(args, judge)
    after = evaluate_folder(Path(args.out, "model"), args, device)
    finish_log(args, {"before": before, "after": after}, f"python grpo.py --judge {args.out}/model")

# ---------- The generator: log-probabilities of two samples
def denoising_logps(pipe, x, t, target, call):
    """(B,) minus half the mean squared denoising error, in float64: with it dpo_loss is Eq. 14 of
    arXiv 2311.12908 as its authors compute it, T omega(lambda_t) and the size folded into beta."""
    error = predict(pipe, x, t, **call).double() - target
    return -error.pow(2).flatten(1).mean(1) / 2

def train_generator(args, device):
    # model: without its adapters it is the reference
    pipe, policy, call = load_generator(args, device)
    prepare_training(policy, args, device)
    policy.eval()                       # dropout would set policy and reference apart
    optimizers = make_optimizers(policy)
    dry_run(pipe, read_records(args.data), args, call)
    media_before, before = evaluate_samples(pipe, args, call)

    # data: pairs, if need be of samples of the generator that training starts from
    records = load_or_sample(args, "pair", sample_best_and_worst, pipe, call)
    pairs = [record for record in records if record["winner"] != "Tie"]
    if not pairs:
        raise ValueError(f"{args.data} holds nothing but ties: nothing is preferred")
    latents = encode_pairs(pipe, pairs, call)                                   # (2, number, ...)
    start = load_checkpoint(args, policy, optimizers)
    per_step = args.batch_size * args.accumulation * get_world_size()
    start_log(args, policy, f"{len(pairs)} pairs of {len(records)} are no ties, {per_step} a step")

    for step in progress(start, args):
        indices = batch_indices(len(pairs), per_step, step, args.seed)
        stats = Counter()
        for part in micro_batches(indices, args.batch_size):
            x0 = latents[:, part].flatten(0, 1).to(device)                      # (2B, ...)
            x, t, target = add_noise(pipe, x0, args, step, part + part)
            prompts = [pairs[i]["prompt"] for i in part]
            inputs = {**unguided(pipe, call), "prompt": prompts + prompts}
            with autocast(args, device):
                with torch.no_grad(), disable_lora():
                    reference_logps = denoising_logps(pipe, x, t, target, inputs)
                logps = denoising_logps(pipe, x, t, target, inputs)             # (2B,)
            losses, sums = dpo_loss(logps, reference_logps, args.beta)
            loss = losses.sum() / per_step
            loss.backward()
            stats.update(sums)
        row = optimizer_step(policy, optimizers, step, args)
        row |= {name: total / per_step for name, total in sum_over_ranks(stats).items()}
        log_and_save(args, step, row, policy, optimizers)

    save_generator(args, pipe, call)
    after = evaluate_samples(pipe, args, call, media_before)[1]
    finish_log(args, {"before": before, "after": after}, f"python grpo.py --model {args.out}/model")

def encode_pairs(pipe, records, call):
    """(2, number of records, ...) clean latents on the CPU, of the chosen and of the rejected."""
    media = []
    for winner in (1, 2):                                       # the chosen, then the rejected
        for record in records:
            name = medium_of(record)
            place = 0 if WINNERS[record["winner"]] == winner else 1
            media.append({**record, name: [record[name][place]]})
    return torch.stack(encode_records(pipe, media, call)).unflatten(0, (2, -1))

# ---------- Sampling what is compared
def load_or_sample(args, kind, sample, *inputs):
    """The records of --data if of this kind, else of sample(args, *inputs), [(case, record)]."""
    if kind_of(read_records(args.data)[0]) == kind:
        return read_records(args.data, kind)
    path = Path(args.out, f"{kind}s.jsonl")
    if not (args.resume and path.exists() and any(Path(args.out).glob("step_*"))):
        cases = sample(args, *inputs)   # anew, as only checkpoints vouch for the options
        counts = dict(Counter(case for case, _ in cases))
        records = [record for _, record in cases if record]
        if not records:
            raise ValueError(f"{args.data}: of what was sampled nothing is preferred: {counts}")
        if get_rank() == 0:
            print(f"{path}: {len(records)} {kind}s. {counts}", flush=True)
            write_jsonl(path, records)
        gather_list([])                                         # wait until the file is there
    return read_records(path, kind)

def sample_preferences(args):
    """[(case, preference or None), ...] between --num-samples verdicts on each pair of --data."""
    torch.manual_seed(args.seed + get_rank())
    judge = load_judge(args.sampler or args.model, **judge_options(args))
    sample = partial(judge, temperature=args.temperature)
    rng = random.Random(args.seed)          # in files the winner may always come first
    records = read_records(args.data, "pair")
    pairs = [swap_at_random(pair, rng) for pair in records if pair["winner"] != "Tie"]
    cases = [("dropped: a tie", None)] * (0 if get_rank() else len(records) - len(pairs))
    pairs = pairs[get_rank()::get_world_size()]
    for start in tqdm(range(0, len(pairs), 128), "verdicts", disable=get_rank() > 0):
        cases += rank_pairs(sample, pairs[start:start + 128], args.num_samples)
    return gather_list(cases)

def rank_traces(traces, winner):
    """(case, best, worst) of one pair's traces, where `winner` is people's choice, or None, None.
    Sec. 3.2 of arXiv 2602.02380: right over wrong; all right: the better reasoning, here what has
    fewer faults, as scores that do not sum to ten; all wrong: dropped."""
    if not traces:
        return "failure", None, None
    verdicts = [parse_verdict(trace) for trace in traces]
    faults = [(verdict.winner != winner, len(verdict.issues)) for verdict in verdicts]
    best = min(faults)                                          # (is it wrong, number of faults)
    worst = max(faults)
    if best[0]:
        return "all wrong", None, None
    case = "mixed" if worst[0] else "all right"
    if best == worst:
        return case, None, None
    return case, traces[faults.index(best)], traces[faults.index(worst)]

def rank_pairs(sample, pairs, num_traces):
    """[(case, preference or None), ...] of pairs, from `num_traces` traces of each."""
    texts = iter(ask(sample, sum(([as_question(pair)] * num_traces for pair in pairs), [])))
    results = []
    for pair in pairs:
        traces = [text for text in islice(texts, num_traces) if not isinstance(text, Failure)
                  and text.strip() and not FORBIDDEN.search(text)]
        case, best, worst = rank_traces(traces, WINNERS[pair["winner"]])
        record = {**pair, "chosen": best, "rejected": worst}
        results.append((case, record) if best else (f"dropped: {case}", None))
    return results

def sample_best_and_worst(args, pipe, call):
    """[(case, pair or None), ...] of --num-samples candidates for the first NUM_PROMPTS prompts."""
    judge = load_judge(args.judge, **judge_options(args))
    prompts = read_records(args.data, "prompt")
    indices = range(len(prompts))[:NUM_PROMPTS]

    def sample_and_rank(chunk):
        groups = {}
        for i in chunk:
            seeds = [(args.seed, i, member) for member in range(args.num_samples)]
            with autocast(args, pipe.device):
                groups[i] = sample_media(pipe, [prompts[i]] * args.num_samples, seeds,
                                         args.batch_size, call)
        return rank_groups(judge, args, prompts, groups)
    cases = []
    size = CHUNK * get_world_size()
    for start in tqdm(range(0, len(indices), size), "candidates", disable=get_rank() > 0):
        found = split_over_ranks(sample_and_rank, indices[start:start + size])
        cases += [(case, pair if get_rank() == 0 else bool(pair)) for case, pair in found]
    return cases

def rank_groups(judge, args, prompts, groups):
    """[(case, pair record or None), ...] of groups {prompt's number: candidates}, each compared
    with its next two on a ring; by a judge that scores too, in G / 2 comparisons and by G scores
    (Sec. 3 of arXiv 2503.05236), see best_of_n."""
    is_scored = Path(args.judge, "score_template.txt").exists()
    schedule = []
    entries = []
    for i, group in groups.items():
        rng = random.Random(f"{args.seed} {i}")
        pairs = sample_pairs(len(group), f"ring:{min(2, len(group) // 2)}", rng)
        if is_scored:
            pairs = [rng.sample((k, k + 1), 2) for k in range(0, len(group) - 1, 2)]
        schedule.append(pairs)
        entries.append((prompts[i]["prompt"], [load_media(frames) for frames in group], []))
    verdicts = compare_groups(partial(ask, judge), entries, schedule)
    candidates = [Candidate(prompt, frames) for prompt, media, _ in entries for frames in media]
    texts = judge(candidates) if is_scored else []
    cases = []
    for k, (i, group) in enumerate(groups.items()):
        scores = [parse_score(texts.pop(0)) for _ in group] if is_scored else None
        rng = random.Random(f"{args.seed} {i} order")
        cases.append(pair_of(prompts[i], group, schedule[k], verdicts[k], scores, rng))
    return cases

def best_of_n(pairs, verdicts, scores, num):
    """(best, worst) of `num` candidates, None where they are equal: the highest score of those who
    won a comparison, the lowest of those who lost one; without scores the win rates decide."""
    if scores is None:
        rates = win_rates(pairs, verdicts, num)
        values = list(zip(rates.overall.tolist(), rates.category.nan_to_num().tolist()))
        winners = losers = [i for i in range(num) if not math.isnan(values[i][0])]
    else:
        values = [(score,) for score in scores]
        won = [p if v.winner == 1 else p[::-1] for p, v in zip(pairs, verdicts) if v.winner]
        winners = [first for first, _ in won if scores[first] is not None]
        losers = [second for _, second in won if scores[second] is not None]
    if not winners or not losers:
        return None
    best = max(winners, key=values.__getitem__)
    worst = min(losers, key=values.__getitem__)
    return (best, worst) if values[best][0] > values[worst][0] else None

def pair_of(record, candidates, pairs, verdicts, scores, rng):
    """("kept", pair record) of the best and the worst candidate, or ("dropped: ...", None)."""
    if any(isinstance(verdict.text, Failure) for verdict in verdicts):
        return "dropped: a comparison failed", None
    order = best_of_n(pairs, verdicts, scores, len(candidates))
    if order is None or candidates[order[0]] == candidates[order[1]]:
        return "dropped: equal or undecided", None
    chosen, rejected = [candidates[i] for i in order]
    media = {"images": [*chosen, *rejected], "winner": "Image 1"}
    if len(chosen) > 1:
        media = {"videos": [chosen, rejected], "winner": "Video 1"}
    return "kept", swap_at_random({**record, **media}, rng)

if __name__ == "__main__":
    main()
