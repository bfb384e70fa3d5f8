"""Get rewarded: Pref-GRPO, a diffusion or flow-matching generator that learns from a judge's pairwise verdicts.

    python grpo.py                                                     the toy generator, rewarded by the toy judge
    torchrun --nproc_per_node=8 grpo.py --model GENERATOR --judge JUDGE --data prompts.txt --lora-rank 64 --lr 3e-5

A step: G images of each prompt by a stochastic sampler; the judge compares them in pairs; win rates become advantages, blended by
alpha between categories and overall (arXiv 2602.02380); the sampler's steps are replayed and their probability is moved with the
clipped objective of Flow-GRPO (arXiv 2505.05470). The reference for the KL term is the generator with its adapters off.
Legend: P prompts, G images per prompt, B = P G images, S sampling steps, C H W latent (or tokens).
"""
import argparse
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from data import batch_indices, in_world, know_toy_classes, open_records, toy_world
from reward import (Comparison, Failure, asks_judge, blend_advantages, find_judge, group_advantages, load_media, normalize, open_judge,
                    open_rewards, parse_verdict, reward_values, schedule_pairs, win_rates)
# toolbox and driver from sft.py; paste those blocks here to stand alone
from sft import (Done, Log, adapters_off, denoisers, draw_before_after, draw_curves, frames_of, frozen_dtype, gather, generator, load_checkpoint,
                 load_pipeline, make_optimizers, need, optimizer_step, peak_gib, pipe_arg, prediction_type, prepare_training, run, sample_shares,
                 save_adapter, save_checkpoint, save_pipeline, seeded_noise, set_lr, start_ranks, total, trainable, velocity)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    # model
    add("--model", help="folder or hub id of the diffusers pipeline to improve  [out/generator-sft/model; video world out/video-...]")
    add("--judge", help="folder, hub id, URLs or FILE.py:function of the judge  [the newest of out/judge-dpo/model and out/judge-sft/model]")
    add("--template", help="file with the judge's instruction, {prompt} and {medium} in it; default: what lies in its folder, or reward.TEMPLATE")
    # data
    add("--data", default="toy", help="prompts: a text file, one a line, a CSV column or JSONL; toy: made as needed")
    add("--data-num", type=int, default=4000, help="toy prompts to draw from")
    add("--eval-data", default="toy:test", help="prompts that are not trained on")
    add("--eval-num", type=int, default=1024, help="samples of the evaluations before and after")
    add("--eval-every", type=int, default=16, help="steps between small evaluations with a sheet of samples; 0: only before and after")
    add("--watch", help="rewards measured on held-out samples beside the one that is trained on, as clip or FILE.py:function")
    add("--skip-bad", action=flag, default=False, help="drop malformed lines and print how many")
    add("--world", choices=["image", "video"], default="image", help="which toy world is meant by toy: still or in motion")
    # generator
    add("--pipe-arg", type=pipe_arg, nargs="*", default=[], help="key=value for the pipeline's call, as height=512 num_inference_steps=15")
    add("--group-size", type=int, default=8, help="G, images per prompt")
    add("--shared-noise", action=flag, default=True, help="a group starts from one initial noise and differs by the sampler's noise alone")
    add("--sde", choices=["flow", "dance", "cps"], default="flow", help="which stochastic sampler; see transition")
    add("--eta", type=float, default=.7, help="its noise level")
    add("--sde-steps", type=int, default=3, help="so many sampling steps in a row are stochastic, the rest follow the ODE")
    add("--sde-window", choices=["first", "random", "slide"], default="first", help="where they lie: at the start, anywhere, or later as training goes on")
    add("--train-share", type=float, default=1.0, help="share of the stochastic steps that are trained, drawn anew for every rollout")
    # reward
    add("--reward", default="flex", help="what rewards: flex (the verdicts), score, clip, FILE.py:function, or a sum as flex:0.7,clip:0.3")
    add("--pairs", default="ring:2", help="who meets whom in a group: all, or ring:K, each image meets its next K on a random ring")
    add("--both-orders", action=flag, default=False, help="ask every pair in both orders")
    add("--alpha", type=float, default=.7, help="weight of the category side against the overall side")
    add("--category-weights", type=float, nargs="+", default=[1, 1, 1],
        help="of the anchors A B C in the category side; a fourth counts what the judge adds; paper: equal, original FLUX script: 1 .7 .7")
    add("--std-floor", type=float, default=.2, help="least std that win rates are divided by, so that a nearly dead group stays quiet; paper: 0")
    add("--adv-clip", type=float, default=5.0, help="advantages are clipped to plus and minus this")
    add("--max-parse-fail", type=float, default=.5, help="stop when a larger share of a step's verdicts is undecided, or of its scores missing")
    add("--max-new-tokens", type=int, default=256, help="longest verdict; real judges need about 2048")
    add("--judge-batch", type=int, help="pairs judged at a time  [200, where verdicts are long 16]")
    # lora
    add("--lora-rank", type=int, default=32, help="0: all weights are trained")
    add("--lora-alpha", type=float, help="default: the rank")
    add("--lora-targets", default=r"blocks\.\d+\..*(to_(q|k|v|out\.0)|add_(q|k|v)_proj|to_add_out|proj_mlp|proj_out|net\.(0\.proj|2))$",
        help="regex on the names of linear layers")
    # loss
    add("--loss", choices=["grpo", "nft"], default="grpo", help="the clipped ratio, or DiffusionNFT, which learns from clean latents alone")
    add("--nft-beta", type=float, default=1.0, help="how far DiffusionNFT's implicit policies lie from the old one")
    add("--epochs", type=int, default=1, help="optimizer steps a rollout; from the second on the ratio leaves 1 and the clip acts")
    add("--clip-range", type=float, default=1e-3, help="the ratio is clipped to 1 plus and minus this; with one update a rollout it is 1 and nothing is")
    add("--ratio-norm", action=flag, default=True, help="GRPO-Guard's ratio, equally spread at all steps")
    add("--kl", type=float, default=.03, help="weight of the KL divergence to the generator without adapters; not divided by |dt|, as the ratio's term is")
    # optim
    add("--optim", choices=["adamw", "muon"], default="adamw")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.0)
    add("--warmup-steps", type=int, default=10)
    add("--max-steps", type=int, help="rollouts, each followed by one optimizer step  [64, in the video world 40]")
    add("--num-prompts", type=int, default=12, help="prompts per step, over all ranks; a group may lie on several")
    add("--batch-size", type=int, default=96, help="images per rank per rollout call and micro-step: what memory allows")
    add("--max-norm", type=float, default=1.0, help="the gradient norm is clipped to this")
    # run
    add("--bf16", action=flag, default=False, help="autocast the generator to bfloat16; the ratio is then 1 only nearly")
    add("--fsdp", action=flag, default=False, help="split weights, gradients and optimizer over the ranks (FSDP2) instead of copying them")
    add("--grad-ckpt", action=flag, default=False, help="gradient checkpointing: less memory, a third more time")
    add("--compile", action=flag, default=False, help="torch.compile each block")
    add("--park-encoders", action=flag, default=False, help="text encoders wait on the CPU while nothing is encoded")
    add("--seed", type=int, default=0)
    add("--out", help="run folder  [out/grpo; video world out/video-grpo]")
    add("--save-every", type=int, default=20, help="steps between checkpoints")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint in --out")
    args = parser.parse_args(argv)
    args.pipe_arg = dict(args.pipe_arg)
    out, args.data, args.eval_data = in_world(args.world, args.data, args.eval_data)
    args.model, args.out = args.model or f"{out}generator-sft/model", args.out or f"{out}grpo"
    args.max_steps = args.max_steps or (64 if args.world == "image" else 40)
    args.judge_batch = args.judge_batch or (200 if args.max_new_tokens <= 256 else 16)
    if args.loss == "nft" and args.epochs > 1:
        parser.error("--loss nft takes the policy of the rollout as the old one, so --epochs is 1")
    if args.kl and not args.lora_rank:
        parser.error("--kl needs adapters, whose absence is the reference: pass --lora-rank, or --kl 0")
    return args


# ---------------------------------------------------------------- the stochastic sampler

def transition(sigmas, i, x, v, eta, kind="flow"):
    """(mean, std) of p(x[i+1] | x[i]), an SDE with the marginals of the flow, in float32; eta 0 is the Euler step. dt = sigma' - sigma < 0.

    flow   mean = x + v dt + s^2 / (2 sigma) (x + (1 - sigma) v) dt, std = s sqrt(-dt), s = eta sqrt(sigma / (1 - sigma)); at the first
           step, where sigma may be 1, s takes the next sigma (Eq. 9 of arXiv 2505.05470, Flow-GRPO)
    dance  the same with s = eta (arXiv 2505.07818, DanceGRPO)
    cps    s = sigma' sin(eta pi / 2): mean = (1 - sigma') x0 + sqrt(sigma'^2 - s^2) x1, std = s, with x0 = x - sigma v and
           x1 = x + (1 - sigma) v (arXiv 2509.05952, coefficients-preserving sampling: no more noise than the schedule has)
    """
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    x, v = x.float(), v.float()
    if kind == "cps" and eta:
        std = sigmas[i + 1] * math.sin(eta * math.pi / 2)
        return (1 - sigmas[i + 1]) * (x - sigma * v) + (sigmas[i + 1] ** 2 - std ** 2).sqrt() * (x + (1 - sigma) * v), std
    variance = torch.full_like(sigma, eta ** 2)
    if kind == "flow" and eta:
        variance = variance * sigma / (1 - (sigmas[1] if i == 0 else sigma))
    mean = x + v * dt + (x + v * (1 - sigma)) * (variance / (2 * sigma) * dt)
    return mean, (variance * -dt).sqrt()


def window(args, num_steps, step):
    """(stochastic steps, those of them that are trained) of training step `step`, the same on all ranks. The last of the `num_steps`
    sampling steps is never among them: it would leave its noise in the image."""
    if args.sde_steps >= num_steps:
        raise ValueError(f"--sde-steps {args.sde_steps} leaves no deterministic last step of {num_steps}")
    rng = random.Random(f"{args.seed} {step}")
    place = {"first": 0.0, "random": rng.random(), "slide": min(step / args.max_steps, 1 - 1e-9)}[args.sde_window]
    start = int(place * (num_steps - args.sde_steps))
    steps = list(range(start, start + args.sde_steps))
    return steps, sorted(rng.sample(steps, max(1, round(args.train_share * len(steps)))))


def log_prob(x, mean, std):
    """Gaussian log-density of x, averaged over the elements of each image, (B,), in float32."""
    return (-(x.float() - mean) ** 2 / (2 * std ** 2) - std.log() - .5 * math.log(2 * math.pi)).flatten(1).mean(1)


def rollout(pipe, prompt, seeds, args, step=0, **kwargs):
    """(media, trajectory) of B prompts: a list of frames each; x (S + 1 tensors of B latents, the last one clean), means and noise of the
    steps, sigmas (S+1,), and which steps are to be trained.

    Image b's first latents and noise are functions of seeds[b] = (..., group, member) alone; with --shared-noise the first latents
    are the same for all members, so that whatever sets a group's images apart is noise the policy is trained on.
    """
    xs, means, noises = [], [], []

    def visit(i, x, v):
        eta = args.eta if i in window(args, len(pipe.scheduler.sigmas) - 1, step)[0] else 0.0
        mean, std = transition(pipe.scheduler.sigmas, i, x, v, eta, args.sde)
        noise = torch.stack([seeded_noise(x.shape[1:], *seed, i) for seed in seeds]).to(mean) if eta else torch.zeros_like(mean)
        xs.append(x)
        means.append(mean)
        noises.append(noise)
        after = (mean + std * noise).to(x.dtype)
        if i + 2 == len(pipe.scheduler.sigmas):
            xs.append(after)
        return after

    generators = [generator(*(seed[:-1] if args.shared_noise else seed)) for seed in seeds]
    media = frames_of(run(pipe, visit, prompt=prompt, generator=generators, **{"output_type": "pil", **kwargs}))
    return media, dict(x=xs, means=means, noises=noises, sigmas=pipe.scheduler.sigmas.to(xs[0].device), steps=window(args, len(means), step)[1],
                       seeds=seeds, step=step)


def replay(pipe, trajectory, steps, see, grad=True, **kwargs):
    """Walk the chosen steps of a recorded trajectory: see(i, v) gets the policy's velocity there and may call backward()."""
    def visit(k, x, v):
        see(steps[k], v)
        if k + 1 == len(steps):
            raise Done
        return trajectory["x"][steps[k + 1]]
    run(pipe, visit, x=trajectory["x"][steps[0]], keep=list(steps), grad=grad, **kwargs)


# ---------------------------------------------------------------- the objective

def grpo_loss(ratio, advantages, clip_range):
    """(losses, 1 where clipped): max(-A r, -A clip(r, 1 +- clip_range)) per image, (B,) each; equal policies give -A."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), (ratio != clipped).float()


def policy_ratio(x_next, mean, old_mean, std, noise, normalize):
    """pi(x_next) / pi_old(x_next) per image, (B,), from the element-mean log-densities.

    `normalize` is RatioNorm of GRPO-Guard (arXiv 2510.22319), r = exp(mean(noise * (mean - old_mean))): the plain log-ratio
    without its quadratic term and times std, which makes every step of the schedule count alike.
    """
    if normalize:
        return (noise * (mean - old_mean)).flatten(1).mean(1).exp()
    return (log_prob(x_next, mean, std) - log_prob(x_next, old_mean, std)).exp()


def nft_loss(v, v_old, target, advantages, beta):
    """(losses (B,), all above 0) of DiffusionNFT (arXiv 2509.16117): r |v+ - v*|^2 + (1 - r) |v- - v*|^2, each a mean over elements, with the
    implicit policies v+- = v_old +- beta (v - v_old), v* = noise - x0, and r = 1/2 + clip(A / 5, -1, 1) / 2."""
    right = (.5 + .5 * (advantages / 5).clamp(-1, 1))
    plus, minus = ((v_old + way * beta * (v - v_old) - target).pow(2).flatten(1).mean(1) for way in (1, -1))
    return right * plus + (1 - right) * minus


def accumulate_gradients(pipe, trajectory, advantages, args, weights, **kwargs):
    """backward() of the objective of one micro-batch: the mean over the trained steps, summed over its images by their weights (B,).

    Returns such sums of loss, kl and clip_fraction, and the largest |ratio - 1|.
    """
    steps, sigmas, reference = trajectory["steps"], trajectory["sigmas"], {}
    stats = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "max_ratio_error": 0.0}
    if args.kl:
        with adapters_off(*denoisers(pipe).values()):
            replay(pipe, trajectory, steps, reference.__setitem__, grad=False, **kwargs)

    def see(i, v):
        mean, std = transition(sigmas, i, trajectory["x"][i], v, args.eta, args.sde)
        width = torch.full_like(std, math.sqrt(.5)) if args.sde == "cps" else std       # cps weighs |x' - mean|^2 by 1, not 1 / (2 std^2)
        ratio = policy_ratio(trajectory["x"][i + 1], mean, trajectory["means"][i], width, trajectory["noises"][i], args.ratio_norm)
        losses, clipped = grpo_loss(ratio, advantages, args.clip_range)
        if args.ratio_norm:
            losses = losses / (sigmas[i] - sigmas[i + 1])                       # / |dt|, its other half
        if args.kl:
            old, _ = transition(sigmas, i, trajectory["x"][i], reference[i], args.eta, args.sde)
            kl = ((mean - old) ** 2 / (2 * std ** 2)).flatten(1).mean(1)
            losses = losses + args.kl * kl
            stats["kl"] += (kl @ weights).item() / len(steps)
        loss = losses @ weights / len(steps)
        loss.backward()
        stats["loss"] += loss.item()
        stats["clip_fraction"] += (clipped @ weights).item() / len(steps)
        stats["max_ratio_error"] = max(stats["max_ratio_error"], (ratio.detach() - 1).abs().max().item())

    replay(pipe, trajectory, steps, see, **kwargs)
    return stats


def accumulate_nft(pipe, trajectory, advantages, args, weights, **kwargs):
    """backward() of nft_loss at as many noise levels of the schedule as steps are trained, else as accumulate_gradients. No sampler and
    no density enters: the clean latents are noised anew. The old policy is the one that is updated."""
    clean, sigmas, stats = trajectory["x"][-1].float(), trajectory["sigmas"], {"loss": 0.0, "kl": 0.0, "max_ratio_error": 0.0}
    levels = random.Random(f"{args.seed} {trajectory['step']} nft").sample(range(len(sigmas) - 1), len(trajectory["steps"]))
    for i in levels:
        noise = torch.stack([seeded_noise(clean.shape[1:], *seed, "nft", i) for seed in trajectory["seeds"]]).to(clean)
        x = ((1 - sigmas[i]) * clean + sigmas[i] * noise).to(trajectory["x"][0].dtype)
        v = velocity(pipe, x, sigmas[i], **kwargs).float()
        losses = nft_loss(v, v.detach(), noise - clean, advantages, args.nft_beta)
        if args.kl:
            with torch.no_grad(), adapters_off(*denoisers(pipe).values()):
                reference = velocity(pipe, x, sigmas[i], grad=False, **kwargs).float()
            kl = (v - reference).pow(2).flatten(1).mean(1)
            losses = losses + args.kl * kl
            stats["kl"] += (kl @ weights).item() / len(levels)
        loss = losses @ weights / len(levels)
        loss.backward()
        stats["loss"] += loss.item()
    return stats


# ---------------------------------------------------------------- the reward

def ask_rewards(judge, rewards, questions, samples):
    """What judge and further rewards say, as (kind, number, answer), and how many seconds they took: ("flex", pair, Verdict) for `questions`,
    [(pair, Comparison), ...], and (name, sample, value) for `samples`, [(sample, medium, prompt), ...]. Runs beside the next rollout."""
    began, answers = time.time(), []
    if questions:
        numbers, comparisons = zip(*questions)
        answers += [("flex", number, parse_verdict(text)) for number, text in zip(numbers, judge(comparisons))]
    for reward in rewards if samples else []:
        if reward[2]:
            numbers, media, prompts = map(list, zip(*samples))
            answers += [(reward[1], *found) for found in zip(numbers, reward_values(reward, media, prompts).tolist())]
    return answers, time.time() - began


def sample_advantages(pairs, answers, rewards, num_samples, args):
    """(advantages (N,), counts, an undecided text or none) of N samples, G of a prompt in a row, from {(kind, number): answer} of ask_rewards;
    groups that are not answered yet get no advantage that means anything. Undecided verdicts count for nobody. Further rewards are normalised
    inside their group and blended in by weight.

    counts: verdicts, undecided (failures, questions without an answer, among them), ties, first_wins, decided, dead (groups without a
    signal), scores, unscored (NaN, which counts for nobody), and the sums of further rewards.
    """
    G, parts, bad = args.group_size, [], []
    groups = [n // G for n in range(num_samples)]
    counts = dict.fromkeys(("verdicts", "undecided", "failures", "ties", "first_wins", "decided", "scores", "unscored"), 0)
    for weight, name, function in rewards:
        if function:
            values = torch.tensor([answers.get((name, n), math.nan) for n in range(num_samples)])
            parts.append((weight, normalize(values, groups)))
            counts[f"reward/{name}"] = values.nansum().item()
            missing = int(values.isnan().sum())
            counts["scores"], counts["unscored"] = counts["scores"] + len(values), counts["unscored"] + missing
            bad += [f"reward {name} has no value for {missing} of {len(values)} samples"] * (missing > 0)
            continue
        asked = [(pair, answers["flex", number]) for number, pair in enumerate(pairs) if ("flex", number) in answers]
        met, verdicts = zip(*asked) if asked else ([], [])
        rates = win_rates(met, verdicts, num_samples, len(args.category_weights) > 3, dict(zip("ABCD", args.category_weights)))
        parts.append((weight, group_advantages(rates, args.alpha, groups, std_floor=args.std_floor)))
        undecided = [verdict.text for verdict in verdicts if verdict.winner is None]
        bad += undecided
        counts.update(verdicts=len(verdicts), undecided=len(undecided), failures=sum(isinstance(text, Failure) for text in undecided),
                      ties=rates.num_ties, first_wins=rates.first_position_wins, decided=rates.num_decided)
    advantages = blend_advantages(parts).float().clamp(-args.adv_clip, args.adv_clip)
    counts["dead"] = sum((advantages[k:k + G] == 0).all().item() for k in range(0, num_samples, G))
    return advantages, counts, bad[:1]


# ---------------------------------------------------------------- around the loop

def open_models(args, ranks):
    """(judge or None, rewards, watched rewards, pipeline) that the options name; SystemExit says which is missing or does not fit."""
    film = " --world video" * (args.world == "video")
    asks = any(map(asks_judge, filter(None, [args.reward, args.watch])))
    need(args.model, "python sft.py --task generator" + film)
    if asks:
        need(args.judge or "out/", "python sft.py" + film)
    try:
        args.judge = args.judge or (str(find_judge("video-" * (args.world == "video"))) if asks else None)
        template = args.template and Path(args.template).read_text(encoding="utf-8")
        judge = open_judge(args.judge, args.max_new_tokens, batch_size=args.judge_batch, template=template) if args.judge else None
        rewards, watched = open_rewards(args.reward, judge), open_rewards(args.watch, judge) if args.watch else []
        if any(name == "flex" for _, name, _ in watched):
            raise ValueError("--watch flex: it takes rewards that give each sample a number; the judge's win rate is measured anyway")
        args.pipe_arg = {**know_toy_classes(args.model), **args.pipe_arg}
        pipe = load_pipeline(args.model, ranks.device, frozen_dtype(ranks, args.bf16, args.lora_rank), park=args.park_encoders,
                             unsharded=args.fsdp)
        if prediction_type(pipe) != "flow":
            raise ValueError(f"{args.model} predicts {prediction_type(pipe)}; the stochastic sampler needs a flow-matching pipeline")
    except ValueError as error:
        raise SystemExit(f"grpo.py: {error}") from None
    return judge, rewards, watched, pipe


def source_images(records):
    """{"image": [...]} for the pipeline's call, where prompt records carry a source image that is to be edited or animated, else nothing."""
    return {"image": [load_media(record["source"])[0] for record in records]} if "source" in records[0] else {}


def evaluate(pipe, watched, num, seed, args, ranks, **pipe_args):
    """(numbers, media, records) of `num` samples of held-out prompts by the ODE, which the ranks share; records and noise depend on seed."""
    records = list(open_records(args.eval_data, "prompt", num, seed))[:num]
    prompts = [record["prompt"] for record in records]
    media = sample_shares(pipe, prompts, [seed * 1_000_003 + i for i in range(len(prompts))], ranks, args.batch_size, **source_images(records), **pipe_args)
    numbers = toy_world(args.world).truth(records, media) if "toy_prompt" in records[0] else {}
    for reward in watched:
        values = reward_values(reward, media[ranks.rank::ranks.world], prompts[ranks.rank::ranks.world])
        numbers[reward[1]] = total(values.nansum().item(), ranks) / max(total((~values.isnan()).sum().item(), ranks), 1)
    return numbers, media, records


def win_rate_over(judge, media, others, records, seed, ranks):
    """The judge's share of wins of `media` over `others`, shown in random order: the reward as it looks on held-out prompts."""
    rng = random.Random(seed)
    flips = [rng.random() < .5 for _ in media]
    mine = range(ranks.rank, len(media), ranks.world)
    shown = [(load_media(others[i]), load_media(media[i]))[::1 if flips[i] else -1] for i in mine]
    texts = judge([Comparison(records[i]["prompt"], *pair) for i, pair in zip(mine, shown)])
    wins = [.5 if winner == 0 else float((winner == 2) == flips[i]) for i, winner in zip(mine, [parse_verdict(text).winner for text in texts]) if winner is not None]
    num = total(len(wins), ranks)
    return {"win_rate": total(sum(wins), ranks) / num} if num else {}           # a judge that says nothing has no opinion


def lay_out(num_prompts, group_size, batch_size, ranks):
    """(chunks, split, lag): how a step's P G samples, numbered prompt by prompt, lie on the ranks.

    chunks: this rank's numbers, `batch_size` a call; those from P G on are surplus, they repeat the first samples and weigh nothing.
    split: the groups that lie on several ranks. lag: so many chunks after a chunk all its groups are whole.
    """
    share = math.ceil(num_prompts * group_size / ranks.world)
    mine = range(ranks.rank * share, (ranks.rank + 1) * share)
    chunks = [mine[i:i + batch_size] for i in range(0, share, batch_size)]
    split = {k for k in range(num_prompts) if k * group_size // share < (k * group_size + group_size - 1) // share}
    return chunks, split, len(chunks) if split else math.ceil((group_size - 1) / batch_size) * (batch_size % group_size > 0)


def open_questions(pairs, media, asked, split, group_size, ranks):
    """The numbers of the pairs that are to be asked about now: both samples are there, {number: frames}. Groups on several ranks share theirs."""
    return [number for number, (i, j) in enumerate(pairs) if i in media and j in media and number not in asked
            and (i // group_size not in split or number % ranks.world == ranks.rank)]


def reward_row(counts, num_prompts, num_samples):
    """The log's shares and means, of the counts of sample_advantages."""
    decided, of = max(counts["decided"], 1), max(counts["verdicts"], 1)
    return dict(undecided=counts["undecided"] / of, judge_failures=counts["failures"] / of, unscored=counts["unscored"], verdicts=counts["verdicts"],
                ties=counts["ties"] / of, first_position_share=counts["first_wins"] / decided, dead_groups=counts["dead"] / num_prompts,
                **{name: value / num_samples for name, value in counts.items() if name.startswith("reward/")})


# ---------------------------------------------------------------- the loop

def main(argv=None):
    args, ranks = parse_args(argv), start_ranks()
    if min(args.eta, args.sde_steps, args.eval_num) <= 0:
        raise SystemExit("--eta, --sde-steps and --eval-num must be above 0: without noise a group's images are equal")
    judge, rewards, watched, pipe = open_models(args, ranks)
    torch.manual_seed(args.seed)
    records = open_records(args.data, "prompt", args.data_num, args.seed, args.skip_bad)
    if args.num_prompts > len(records):
        raise SystemExit(f"a step takes {args.num_prompts} prompts and {args.data} holds {len(records)}: the same one twice would give the same images")
    modules = {f"{name}.": module for name, module in denoisers(pipe).items()}
    for module in modules.values():
        prepare_training(module, ranks, args.lora_rank, args.lora_alpha, args.lora_targets, grad_ckpt=args.grad_ckpt, compile=args.compile, fsdp=args.fsdp,
                         bf16=args.bf16)
    params = {prefix + name: p for prefix, module in modules.items() for name, p in trainable(module).items()}
    optimizers = make_optimizers(params, args.optim, args.lr, args.weight_decay)
    pipe_args = dict(autocast=torch.bfloat16 if args.bf16 else None, **args.pipe_arg)
    before, media_before, held_out = evaluate(pipe, watched, args.eval_num, 7, args, ranks, **pipe_args)
    num_watched = min(args.eval_num, 192)
    base_media = evaluate(pipe, watched, num_watched, 5, args, ranks, **pipe_args)[1] if args.eval_every and args.eval_every <= args.max_steps else []
    first = load_checkpoint(args.out, params, optimizers, vars(args), ranks) if args.resume else 0
    log = Log(args.out, vars(args), ranks, first)

    G, num_samples = args.group_size, args.num_prompts * args.group_size
    chunks, split, lag = lay_out(args.num_prompts, G, args.batch_size, ranks)
    accumulate, thread = accumulate_nft if args.loss == "nft" else accumulate_gradients, ThreadPoolExecutor(1)              # for the judge
    if ranks.rank == 0:
        print(f"{sum(p.numel() for p in params.values()) / 1e6:.2f}M trained parameters, judge {args.judge}; a step: {num_samples} images = {args.num_prompts} "
              f"prompts x {G}, {sum(map(len, chunks))} on each of {ranks.world} ranks in {len(chunks)} batches; {len(split)} groups on several ranks", flush=True)
    bar = tqdm(range(first, args.max_steps), initial=first, total=args.max_steps, disable=ranks.rank > 0)
    for step in bar:
        clock, spent, stats, worst = time.time(), {"judge": 0.0, "idle": 0.0}, {}, 0.0
        lr = set_lr(optimizers, args.lr, step, args.warmup_steps, args.max_steps)
        indices = batch_indices(records, args.num_prompts, step, args.seed)
        prompt_of = [records[index]["prompt"] for index in indices for _ in range(G)]
        pairs = [(k * G + i, k * G + j) for k, index in enumerate(indices if any(not function for *_, function in rewards) else [])
                 for i, j in schedule_pairs(G, args.pairs, random.Random(f"{args.seed} {step} {index}"), args.both_orders)]

        # samples; judge and rewards are asked about them in the thread as soon as both of a pair are there
        rollouts, jobs, media, asked = [], [], {}, set()
        for chunk in chunks:
            samples = [n % num_samples for n in chunk]
            call = dict(prompt=[prompt_of[n] for n in samples], **source_images([records[indices[n // G]] for n in samples]))
            made, trajectory = rollout(pipe, seeds=[(args.seed, step, indices[n // G], n % G) for n in samples], args=args, step=step, **call, **pipe_args)
            rollouts.append((chunk, call, trajectory))
            made = [(n, frames) for n, frames in zip(chunk, made) if n < num_samples]
            media.update(made + (gather([item for item in made if item[0] // G in split], ranks) if split else []))
            numbers = open_questions(pairs, media, asked, split, G, ranks)
            asked.update(numbers)
            questions = [(number, Comparison(prompt_of[i], load_media(media[i]), load_media(media[j]))) for number, (i, j) in zip(numbers, [pairs[number] for number in numbers])]
            jobs.append(thread.submit(ask_rewards, judge, rewards, questions, [(n, frames, prompt_of[n]) for n, frames in made]))
        spent["rollout"] = time.time() - clock

        # updates; each micro-batch waits only for the answers about its own groups
        answers = {}
        for epoch in range(args.epochs):
            for number, (chunk, call, trajectory) in enumerate(rollouts):
                while jobs and len(rollouts) - len(jobs) <= number + lag:       # all ranks gather at the same places
                    waiting = time.time()
                    found, seconds = jobs.pop(0).result()
                    answers.update(((kind, n), answer) for kind, n, answer in gather(found, ranks))
                    spent["judge"], spent["idle"] = spent["judge"] + seconds, spent["idle"] + time.time() - waiting
                advantages = sample_advantages(pairs, answers, rewards, num_samples, args)[0][[n % num_samples for n in chunk]].to(ranks.device)
                weights = torch.tensor([float(n < num_samples) / num_samples for n in chunk], device=ranks.device)
                found = accumulate(pipe, trajectory, advantages, args, weights, **call, **pipe_args)
                worst = max(worst, found.pop("max_ratio_error") * (epoch == 0))
                stats = {k: stats.get(k, 0) + v / args.epochs for k, v in found.items()}
            counts, bad = sample_advantages(pairs, answers, rewards, num_samples, args)[1:]
            for missing, of in (("undecided", "verdicts"), ("unscored", "scores")):
                if counts[missing] > args.max_parse_fail * counts[of]:
                    raise SystemExit(f"{counts[missing]:.0f} of {counts[of]:.0f} {of} are {missing}, more than --max-parse-fail "
                                     f"{args.max_parse_fail}. One of them:\n{bad[0][:2000]}")
            grad_norm = optimizer_step(list(params.values()), optimizers, ranks, args.max_norm)
        spent["train"] = time.time() - clock - spent["rollout"] - spent["idle"]

        row = {k: total(v, ranks) for k, v in stats.items()} | {"max_ratio_error": max(gather([worst], ranks))} | reward_row(counts, args.num_prompts, num_samples)
        if step == first and ranks.rank == 0:
            print(f"max |ratio - 1| at the first update: {row['max_ratio_error']:.3g}", flush=True)
        if args.eval_every and (step + 1) % args.eval_every == 0:
            found, samples, prompts = evaluate(pipe, watched, num_watched, 5, args, ranks, **pipe_args)
            found.update(win_rate_over(judge, samples, base_media, prompts, args.seed, ranks) if judge else {})
            row.update({f"held_out_{k}": v for k, v in found.items()})
            if ranks.rank == 0:
                draw_before_after(base_media, samples, Path(args.out, f"samples_{step + 1:06d}.png"), 12)
        log.write(step=step + 1, **row, lr=lr, grad_norm=grad_norm, **{f"{k}_s": v for k, v in spent.items()}, peak_gib=peak_gib())
        bar.set_postfix(ties=f"{row['ties']:.2f}", kl=f"{row['kl']:.3g}", true=row.get("held_out_true", ""))
        if step + 1 in (1, args.max_steps) or (step + 1) % args.save_every == 0:
            save_checkpoint(args.out, step + 1, params, optimizers, vars(args), ranks)

    after, media_after, _ = evaluate(pipe, watched, args.eval_num, 7, args, ranks, **pipe_args)
    if judge:
        after.update(win_rate_over(judge, media_after[:256], media_before[:256], held_out, args.seed, ranks))
        before.update({"win_rate": .5} if "win_rate" in after else {})
    if args.lora_rank:
        save_adapter(Path(args.out, "adapter"), modules, "pytorch_lora_weights.safetensors")
    save_pipeline(pipe, Path(args.out, "model"))
    if ranks.rank == 0:
        draw_curves(log.rows, ["held_out_win_rate", "held_out_true", "held_out_cast", "kl", "ties", "grad_norm"], Path(args.out, "curves.png"))
        draw_before_after(media_before, media_after, Path(args.out, "before_after.png"))
        print(f"{len(media_after)} held-out samples    before    after")
        for name, value in before.items():
            print(f"  {name:20s} {value:8.3f} {after[name]:8.3f}")
        log.write(**{f"{name}_{when}": v for when, d in (("before", before), ("after", after)) for name, v in d.items()})


if __name__ == "__main__":
    main()
