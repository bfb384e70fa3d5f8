"""Stage 3, reward: Pref-GRPO of a flow-matching generator. The judge compares the samples of a
prompt in pairs, win rates become advantages (Sec. 3.3 of arXiv 2602.02380), and the probability of
the sampler's stochastic steps moves with them (Flow-GRPO, arXiv 2505.05470).

    python grpo.py                          the toy generator, rewarded by the toy judge
    torchrun --nproc_per_node=8 grpo.py --model black-forest-labs/FLUX.1-dev --data prompts.txt \\
        --eval-data held_out.txt --watch none --judge http://localhost:8000 --num-prompts 48 \\
        --batch-size 8 --lora-rank 64 --lr 3e-5 --bf16 --pipe-args '{"height": 512, "width": 512}'

Ranks share the prompts of a step; the samples of one prompt, a group, lie on one rank.

Shapes: G samples of a prompt, B samples of a pipeline call and micro-step, S sampling steps, the
first K of them stochastic, (...) one sample's latents.
"""
import argparse, itertools, json, queue, random, re, threading, time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from data import (batch_indices, denoisers, frames_of, load_pipeline, predict, prediction_type,
                  read_records, run_pipeline, seeded_generator, seeded_noise, source_images)
from reward import (Comparison, Failure, group_advantages, load_judge, load_media, normalize,
                    parse_verdict, sample_pairs, win_rates)
# the toolbox lies at the end of sft.py, the driver of pipelines in data.py
from sft import (autocast, disable_lora, evaluate_samples, finish_log, gather_list, get_rank,
                 get_world_size, learning_rate, load_checkpoint, load_rewards, log_row,
                 make_optimizers, optimizer_step, prepare_training, progress, reward_values,
                 save_checkpoint, save_generator, setup_distributed, split_over_ranks, start_log,
                 sum_over_ranks, weights_dtype)

NUM_COMPARED = 192                      # held-out samples that are compared with the base's

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", default="out/generator-sft/model", help="folder or hub id to start from")
    add("--judge", default="out/judge-dpo/model", help="folder, hub id, URLs or FILE.py:function")
    add("--template", help="file with the judge's instruction, holding {prompt}  [the judge's own]")
    add("--data", default="out/toy/prompts.txt", help="prompts: .txt or JSONL")
    add("--eval-data", default="out/toy/prompts_test.txt", help="held-out prompts")
    add("--eval-every", type=int, default=16, help="steps between evaluations, 0: none in between")
    add("--watch", default="tests/toy_oracle.py:true", help="measures held-out samples, or none")
    add("--pipe-args", type=json.loads, default={}, help='of its call, as {"height": 512}')
    add("--group-size", type=int, default=8, help="samples of a prompt")
    add("--eta", type=float, default=0.7, help="noise level of the stochastic sampling steps")
    add("--sde-steps", type=int, default=3, help="so many sampling steps are stochastic")
    add("--reward", default="flex", help="flex, score, FILE.py:function, or flex:.7,FILE.py:f:.3")
    add("--pairs", default="ring:2", help="all, or ring:K: each sample meets its next K on a ring")
    add("--alpha", type=float, default=0.7, help="weight of the category against the overall side")
    add("--category-weights", type=float, nargs="+", default=[1, 1, 1], help="of A, B and C")
    add("--std-floor", type=float, default=0.2, help="least std that win rates are divided by")
    add("--max-parse-fail", type=float, default=0.5, help="stop above this undecided share")
    add("--max-new-tokens", type=int, help="longest verdict  [what the judge's folder says, 2048]")
    add("--lora-rank", type=int, default=32, help="0: the weights themselves are trained")
    add("--targets", help="regex: the linear layers with adapters  [all in the blocks]")
    add("--updates", type=int, default=1, help="optimizer steps a rollout")
    add("--clip-range", type=float, default=1e-3, help="the ratio is clipped to 1 +- this")
    add("--ratio-norm", action=flag, default=True, help="GRPO-Guard's ratio (arXiv 2510.22319)")
    add("--kl", type=float, default=0.03, help="weight of the KL to the model without adapters")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--warmup-steps", type=int, default=10)
    add("--max-steps", type=int, default=64, help="rollouts")
    add("--num-prompts", type=int, default=12, help="prompts per step, over all ranks")
    add("--batch-size", type=int, default=96, help="samples per rank and pipeline call")
    add("--bf16", action=flag, default=False, help="compute in bfloat16, train in float32")
    add("--fsdp", action=flag, default=False, help="shard the model across ranks (FSDP2)")
    add("--grad-ckpt", action=flag, default=False, help="activation checkpointing")
    add("--seed", type=int, default=0)
    add("--out", default="out/grpo", help="run folder")
    add("--save-every", type=int, default=20, help="steps between checkpoints")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint in --out")
    return parser.parse_args(argv)

# ---------- The sampler
def sde_step(sigmas, i, x, v, eta):
    """(mean, std) of the Gaussian p(x[i+1] | x[i]), in float32; eta 0 is the ODE's Euler step.
    mean = x + v dt + s^2 / (2 sigma) (x + (1 - sigma) v) dt,  std = s sqrt(-dt),
    s = eta sqrt(sigma / (1 - sigma)),  dt = sigma[i+1] - sigma[i] < 0;  at the first step, where
    sigma may be 1, s takes the next sigma (Eq. 9 of arXiv 2505.05470)."""
    sigma = sigmas[i]
    dt = sigmas[i + 1] - sigma
    x = x.float()
    v = v.float()
    variance = eta ** 2 * sigma / (1 - (sigmas[1] if i == 0 else sigma))
    mean = x + v * dt + (x + v * (1 - sigma)) * (variance / (2 * sigma) * dt)
    return mean, (variance * -dt).sqrt()

@dataclass
class Rollout:
    """B samples of one pipeline call and what it takes to train on their K stochastic steps."""
    call: dict                                      # the call's arguments
    seeds: list                                     # (seed, step, prompt's index, member), B
    media: list = None                              # B lists of frames
    x: list = field(default_factory=list)           # K + 1 latents (B, ...)
    means: list = field(default_factory=list)       # K, of the policy that sampled
    noises: list = field(default_factory=list)      # K: x[i+1] = means[i] + std noises[i]
    sigmas: torch.Tensor = None                     # (S + 1,)
    timesteps: torch.Tensor = None                  # (S,)
    advantages: Future = field(default_factory=Future)      # (B,), when the judge has answered
    counts: Counter = field(default_factory=Counter)        # of answers, for the log
    undecided: list = field(default_factory=list)           # verdicts without a winner

@torch.no_grad()
def sample(pipe, records, seeds, args, call):
    """The Rollout of B samples: --sde-steps stochastic steps, then the ODE. A group starts from one
    noise, so that what sets its samples apart is noise that is trained on."""
    batch = [records[index] for _, _, index, _ in seeds]
    prompts = [record["prompt"] for record in batch]
    rollout = Rollout({**call, "prompt": prompts, **source_images(batch)}, seeds)

    def step_fn(i, x, v):
        sigmas = pipe.scheduler.sigmas
        if sigmas[0] > 1 or (sigmas.diff() >= 0).any() or args.sde_steps >= len(sigmas) - 1:
            raise ValueError(f"--sde-steps {args.sde_steps} with noise levels {sigmas}: they must "
                             "fall within [0, 1], and the last step must be deterministic")
        if i <= args.sde_steps:
            rollout.x.append(x.clone())             # some pipelines write into their latents
        if i >= args.sde_steps:
            return sde_step(sigmas, i, x, v, 0.0)[0].to(x.dtype)
        mean, std = sde_step(sigmas, i, x, v, args.eta)
        noise = torch.stack([seeded_noise(x.shape[1:], *seed, i) for seed in seeds]).to(mean)
        rollout.means.append(mean)
        rollout.noises.append(noise)
        return (mean + std * noise).to(x.dtype)
    with autocast(args, pipe.device):
        output = run_pipeline(pipe, step_fn, generator=group_generators(seeds), **rollout.call)
    rollout.media = frames_of(output)
    rollout.sigmas = pipe.scheduler.sigmas.to(pipe.device)
    rollout.timesteps = pipe.scheduler.timesteps
    return rollout

def sample_seeds(indices, step, args):
    """The seeds of this rank's samples, G of each of its prompts, --batch-size at a time."""
    mine = indices[get_rank()::get_world_size()]
    seeds = list(itertools.product([args.seed], [step], mine, range(args.group_size)))
    return [seeds[k:k + args.batch_size] for k in range(0, len(seeds), args.batch_size)]

def group_generators(seeds):
    return [seeded_generator(*seed[:-1]) for seed in seeds]

def mean_at(pipe, rollout, i, args):
    """(mean, std) of the policy's sde_step at step i of a rollout, by a call of the pipeline that
    ends there; with the rollout's generators, as some pipelines sample their conditioning."""
    with autocast(args, pipe.device):
        v = predict(pipe, rollout.x[i], rollout.timesteps[i], **rollout.call,
                    generator=group_generators(rollout.seeds))
    return sde_step(rollout.sigmas, i, rollout.x[i], v, args.eta)

# ---------- The reward: verdicts -> win rates -> advantages
def start_judging(judge, rewards, args, device):
    """A queue of rollouts, whose advantages a thread finds one after the other. It is a daemon, so
    that Ctrl-C does not wait for the judge."""
    jobs = queue.SimpleQueue()

    def work():
        if device.type == "cuda":
            torch.cuda.set_device(device)           # every thread has its own
        rollouts = []
        while True:
            rollouts.append(jobs.get())
            if sum(len(rollout.seeds) for rollout in rollouts) % args.group_size:
                continue                            # the group goes on in the next rollout
            try:
                judge_rollouts(rollouts, judge, rewards, args)
            except BaseException as error:          # raised again where the result is waited for
                for rollout in rollouts:
                    rollout.advantages.set_exception(error)
            rollouts = []
    threading.Thread(target=work, daemon=True).start()
    return jobs

def judge_rollouts(rollouts, judge, rewards, args):
    """Find the advantages in rollouts that hold whole groups: the rewards' own inside each group,
    summed by their weights, within +-5. Every reward is asked once."""
    started = time.time()
    samples = []
    for rollout in rollouts:
        samples += zip(rollout.call["prompt"], rollout.media, rollout.seeds)
    groups = [samples[k:k + args.group_size] for k in range(0, len(samples), args.group_size)]
    prompts, media, _ = zip(*samples)
    counts = rollouts[-1].counts
    advantages = torch.zeros(len(samples))
    for reward in rewards:
        if reward.function is None:
            parts = compare_groups(groups, judge, rollouts[-1], args)
        else:
            [values] = reward_values(reward, list(media), list(prompts)).values()
            parts = [normalize(part) for part in values.split(args.group_size)]
            mean = values.nansum().item() / (args.num_prompts * args.group_size)
            counts.update({"scores": len(values), "missing": values.isnan().sum().item(),
                           f"reward/{reward.name}": mean})
        advantages += reward.weight * torch.cat(parts)
    counts["judge_s"] = time.time() - started
    for rollout, part in zip(rollouts, advantages.clamp(-5, 5).split(args.batch_size)):
        rollout.advantages.set_result(part)

def compare_groups(groups, judge, rollout, args):
    """[(G,) advantages, ...] of groups [[(prompt, medium, seed), ...], ...] by the judge's verdicts
    on pairs, which are counted in `rollout`. The pairs are a function of the group's seed."""
    questions = []
    pairs = []
    for group in groups:
        prompt, _, seed = group[0]
        rng = random.Random(repr(seed))
        pairs.append(sample_pairs(args.group_size, args.pairs, rng))
        media = [load_media(frames) for _, frames, _ in group]
        questions += [Comparison(prompt, media[i], media[j]) for i, j in pairs[-1]]
    verdicts = [parse_verdict(text) for text in judge(questions)]
    rollout.undecided = [verdict.text for verdict in verdicts if verdict.winner is None]
    weights = dict(zip("ABC", args.category_weights))
    advantages = []
    for group_pairs in pairs:
        group_verdicts = verdicts[:len(group_pairs)]
        verdicts = verdicts[len(group_pairs):]
        rates = win_rates(group_pairs, group_verdicts, args.group_size, weights)
        advantages.append(group_advantages(rates, args.alpha, args.std_floor))
        rollout.counts.update(verdicts=len(group_pairs), ties=rates.num_ties,
                              undecided=rates.num_undecided, decided=rates.num_decided,
                              first_wins=rates.first_position_wins)
    return advantages

def reward_numbers(rollouts, args):
    """{name: number} of the answers about a step's groups, all ranks together. RuntimeError, on all
    of them: too many verdicts are undecided or too many scores missing."""
    counts = Counter(verdicts=0, ties=0, undecided=0, first_wins=0, decided=0, scores=0, missing=0)
    texts = []
    for rollout in rollouts:
        counts.update(rollout.counts)
        texts += rollout.undecided
    advantages = torch.cat([rollout.advantages.result() for rollout in rollouts])
    is_zero = (advantages.view(-1, args.group_size) == 0).all(1)
    counts["zero_variance_groups"] = is_zero.sum().item() / args.num_prompts
    counts["judge_failures"] = sum(isinstance(text, Failure) for text in texts)
    counts = sum_over_ranks(counts)
    texts = gather_list(texts[:1]) or ["no text"]
    for bad, answers in (("undecided", "verdicts"), ("missing", "scores")):
        if counts[bad] > args.max_parse_fail * counts[answers]:
            raise RuntimeError(f"{counts[bad]:.0f} of {counts[answers]:.0f} {answers} are {bad}, "
                               f"more than --max-parse-fail {args.max_parse_fail}. One of them:\n"
                               f"{texts[0][:2000]}")
    for name in ("ties", "undecided", "judge_failures"):
        counts[name] /= max(counts["verdicts"], 1)
    counts["first_position_share"] = counts.pop("first_wins") / max(counts.pop("decided"), 1)
    counts["judge_s"] /= get_world_size()
    return counts

# ---------- The objective
def policy_ratio(x_next, mean, old_mean, std, noise, ratio_norm):
    """(B,) pi(x_next) / pi_old(x_next) of Gaussians of one std, from log-densities in float32 that
    are means over elements. ratio_norm: GRPO-Guard's (arXiv 2510.22319), the log-ratio without its
    quadratic term and times std, which makes all steps of the schedule count alike."""
    log_ratio = noise * (mean - old_mean)
    if not ratio_norm:
        x = x_next.float()
        log_ratio = ((x - old_mean) ** 2 - (x - mean) ** 2) / (2 * std ** 2)
    return log_ratio.flatten(1).mean(1).exp()

def grpo_loss(ratio, advantages, clip_range):
    """(losses (B,), whether each was clipped): max(-A r, -A clip(r, 1 +- clip_range)); equal
    policies give -A."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio != clipped

def gaussian_kl(mean, ref_mean, std):
    """(B,) KL between Gaussians of equal std, averaged over the elements of each sample."""
    return ((mean - ref_mean) ** 2 / (2 * std ** 2)).flatten(1).mean(1)

def check_ratio(ratio_errors, args, verbose):
    """The ranks' largest |ratio - 1| before a rollout's first update. RuntimeError, on all of them:
    it is not 0, so the policy that is trained is not the one that sampled."""
    ratio_errors = gather_list(ratio_errors)
    ratio_error = max(ratio_errors)
    if verbose and get_rank() == 0:
        print(f"max |ratio - 1| at the first update: {ratio_error:.3g}", flush=True)
    tolerance = 1e-2 if args.bf16 else 1e-5
    if not all(error <= tolerance for error in ratio_errors):       # NaN is not either
        raise RuntimeError(
            f"max |ratio - 1| is {ratio_error:.3g} before the first update, more than {tolerance}: "
            "at the recorded latents the pipeline predicts something else than while it sampled. "
            "Likely causes, to be switched off: guidance that depends on the step's number or on "
            "earlier steps, timesteps cut by `strength`, dropout, nondeterministic kernels")
    return ratio_error

# ---------- The loop
def main(argv=None):
    args = parse_args(argv)
    device = setup_distributed(args)

    # model, data, judge
    pipe = load_pipeline(args.model, device, weights_dtype(args, device), fsdp=args.fsdp)
    records = read_records(args.data, "prompt")
    check_options(args, pipe, records)
    call = {**pipe.call_args, **args.pipe_args}
    judge = open_judge(args)
    rewards = load_rewards(args.reward, judge)
    policy = denoisers(pipe)
    prepare_training(policy, args, device)
    optimizers = make_optimizers(policy)
    base_media, before = evaluate_samples(pipe, args, call)
    start = load_checkpoint(args, policy, optimizers) if args.resume else 0
    start_log(args, policy, f"{args.reward} of {args.num_prompts} x {args.group_size} samples")
    jobs = start_judging(judge, rewards, args, device)

    for step in progress(start, args):
        # rollout: the judge compares the samples of some prompts while the next ones are sampled
        started = time.time()
        indices = batch_indices(len(records), args.num_prompts, step, args.seed)
        rollouts = []
        for seeds in sample_seeds(indices, step, args):
            rollouts.append(sample(pipe, records, seeds, args, call))
            jobs.put(rollouts[-1])
        rollout_s = time.time() - started

        # update: the clipped policy gradient at the stochastic steps, and the KL
        num_terms = args.num_prompts * args.group_size * args.sde_steps
        stats = Counter(loss=0.0, kl=0.0, clip_fraction=0.0)
        ratio_errors = []
        for update in range(args.updates):
            for rollout in rollouts:
                advantages = rollout.advantages.result().to(device)             # (B,)
                for i in range(args.sde_steps):
                    ref_mean = rollout.means[i]     # does not matter without KL
                    if args.kl:
                        with torch.no_grad(), disable_lora(policy):
                            ref_mean, _ = mean_at(pipe, rollout, i, args)
                    mean, std = mean_at(pipe, rollout, i, args)                 # (B, ...)
                    ratio = policy_ratio(rollout.x[i + 1], mean, rollout.means[i], std,
                                         rollout.noises[i], args.ratio_norm)
                    losses, clipped = grpo_loss(ratio, advantages, args.clip_range)
                    if args.ratio_norm:             # its other half: every step weighs 1 / |dt|
                        losses = losses / (rollout.sigmas[i] - rollout.sigmas[i + 1])
                    kl = gaussian_kl(mean, ref_mean, std)
                    loss = (losses + args.kl * kl).sum() / num_terms
                    loss.backward()
                    stats.update(loss=loss.item(), kl=kl.sum().item() / num_terms,
                                 clip_fraction=clipped.sum().item() / num_terms)
                    ratio_errors.append((ratio - 1).abs().max().item())
            if update == 0:
                ratio_error = check_ratio(ratio_errors, args, verbose=step == start)
            lr = learning_rate(step, args)
            grad_norm = optimizer_step(policy, optimizers, lr)

        row = {name: value / args.updates for name, value in sum_over_ranks(stats).items()}
        row.update(reward_numbers(rollouts, args), ratio_error=ratio_error, lr=lr,
                   grad_norm=grad_norm, rollout_s=rollout_s, step_s=time.time() - started)
        if args.eval_every and (step + 1) % args.eval_every == 0:
            numbers = evaluate(pipe, judge, base_media, args, call, step)
            row.update({f"held_out_{name}": number for name, number in numbers.items()})
        log_row(args, step, row)
        save_checkpoint(args, step, policy, optimizers)

    save_generator(args, pipe, call)
    after = evaluate(pipe, judge, base_media, args, call)
    finish_log(args, {"before": {**before, "win_rate": 0.5}, "after": after})

def check_options(args, pipe, records):
    """ValueError: options that do not fit each other, the prompts or the pipeline."""
    if prediction_type(pipe) != "flow":
        raise ValueError(f"{args.model} predicts {prediction_type(pipe)}: the stochastic sampler "
                         "needs a flow-matching pipeline")
    if args.kl and not args.lora_rank:
        raise ValueError("--kl is the distance to the model without adapters: pass --lora-rank, or "
                         "--kl 0")
    if args.eta <= 0 or args.sde_steps <= 0:
        raise ValueError("without noise the samples of a group are equal: --eta and --sde-steps "
                         "must be above 0")
    if args.num_prompts % get_world_size() or args.num_prompts > len(records):
        raise ValueError(f"--num-prompts {args.num_prompts}: pass a multiple of the ranks, here "
                         f"{get_world_size()}, as a group lies on one, and at most as many as "
                         f"{args.data} holds, {len(records)}")
    is_part = args.group_size % args.batch_size == 0
    if not is_part and (args.batch_size % args.group_size or "source" in records[0]):
        raise ValueError(f"--batch-size {args.batch_size}: pass a multiple or a divisor of "
                         f"--group-size {args.group_size}, a divisor where prompts have sources")

def open_judge(args):
    """The judge of --reward, None where no reward asks one."""
    if re.search("(^|,) *(flex|score) *(:|,|$)", args.reward):
        template = args.template and Path(args.template).read_text(encoding="utf-8")
        return load_judge(args.judge, template=template, max_new_tokens=args.max_new_tokens)

def evaluate(pipe, judge, base_media, args, call, step=None):
    """{name: number} of held-out samples, after a step of the first NUM_COMPARED prompts: what
    --watch measures, and the judge's win rate of NUM_COMPARED over the base's of equal seeds."""
    num = None if step is None else NUM_COMPARED
    media, numbers = evaluate_samples(pipe, args, call, base_media, num)
    if judge is None:
        return numbers
    rng = random.Random(args.seed)
    pairs = []
    questions = []
    records = read_records(args.eval_data, "prompt")[:NUM_COMPARED]
    for record, *candidates in zip(records, media, base_media):
        pairs.append(rng.choice([(0, 1), (1, 0)]))
        frames = [load_media(candidates[item]) for item in pairs[-1]]
        questions.append(Comparison(record["prompt"], *frames))
    verdicts = [parse_verdict(text) for text in split_over_ranks(judge, questions)]
    return {**numbers, "win_rate": win_rates(pairs, verdicts, 2).overall[0].item()}

if __name__ == "__main__":
    main()
