"""Stage 2, preference: direct preference optimisation of a judge on pairs of its own verdict traces
(Sec. 3.2 of arXiv 2602.02380), or of a generator on pairs of images or videos.

    python dpo.py                           the toy judge that sft.py made
    python dpo.py --task generator          the toy generator, on pairs of its own samples
    torchrun --nproc_per_node=8 dpo.py --model out/judge-sft/model --data pairs.jsonl \\
        --eval-data held_out.jsonl --lora-rank 64 --lr 2e-5 --batch-size 1 --accumulation 4

A judge learns from preferences between two verdicts, {"chosen", "rejected"}. Given people's choices
between two images, it writes several verdicts on each pair, and a right one is chosen over a wrong
one; given questions, it writes several answers, which another judge ranks. A generator learns from
people's choices (Diffusion-DPO, arXiv 2311.12908); given prompts, it makes several candidates for
each, of which a judge finds the best and the worst.
Compare with sft.py: only the data, the reference and the loss differ.

Shapes: B pairs, T tokens, N response tokens, G candidates of a prompt; (...) latents.
"""
import argparse, json, math, random, re
from collections import Counter
from functools import partial
from itertools import islice, permutations
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from data import (WINNERS, as_question, batch_indices, denoisers, encode_records, kind_of,
                  load_pipeline, medium_of, open_media, predict, read_records, sample_media,
                  swap_at_random, unguided, write_jsonl)
from reward import (Candidate, Comparison, Failure, load_judge, load_media, parse_score,
                    parse_verdict, sample_pairs, win_rates)
# the toolbox lies at the end of sft.py, the driver of pipelines in data.py
from sft import (add_noise, autocast, call_sharded, disable_lora, encode_responses,
                 evaluate_folder, evaluate_samples, finish_log, gather_list, get_rank,
                 get_world_size, has_bf16, learning_rate, load_checkpoint, load_trained_judge,
                 log_row, make_optimizers, micro_batches, optimizer_step, prepare_training,
                 progress, response_states, save_checkpoint, save_generator, save_judge,
                 setup_distributed, split_over_ranks, start_log, sum_over_ranks, token_logps,
                 weights_dtype)

DEFAULTS = {
    "judge": {
        "model": "out/judge-sft/model", "data": "out/toy/pairs.jsonl", "out": "out/judge-dpo",
        "eval_data": "out/toy/pairs_test.jsonl", "num_samples": 4, "lora_rank": 16, "beta": 0.3,
        "lr": 3e-4, "max_steps": 60, "batch_size": 16},
    "generator": {
        "model": "out/generator-sft/model", "data": "out/toy/prompts.txt",
        "out": "out/generator-dpo", "eval_data": "out/toy/prompts_test.txt", "num_samples": 8,
        "judge": "out/judge-dpo/model", "lora_rank": 32, "beta": 50.0, "lr": 1e-3,
        "max_steps": 200, "batch_size": 32}}
NUM_PROMPTS = 640                       # the first ones of --data, that candidates are made for
CHUNK = 12                              # prompts whose candidates are in memory

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--task", choices=["judge", "generator"], default="judge", help="what is trained")
    add("--model", help="folder or hub id to start from  [the model of sft.py in out/]")
    add("--data", help="preferences, pairs or questions (judge), pairs or prompts (generator)")
    add("--eval-data", help="held-out pairs (judge) or prompts (generator)")
    add("--watch", default="tests/toy_oracle.py:true", help="measures held-out samples, or none")
    add("--num-samples", type=int, help="verdicts, answers [4] or candidates [8] of each record")
    add("--sampler", help="judge: who writes verdicts and answers  [the model itself]")
    add("--temperature", type=float, default=0.7, help="judge: of the sampler")
    add("--judge", help="who ranks them  [verdicts: checkable faults, else out/judge-dpo/model]")
    add("--pipe-args", type=json.loads, default={}, help='of its call, as {"height": 512}')
    add("--sigma-mean", type=float, default=1.5, help="noise levels are sigmoid(N(this, 1))")
    add("--lora-rank", type=int, help="without adapters it is the reference  [judge 16, gen. 32]")
    add("--targets", help="regex: the linear layers with adapters  [all in the blocks]")
    add("--beta", type=float, help="strength of the KL constraint  [judge .3, generator 50]")
    add("--lr", type=float, help="peak learning rate  [judge 3e-4, generator 1e-3]")
    add("--warmup-steps", type=int, default=5)
    add("--max-steps", type=int, help="optimizer steps  [judge 60, generator 200]")
    add("--batch-size", type=int, help="pairs per rank and micro-step  [judge 16, generator 32]")
    add("--accumulation", type=int, default=1, help="micro-steps per optimizer step")
    add("--bf16", action=flag, default=has_bf16(), help="compute in bfloat16, train in float32")
    add("--fsdp", action=flag, default=False, help="shard the model across ranks (FSDP2)")
    add("--grad-ckpt", action=flag, default=False, help="activation checkpointing")
    add("--seed", type=int, default=0)
    add("--out", help="run folder  [out/judge-dpo, out/generator-dpo]")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint in --out")
    parser.set_defaults(**DEFAULTS[parser.parse_known_args(argv)[0].task])
    args = parser.parse_args(argv)
    if args.lora_rank < 1:
        parser.error("the reference is the model without adapters: pass --lora-rank 1 or more")
    return args

# ---------- The loss of both tasks
def dpo_loss(logps, reference_logps, beta):
    """(losses (B,), {name: sum over the pairs} for the log) from log-probabilities (2B,), those of
    the chosen first. Eq. 7 of arXiv 2305.18290; a reward is beta times the log-ratio to the
    reference. A policy that equals the reference gives ln 2."""
    chosen, rejected = (beta * (logps - reference_logps)).chunk(2)              # rewards
    losses = -F.logsigmoid(chosen - rejected)
    stats = {"loss": losses, "rewards/chosen": chosen, "rewards/rejected": rejected,
             "rewards/margin": chosen - rejected, "rewards/accuracy": chosen > rejected}
    return losses, {name: values.sum().item() for name, values in stats.items()}

# ---------- The judge: log-probabilities of two responses
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
    records = load_or_sample(args, "preference", sample_preferences)

    # model: without its adapters it is the reference
    judge = load_trained_judge(args, device)
    model = judge.model
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
                with torch.no_grad(), disable_lora(model):
                    reference_logps = call_sharded(model, response_logps, batch)
                logps = call_sharded(model, response_logps, batch)              # (2B,)
            losses, sums = dpo_loss(logps, reference_logps, args.beta)
            loss = losses.sum() / per_step
            loss.backward()
            stats.update(sums)
        lr = learning_rate(step, args)
        grad_norm = optimizer_step(model, optimizers, lr)

        row = {name: total / per_step for name, total in sum_over_ranks(stats).items()}
        log_row(args, step, {**row, "lr": lr, "grad_norm": grad_norm})
        save_checkpoint(args, step, model, optimizers)

    save_judge(args, judge)
    after = evaluate_folder(Path(args.out, "model"), args, device)
    finish_log(args, {"before": before, "after": after})

# ---------- The generator: log-probabilities of two samples
def denoising_logps(pipe, x, t, target, call):
    """(B,) minus half the mean squared denoising error, in float64: with it dpo_loss is Eq. 14 of
    arXiv 2311.12908 as its authors compute it, T omega(lambda_t) and the size folded into beta."""
    error = predict(pipe, x, t, **call).double() - target
    return -error.pow(2).flatten(1).mean(1) / 2

def train_generator(args, device):
    # model: without its adapters it is the reference
    pipe = load_pipeline(args.model, device, weights_dtype(args, device), fsdp=args.fsdp)
    policy = denoisers(pipe)
    call = {**pipe.call_args, **args.pipe_args}
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
            x0 = latents[:, part].flatten(0, 1).to(device)                      # (2B, ...)
            x, t, target = add_noise(pipe, x0, args, step, part + part)
            prompts = [pairs[i]["prompt"] for i in part]
            inputs = {**unguided(pipe, call), "prompt": prompts + prompts}

            with autocast(args, device):
                with torch.no_grad(), disable_lora(policy):
                    reference_logps = denoising_logps(pipe, x, t, target, inputs)
                logps = denoising_logps(pipe, x, t, target, inputs)             # (2B,)
            losses, sums = dpo_loss(logps, reference_logps, args.beta)
            loss = losses.sum() / per_step
            loss.backward()
            stats.update(sums)
            # where both errors rise, those of the reference tell drift from harder noise levels
            for name, values in {"error": logps, "error_ref": reference_logps}.items():
                chosen, rejected = values.detach().chunk(2)
                stats.update({f"{name}/chosen": -2 * chosen.sum().item(),
                              f"{name}/rejected": -2 * rejected.sum().item()})
        lr = learning_rate(step, args)
        grad_norm = optimizer_step(policy, optimizers, lr)

        row = {name: total / per_step for name, total in sum_over_ranks(stats).items()}
        log_row(args, step, {**row, "lr": lr, "grad_norm": grad_norm})
        save_checkpoint(args, step, policy, optimizers)

    save_generator(args, pipe, call)
    after = evaluate_samples(pipe, args, call, media_before)[1]
    finish_log(args, {"before": before, "after": after})

def encode_pairs(pipe, records, call):
    """(2, number of records, ...) clean latents on the CPU, of the chosen and of the rejected."""
    media = {"chosen": [], "rejected": []}
    for record in records:
        name = medium_of(record)
        first, second = record[name]
        chosen, rejected = (first, second) if WINNERS[record["winner"]] == 1 else (second, first)
        media["chosen"].append({**record, name: [chosen]})
        media["rejected"].append({**record, name: [rejected]})
    return encode_records(pipe, media["chosen"] + media["rejected"], call).unflatten(0, (2, -1))

# ---------- Sampling what is compared
def load_or_sample(args, kind, sample, *inputs):
    """The records of --data if they are of this kind, else those that sample(args, *inputs) ->
    [(case, record or None), ...] makes of them, kept in args.out. ValueError: there are none."""
    if kind_of(read_records(args.data)[0]) == kind:
        return read_records(args.data, kind)
    path = Path(args.out, f"{kind}s.jsonl")
    checkpoints = Path(args.out).glob("step_*")                 # they vouch for the options
    if not (args.resume and path.exists() and any(checkpoints)):
        cases = sample(args, *inputs)
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
    """[(case, preference or None), ...] between --num-samples verdicts on each pair of --data,
    ranked by whether they agree with people, or answers to each question, ranked by a judge."""
    torch.manual_seed(args.seed + get_rank())
    sample = partial(load_judge(args.sampler or args.model, score_template="{prompt}"),
                     temperature=args.temperature)
    is_question = kind_of(read_records(args.data)[0]) == "question"
    records = read_records(args.data, "question" if is_question else "pair")
    name = args.judge or ("out/judge-dpo/model" if is_question else None)
    judge = load_judge(name, score_template="{prompt}") if name else None
    records = [r for r in records if r.get("winner") != "Tie"][get_rank()::get_world_size()]
    cases = []
    for start in tqdm(range(0, len(records), 128), "verdicts", disable=get_rank() > 0):
        chunk = records[start:start + 128]
        if is_question:
            questions = [as_question(record) for record in chunk]
            texts = sample_texts(sample, questions, args.num_samples)
            cases += rank_texts(judge, chunk, texts)
        else:
            cases += rank_pairs(sample, chunk, args.num_samples, judge)
    return gather_list(cases)

def sample_texts(sample, questions, num):
    """[`num` texts, ...], one list for each question. ValueError: none is answered."""
    texts = sample([question for question in questions for _ in range(num)])
    if texts and all(isinstance(text, Failure) for text in texts):
        raise ValueError(f"none of {len(texts)} questions is answered: {texts[0]}")
    return [texts[start:start + num] for start in range(0, len(texts), num)]

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
    best = min(faults)                                          # (is it wrong, number of faults)
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
    groups = sample_texts(sample, [as_question(pair) for pair in pairs], num_traces)
    results = []
    rivals = {}                                                 # {pair's number: two right traces}
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

COMPARE_TEXTS = """\
Two answers to one task about the images above follow. Decide which is better: it is right, what \
it says can be seen in the images, its scores and winners follow from its reasons, and it answers \
what was asked, completely and clearly.
Task: {task}
Answer 1: {first}
Answer 2: {second}
Answer with one JSON object and nothing else: {"reason": "what decides, in one or two sentences", \
"winner": "Answer 1 or Answer 2"}"""

def rank_texts(judge, records, candidates):
    """[(case, preference or None), ...] of N texts about each record, verdicts or answers to its
    instruction: the best and the worst by win rates. All are compared in both orders, so that a
    judge which goes by the position finds them equal. judge(questions) -> texts; its score_template
    is "{prompt}"."""
    questions = []
    for record, texts in zip(records, candidates):
        task = f"Which of two candidates serves this prompt better? {record.get('prompt')}"
        fields = {"task": record.get("instruction", task)}
        images = sum(open_media(record), [])
        for fields["first"], fields["second"] in permutations(texts, 2):
            prompt = re.sub(r"\{(\w+)\}", lambda name: fields[name[1]], COMPARE_TEXTS)
            questions.append(Candidate(prompt, images))
    verdicts = iter([parse_verdict(text) for [text] in sample_texts(judge, questions, 1)])
    results = []
    for record, texts in zip(records, candidates):
        pairs = list(permutations(range(len(texts)), 2))
        results.append(pair_of(record, texts, pairs, list(islice(verdicts, len(pairs)))))
    return results

def sample_best_and_worst(args, pipe, call):
    """[(case, pair or None), ...] of the best and the worst of --num-samples candidates for each of
    the first NUM_PROMPTS prompts of --data, functions of (seed, prompt's number, member)."""
    judge = load_judge(args.judge)
    prompts = read_records(args.data, "prompt")
    indices = range(len(prompts))[:NUM_PROMPTS]
    if get_rank() == 0:
        print(f"{args.num_samples} candidates for each of the first {len(indices)} of "
              f"{len(prompts)} prompts, which {args.judge} ranks", flush=True)
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
        cases += split_over_ranks(sample_and_rank, indices[start:start + size])
    return cases

def rank_groups(judge, args, prompts, groups):
    """[(case, pair record or None), ...] of groups {prompt's number: candidates}: the best and the
    worst of each by win rates, each candidate meeting its next two on a ring. With a judge that
    also scores, by G / 2 comparisons and G scores (Sec. 3 of arXiv 2503.05236), see best_of_n."""
    is_scored = Path(args.judge, "score_template.txt").exists()
    schedule = []
    questions = []
    candidates = []
    for i, group in groups.items():
        rng = random.Random(f"{args.seed} {i}")
        pairs = sample_pairs(len(group), f"ring:{min(2, len(group) // 2)}", rng)
        if is_scored:
            pairs = [rng.sample((k, k + 1), 2) for k in range(0, len(group) - 1, 2)]
        prompt = prompts[i]["prompt"]
        media = [load_media(frames) for frames in group]
        schedule.append(pairs)
        questions += [Comparison(prompt, media[first], media[second]) for first, second in pairs]
        candidates += [Candidate(prompt, frames) for frames in media]
    verdicts = iter([parse_verdict(text) for [text] in sample_texts(judge, questions, 1)])
    scores = iter([parse_score(text) for text in judge(candidates)] if is_scored else [])
    cases = []
    for (i, group), pairs in zip(groups.items(), schedule):
        group_verdicts = list(islice(verdicts, len(pairs)))
        group_scores = list(islice(scores, len(group))) if is_scored else None
        rng = random.Random(f"{args.seed} {i} order")
        cases.append(pair_of(prompts[i], group, pairs, group_verdicts, group_scores, rng))
    return cases

def best_of_n(pairs, verdicts, scores, num):
    """(best, worst) of `num` candidates, None where they cannot be told apart: of those who won a
    comparison the one with the highest score, of those who lost one the one with the lowest; where
    scores is None the highest and the lowest win rate, of equals the category rates decide."""
    if scores is None:
        rates = win_rates(pairs, verdicts, num)
        values = list(zip(rates.overall.tolist(), rates.category.nan_to_num().tolist()))
        winners = losers = [i for i in range(num) if not math.isnan(values[i][0])]
    else:
        values = [(score,) for score in scores]
        decided = [(pair, v.winner) for pair, v in zip(pairs, verdicts) if v.winner]
        winners = [pair[winner - 1] for pair, winner in decided]
        losers = [pair[2 - winner] for pair, winner in decided]
        winners = [i for i in winners if scores[i] is not None]
        losers = [i for i in losers if scores[i] is not None]
    if not winners or not losers:
        return None
    best = max(winners, key=values.__getitem__)
    worst = min(losers, key=values.__getitem__)
    return (best, worst) if values[best][0] > values[worst][0] else None

def pair_of(record, candidates, pairs, verdicts, scores=None, rng=random):
    """("kept", training record) of N candidates for a record, else ("dropped: ...", None): the best
    and the worst text as chosen and rejected, or list of frames as a pair in a random order."""
    if any(isinstance(candidate, Failure) for candidate in candidates):
        return "dropped: failure", None
    order = best_of_n(pairs, verdicts, scores, len(candidates))
    if order is None or candidates[order[0]] == candidates[order[1]]:
        return "dropped: equal or undecided", None
    chosen, rejected = [candidates[i] for i in order]
    if isinstance(chosen, str):
        return "kept", {**record, "chosen": chosen, "rejected": rejected}
    media = {"images": [*chosen, *rejected], "winner": "Image 1"}
    if len(chosen) > 1:
        media = {"videos": [chosen, rejected], "winner": "Video 1"}
    return "kept", swap_at_random({**record, **media}, rng)

if __name__ == "__main__":
    main()
