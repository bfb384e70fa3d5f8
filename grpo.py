"""Stage 3, reward: Pref-GRPO of a flow-matching generator. The judge compares the samples of a
prompt in pairs, win rates become advantages (Sec. 3.3 of arXiv 2602.02380), and the probability of
the sampler's stochastic steps moves with them (Flow-GRPO, arXiv 2505.05470).

    python grpo.py                          the toy generator, rewarded by the toy judge
    torchrun --nproc_per_node=8 grpo.py --model ...     real models: README.md has the commands

Shapes: G samples of a prompt, on one rank, B samples of a pipeline call and micro-step, S sampling
steps, the first K of them stochastic, (...) one sample's latents."""
import itertools, math, random, time
from collections import Counter
from dataclasses import dataclass, field

import torch
from data import (batch_indices, frames_of, load_rewards, predict, prediction_type, read_records,
                  report_long_prompts, reward_values, run_pipeline, seeded_generator, seeded_noise,
                  source_images, source_of)
from reward import (Failure, compare_groups, group_advantages, judge_options, load_judge,
                    load_media, normalize, run_in_threads, sample_pairs, win_rates)
from sft import (autocast, disable_lora, evaluate_samples, finish_log, gather_list, get_rank,
                 get_world_size, load_checkpoint, load_generator, log_and_save, make_optimizers,
                 optimizer_step, prepare_training, progress, save_generator, setup_distributed,
                 split, split_over_ranks, stage_parser, start_log, sum_over_ranks)

NUM_COMPARED = 192                      # held-out samples that are compared with the base's
DEFAULTS = {
    "model": "out/generator-sft/model", "data": "out/toy/prompts.txt", "out": "out/grpo",
    "eval_data": "out/toy/prompts_test.txt", "lora_rank": 32, "lr": 2e-3, "warmup_steps": 10,
    "max_steps": 64, "batch_size": 96}

def parse_args(argv=None):
    parser = stage_parser(__doc__)      # what all stages share
    parser.set_defaults(**DEFAULTS)
    add = parser.add_argument
    add("--judge", default="out/judge-dpo/model", help="folder, hub id, URLs or FILE.py:function")
    add("--eval-every", type=int, default=16, help="steps between evaluations, 0: none in between")
    add("--num-prompts", type=int, default=12, help="prompts per step, over all ranks")
    add("--group-size", type=int, default=8, help="samples of a prompt")
    add("--eta", type=float, default=1.0, help="noise level of the stochastic sampling steps")
    add("--sde-steps", type=int, default=3, help="so many sampling steps are stochastic")
    add("--reward", default="flex", help="flex, score, FILE.py:function, or flex:.7,FILE.py:f:.3")
    add("--pairs", default="ring:1", help="all, or ring:K: each sample meets its next K on a ring")
    add("--alpha", type=float, default=0.7, help="weight of the category against the overall side")
    add("--std-floor", type=float, default=0.2, help="least std that win rates are divided by")
    add("--max-parse-fail", type=float, default=0.5, help="stop above this undecided share")
    add("--updates", type=int, default=1, help="optimizer steps a rollout")
    add("--clip-range", type=float, default=1e-3, help="the ratio is clipped to 1 +- this")
    add("--kl", type=float, default=0.01, help="weight of the KL to the model without adapters")
    return parser.parse_args(argv)

# ---------- The sampler
def sde_step(sigmas, i, x, v, eta):
    """(mean, std) of the Gaussian p(x[i+1] | x[i]), in float32; eta 0 is the ODE's Euler step.
    mean = x + v dt + s^2 / (2 sigma) (x + (1 - sigma) v) dt,  std = s sqrt(-dt),
    s = eta sqrt(sigma / (1 - sigma)),  dt = sigma[i+1] - sigma[i] < 0;  at the first step, where
    sigma may be 1, 1 - sigma is the next step's (Eq. 9 of arXiv 2505.05470)."""
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
    records: list                                   # of the prompts, B
    media: list = None                              # B lists of frames
    x: list = field(default_factory=list)           # S latents (B, ...)
    means: list = field(default_factory=list)       # K, of the policy that sampled
    sigmas: torch.Tensor = None                     # (S + 1,)
    timesteps: torch.Tensor = None                  # (S,)
    judged: object = None                           # a Future, done when the judge has answered
    advantages: torch.Tensor = None                 # (B,), then
    counts: Counter = field(default_factory=Counter)        # of answers, for the log
    undecided: list = field(default_factory=list)           # verdicts without a winner

@torch.no_grad()
def sample(pipe, records, seeds, args, call):
    """The Rollout of B samples: --sde-steps stochastic steps, then the ODE. A group starts from one
    noise, so that what sets its samples apart is noise that is trained on."""
    batch = [records[index] for _, _, index, _ in seeds]
    call = {**call, "prompt": [record["prompt"] for record in batch], **source_images(batch)}
    rollout = Rollout(call, seeds, batch)
    generators = [seeded_generator(*seed[:-1]) for seed in seeds]

    def step_fn(i, x, v):
        sigmas = pipe.scheduler.sigmas
        if sigmas[0] > 1 or (sigmas.diff() >= 0).any() or args.sde_steps >= len(sigmas) - 1:
            raise ValueError(f"--sde-steps {args.sde_steps} with noise levels {sigmas}: they must "
                             "fall within [0, 1], and the last step must be deterministic")
        rollout.x.append(x.clone())                 # some pipelines write into their latents
        if i >= args.sde_steps:
            return sde_step(sigmas, i, x, v, 0.0)[0].to(x.dtype)
        mean, std = sde_step(sigmas, i, x, v, args.eta)
        noise = torch.stack([seeded_noise(x.shape[1:], *seed, i) for seed in seeds]).to(mean)
        rollout.means.append(mean)
        return (mean + std * noise).to(x.dtype)
    with autocast(args, pipe.device):
        output = run_pipeline(pipe, step_fn, generator=generators, **call)
    rollout.media = frames_of(output)
    rollout.sigmas = pipe.scheduler.sigmas.to(pipe.device)
    rollout.timesteps = pipe.scheduler.timesteps
    return rollout

def sample_seeds(num_records, step, args):
    """[[seeds of a pipeline call, ...], ...]: this rank's samples in parts of whole groups."""
    indices = batch_indices(num_records, args.num_prompts, step, args.seed)
    mine = indices[get_rank()::get_world_size()]
    seeds = list(itertools.product([args.seed], [step], mine, range(args.group_size)))
    parts = split(seeds, max(args.batch_size, args.group_size))
    return [split(part, args.batch_size) for part in parts]

def mean_at(pipe, rollout, i, args):
    """(mean, std) of the policy's sde_step at step i of a rollout, by a call that ends there. Of a
    deterministic step std is the length, so that its KL is half the squared error of v."""
    generators = [seeded_generator(*seed[:-1]) for seed in rollout.seeds]
    with autocast(args, pipe.device):
        v = predict(pipe, rollout.x[i], rollout.timesteps[i], **rollout.call, generator=generators)
    eta = args.eta if i < args.sde_steps else 0.0
    mean, std = sde_step(rollout.sigmas, i, rollout.x[i], v, eta)
    return mean, std if eta else rollout.sigmas[i] - rollout.sigmas[i + 1]

# ---------- The reward: verdicts -> win rates -> advantages
def judge_rollouts(rollouts, last, judge, rewards, args):
    """Find the advantages of whole groups, within +-5, once the Future `last`, if any, is done."""
    if last:
        last.result()
    if torch.cuda.is_available():                   # a thread has its own current device
        torch.cuda.set_device(rollouts[0].sigmas.device)
    started = time.time()
    samples = []
    for rollout in rollouts:
        samples += zip(rollout.records, rollout.media, rollout.seeds)
    groups = split(samples, args.group_size)
    prompts = [record["prompt"] for record, _, _ in samples]
    media = [frames for _, frames, _ in samples]
    counts = rollouts[-1].counts
    advantages = torch.zeros(len(samples))
    for reward in rewards:
        if reward.function is None:
            parts = advantages_of(groups, judge, rollouts[-1], args)
        else:
            [values] = reward_values(reward, media, prompts).values()
            parts = [normalize(part) for part in values.split(args.group_size)]
            counts.update({f"scores/{reward.name}": len(values),
                           f"missing/{reward.name}": values.isnan().sum().item(),
                           f"reward/{reward.name}": values.nansum().item()})      # the sum
        advantages += reward.weight * torch.cat(parts)
    counts["judge_s"] = time.time() - started
    for rollout, part in zip(rollouts, advantages.clamp(-5, 5).split(args.batch_size)):
        rollout.advantages = part

def advantages_of(groups, judge, rollout, args):
    """[(G,) advantages, ...] of groups [[(record, medium, seed), ...], ...] by the judge's verdicts
    on pairs, which are counted in `rollout`. The pairs are a function of the group's seed."""
    schedule = []
    entries = []
    for group in groups:
        record, _, seed = group[0]
        schedule.append(sample_pairs(args.group_size, args.pairs, random.Random(repr(seed))))
        media = [load_media(frames) for _, frames, _ in group]
        entries.append((record["prompt"], media, source_of(record)))
    advantages = []
    for pairs, verdicts in zip(schedule, compare_groups(judge, entries, schedule)):
        rates = win_rates(pairs, verdicts, args.group_size)
        advantages.append(group_advantages(rates, args.alpha, args.std_floor))
        rollout.counts.update(rates.counts)
        rollout.undecided += [verdict.text for verdict in verdicts if verdict.winner is None]
    return advantages

def reward_numbers(rollouts, args):
    """{name: number} of a step's answers on all ranks. RuntimeError: too many are useless."""
    names = ["verdicts", "first_wins", "second_wins", "ties", "undecided"]
    counts = Counter(dict.fromkeys(names, 0))
    texts = []
    for rollout in rollouts:
        counts.update(rollout.counts)
        texts += rollout.undecided
    groups = torch.cat([rollout.advantages for rollout in rollouts]).view(-1, args.group_size)
    counts["zero_variance_groups"] = (groups == 0).all(1).sum().item() / args.num_prompts
    counts["judge_failures"] = sum(isinstance(text, Failure) for text in texts)
    counts = sum_over_ranks(counts)
    texts = gather_list(texts[:1]) or ["no text"]
    rewards = [name.removeprefix("scores/") for name in counts if name.startswith("scores/")]
    pairs = [("undecided", "verdicts"), *[(f"missing/{r}", f"scores/{r}") for r in rewards]]
    for bad, answers in pairs:
        if counts[bad] > args.max_parse_fail * counts[answers]:
            raise RuntimeError(
                f"{counts[bad]:.0f} of {counts[answers]:.0f} {answers} are {bad.split('/')[0]}, "
                f"more than --max-parse-fail. One of them:\n{texts[0][:2000]}")
    for name in rewards:
        known = counts[f"scores/{name}"] - counts[f"missing/{name}"]
        counts[f"reward/{name}"] /= known or math.nan
    for name in ("ties", "undecided", "judge_failures"):
        counts[name] /= max(counts["verdicts"], 1)
    first = counts.pop("first_wins")
    counts["first_position_share"] = first / max(first + counts.pop("second_wins"), 1)
    counts["judge_s"] /= get_world_size()
    return counts

# ---------- The objective
def policy_ratio(x_next, mean, old_mean, std):
    """(B,) pi(x_next) / pi_old(x_next) of Gaussians of one std, its geometric mean per element."""
    x = x_next.float()
    log_ratio = ((x - old_mean) ** 2 - (x - mean) ** 2) / (2 * std ** 2)
    return log_ratio.flatten(1).mean(1).exp()

def grpo_loss(ratio, advantages, clip_range):
    """(losses (B,), whether each was clipped): max(-A r, -A clip(r, 1 +- clip_range))."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio != clipped

def gaussian_kl(mean, ref_mean, std):
    """(B,) KL between Gaussians of equal std, averaged over the elements of each sample."""
    return ((mean - ref_mean) ** 2 / (2 * std ** 2)).flatten(1).mean(1)

def mean_and_kl(pipe, rollout, i, args):
    """mean_at, and the KL (B,) to the model without adapters, as if noise were drawn; or 0."""
    if args.kl:
        with torch.no_grad(), disable_lora():
            ref_mean, _ = mean_at(pipe, rollout, i, args)
    mean, std = mean_at(pipe, rollout, i, args)
    kl = gaussian_kl(mean, ref_mean, std) if args.kl else torch.zeros(len(mean)).to(mean)
    return mean, std, kl

def late_step(rollout, step, args):
    """The index of a sampling step in the later half of the deterministic ones, by turns."""
    midway = (args.sde_steps + len(rollout.x)) // 2
    return midway + step % (len(rollout.x) - midway)

def check_ratio(errors, args):
    """The ranks' largest |ratio - 1| before the first update. RuntimeError: it is not 0."""
    errors = gather_list(errors)
    tolerance = min(args.clip_range, 1e-2) if args.bf16 else 1e-5
    if not all(error <= tolerance for error in errors):       # NaN is not either
        raise RuntimeError(
            f"max |ratio - 1| is {max(errors):.3g} before the first update, above {tolerance}. "
            "Switch off guidance that depends on the step's number or earlier steps, and dropout")
    return max(errors)

@torch.no_grad()
def check_moved(pipe, rollout, args):
    """RuntimeError: the first rollout's advantages have not changed the first sampling step."""
    mean, std = mean_at(pipe, rollout, 0, args)
    moved = ((mean - rollout.means[0]).abs().max() / std).item()
    if get_rank() == 0:
        print(f"the first rollout moved means by at most {moved:.3g} std", flush=True)
    if moved == 0 and rollout.advantages.any():
        raise RuntimeError("the first rollout has changed no sample: see --targets, --lr")

# ---------- The loop
def main(argv=None):
    args = parse_args(argv)
    device = setup_distributed(args)
    pipe, policy, call = load_generator(args, device)
    records = read_records(args.data, "prompt")
    names = {part.split(":")[0].strip() for part in args.reward.split(",")}
    options = judge_options(args, "template" if "flex" in names else "score_template")
    judge = load_judge(args.judge, **options) if names & {"flex", "score"} else None
    rewards = load_rewards(args.reward, judge)
    judge = "flex" in names and judge               # a judge of scores need not compare
    prepare_training(policy, args, device)
    optimizers = make_optimizers(policy)
    check_run(args, pipe, records, call, names)
    base_media, before = evaluate_samples(pipe, args, call)
    start = load_checkpoint(args, policy, optimizers)
    start_log(args, policy, f"{args.reward} of {args.num_prompts} x {args.group_size} samples")

    for step in progress(start, args):
        # rollout: the judge compares the samples of some prompts while the next ones are sampled
        started = time.time()
        rollouts = []
        for part in sample_seeds(len(records), step, args):
            sampled = [sample(pipe, records, seeds, args, call) for seeds in part]
            job = (sampled, rollouts[-1].judged if rollouts else None, judge, rewards, args)
            [judged] = run_in_threads(judge_rollouts, [job], 1)
            for rollout in sampled:
                rollout.judged = judged
            rollouts += sampled
        rollout_s = time.time() - started

        # update; the KL is also asked at a late step: fine detail drifts where nothing holds it
        num_samples = args.num_prompts * args.group_size
        num_terms = num_samples * args.sde_steps
        stats = Counter(loss=0.0, kl=0.0, later_kl=0.0, clip_fraction=0.0)
        ratio_errors = []
        for update in range(args.updates):
            for rollout in rollouts:
                rollout.judged.result()
                for i in range(args.sde_steps):
                    mean, std, kl = mean_and_kl(pipe, rollout, i, args)         # (B, ...), (), (B,)
                    ratio = policy_ratio(rollout.x[i + 1], mean, rollout.means[i], std)
                    losses, clipped = grpo_loss(ratio, rollout.advantages.to(mean), args.clip_range)
                    loss = (losses + args.kl * kl).sum() / num_terms
                    loss.backward()
                    stats.update(loss=loss.item(), kl=kl.sum().item() / num_terms,
                                 clip_fraction=clipped.sum().item() / num_terms)
                    ratio_errors.append((ratio - 1).abs().max().item())
                if args.kl:
                    *_, kl = mean_and_kl(pipe, rollout, late_step(rollout, step, args), args)
                    loss = args.kl * kl.sum() / num_samples
                    loss.backward()
                    stats.update(loss=loss.item(), later_kl=loss.item() / args.kl)
            if update == 0:
                ratio_error = check_ratio(ratio_errors, args)
            row = optimizer_step(policy, optimizers, step, args)
        if step == start:
            check_moved(pipe, rollouts[0], args)

        row |= {name: value / args.updates for name, value in sum_over_ranks(stats).items()}
        row.update(reward_numbers(rollouts, args), ratio_error=ratio_error, rollout_s=rollout_s,
                   step_s=time.time() - started)
        if args.eval_every and (step + 1) % args.eval_every == 0:
            numbers = evaluate(pipe, judge, base_media, args, call, NUM_COMPARED)
            row.update({f"held_out_{name}": number for name, number in numbers.items()})
        log_and_save(args, step, row, policy, optimizers)

    save_generator(args, pipe, call)
    after = evaluate(pipe, judge, base_media, args, call)
    before |= {"win_rate": 0.5, "undecided": 0.0}
    finish_log(args, {"before": before, "after": after}, f"look at {args.out}/before_after.html")

def check_run(args, pipe, records, call, rewards):
    """ValueError, RuntimeError: options that do not fit, or a rollout that replays otherwise."""
    if prediction_type(pipe) != "flow":
        raise ValueError(f"{args.model} predicts {prediction_type(pipe)}: it is no flow")
    if args.kl and not args.lora_rank:
        raise ValueError("--kl is the distance to the model without adapters: pass --lora-rank")
    if args.eta <= 0 or args.sde_steps <= 0 or args.group_size < 2:
        raise ValueError("nothing sets a sample apart: raise --eta, --sde-steps or --group-size")
    if args.num_prompts % get_world_size() or args.num_prompts > len(records):
        raise ValueError(f"--num-prompts {args.num_prompts}: pass a multiple of the "
                         f"{get_world_size()} ranks, at most {len(records)} as in {args.data}")
    has_sources = "source" in records[0]
    if has_sources and "score" in rewards:
        raise ValueError("a score is asked without the source of an edit: pass --reward flex")
    if args.group_size % args.batch_size and (args.batch_size % args.group_size or has_sources):
        raise ValueError(f"--batch-size {args.batch_size}: pass a multiple or a divisor of "
                         f"--group-size {args.group_size}, a divisor where prompts have sources")
    report_long_prompts(pipe, records, call)
    seeds = [(args.seed, -1, 0, 0), (args.seed, -1, 0 if has_sources else len(records) - 1, 1)]
    rollout = sample(pipe, records, seeds[:args.batch_size], args, call)
    errors = []
    for i in range(args.sde_steps):
        mean, std = mean_at(pipe, rollout, i, args)
        ratio = policy_ratio(rollout.x[i + 1], mean, rollout.means[i], std)
        errors.append((ratio - 1).abs().max().item())
    ratio_error = check_ratio(errors, args)
    if get_rank() == 0:
        print(f"max |ratio - 1| of a trial rollout: {ratio_error:.3g}. It takes Euler steps, "
              f"held-out samples those of {type(pipe.scheduler.scheduler).__name__}", flush=True)

def evaluate(pipe, judge, base_media, args, call, num=None):
    """{name: number} of (the first num) held-out samples: of --watch, with flex also who wins."""
    media, numbers = evaluate_samples(pipe, args, call, base_media, num)
    if not judge:
        return numbers
    records = read_records(args.eval_data, "prompt")[:NUM_COMPARED]
    rng = random.Random(args.seed)
    schedule = [[rng.choice([(0, 1), (1, 0)])] for _ in records]

    def compare(indices):                           # of this rank's samples
        groups = [(records[i]["prompt"], [load_media(media[i]), load_media(base_media[i])],
                   source_of(records[i])) for i in indices]
        return compare_groups(judge, groups, [schedule[i] for i in indices])
    verdicts = split_over_ranks(compare, range(len(records)))
    rates = win_rates(sum(schedule, []), sum(verdicts, []), 2)
    undecided = rates.counts["undecided"] / len(records)
    return {**numbers, "win_rate": rates.overall[0].item(), "undecided": undecided}

if __name__ == "__main__":
    main()
