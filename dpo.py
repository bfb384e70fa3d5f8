"""Prefer: direct preference optimisation of a judge on pairs of its own verdict traces, or of a generator on pairs of images or videos.

    python dpo.py                                                      the toy judge that sft.py made
    python dpo.py --task generator                                     the toy generator, on pairs that were sifted from its samples
    torchrun --nproc_per_node=8 dpo.py --model JUDGE --data pairs.jsonl --lora-rank 64 --optim adamw --lr 5e-6
    torchrun --nproc_per_node=8 dpo.py --task generator --model stabilityai/sdxl-turbo --data pairs.jsonl --eval-data held_out.txt \\
        --eval-num 16 --beta 5000 --lora-rank 64 --lr 1e-5 --batch-size 4 --pipe-arg height=512 width=512 guidance_scale=0 num_inference_steps=1

One loop and one loss: the margin between the chosen and the rejected is widened against the reference, the policy before: adapters off,
or a frozen copy when all weights train.
judge      From pairs, people's choices between two images: it writes several traces a pair, traces with the right winner are preferred to
           traces with the wrong one (data.rank_traces). From preference records, {"chosen", "rejected"}, as they are.
generator  From pairs: Diffusion-DPO (arXiv 2311.12908), where minus half the denoising error stands for the log-probability; pipelines that
           predict epsilon, v or the velocity of a flow.
Legend: B pairs, T tokens, V vocabulary, C F H W latent of F frames.
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

from data import (TOYS, WINNERS, batch_indices, build_preferences, comparison, encode, in_world, know_toy_classes, load_frames, medium_of, open_records, read_records,
                  toy_world, write_jsonl)
from reward import Candidate, Comparison, LocalJudge, TEMPLATE, evaluate_judge, format_verdict
# toolbox and driver from sft.py; paste those blocks here to stand alone
from sft import (Log, adapters_off, denoisers, draw_before_after, draw_curves, draw_verdict, encode_media, enter, frozen_dtype, gather, generator, has_bf16,
                 load_checkpoint, load_pipeline, make_optimizers, need, num_frames_of, optimizer_step, peak_gib, pipe_arg, predict, prediction_type, prepare_training,
                 sample_shares, save_adapter, save_checkpoint, save_judge, save_pipeline, seeded_noise, set_lr, shard, start_ranks, token_logps, total,
                 trainable)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    # model
    add("--task", choices=["judge", "generator"], default="judge", help="what is trained: a judge or a diffusers pipeline")
    add("--model", help="folder or hub id to start from  [out/judge-sft/model, out/generator-sft/model; video world out/video-...]")
    add("--template", help="file with the judge's instruction, {prompt} and {medium} in it; default: the model's own, or reward.TEMPLATE")
    # data
    add("--data", help="JSONL of pairs (for a judge to sample traces for) or of preferences; toy: pairs made as needed  [toy, out/sift/pairs.jsonl]")
    add("--data-num", type=int, default=800, help="pairs that traces are sampled for; toy pairs for a generator")
    add("--num-traces", type=int, default=4, help="traces per pair")
    add("--temperature", type=float, default=.7, help="of the sampled traces")
    add("--eval-data", default="toy:test", help="JSONL of pairs (judge) or prompts (generator) that are not trained on")
    add("--eval-num", type=int, help="records of it that are used, before and after  [judge 400, generator 1024]")
    add("--judge-batch", type=int, help="pairs judged at a time  [200, where verdicts are long 16]")
    add("--max-tokens", type=int, default=8192, help="a longer record is refused, never cut")
    add("--skip-bad", action=flag, default=False, help="drop malformed lines and print how many")
    add("--world", choices=["image", "video"], default="image", help="which toy world is meant by toy: still or in motion")
    # generator
    add("--pipe-arg", type=pipe_arg, nargs="*", default=[], help="key=value for the pipeline's call, as height=512; guidance is off in training unless "
        "guidance_scale is among them")
    add("--sigma-mean", type=float, default=1.5, help="noise levels are sigmoid(N(this, 1))")
    # lora
    add("--lora-rank", type=int, help="0: all weights are trained, against a frozen copy  [judge 16, generator 32]")
    add("--lora-alpha", type=float, help="default: the rank")
    add("--lora-targets", help="regex on the names of linear layers  [judge: of the language model's blocks, generator: of its denoiser's]")
    add("--adapter", help="folder of a LoRA adapter, ours or PEFT's, to train on; instead of a new one, and off in the reference")
    add("--freeze", nargs="*", default=[], choices=["vision", "projector", "language"], help="parts of the judge that stay as they are")
    add("--merge", action=flag, default=True, help="write and examine the whole model; without, a LoRA run leaves only its adapter")
    # loss
    add("--beta", type=float, help="strength of the tie to the reference  [judge .3, paper: 0.1; generator 50, paper: 5000]")
    add("--precompute-ref", action=flag, default=False, help="the reference's log-probabilities of all records before training, not at every step")
    add("--share-prompt", action=flag, help="chosen and rejected after one copy of images and prompt  [where the model can]")
    # optim
    add("--optim", choices=["adamw", "muon"], default="adamw")
    add("--lr", type=float, help="peak learning rate  [judge 3e-4, generator 1e-3]")
    add("--weight-decay", type=float, default=0.0)
    add("--warmup-steps", type=int, default=5)
    add("--max-steps", type=int, help="optimizer steps  [judge 60, generator 200]")
    add("--batch-size", type=int, help="pairs per rank per micro-step  [judge 16, generator 32]")
    add("--accumulation", type=int, default=1, help="micro-steps per optimizer step")
    add("--max-norm", type=float, default=1.0, help="the gradient norm is clipped to this")
    # run
    add("--bf16", action=flag, help="compute in bfloat16, keep what is trained in float32; default: where the hardware multiplies in it")
    add("--fsdp", action=flag, default=False, help="split weights, gradients and optimizer over the ranks (FSDP2) instead of copying them")
    add("--grad-ckpt", action=flag, default=False, help="gradient checkpointing: less memory, a third more time")
    add("--compile", action=flag, default=False, help="torch.compile each block")
    add("--max-new-tokens", type=int, help="longest verdict written  [toy data 256, else 2048]")
    add("--seed", type=int, default=0)
    add("--out", help="run folder  [out/judge-dpo, out/generator-dpo; video world out/video-...]")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action=flag, default=False, help="continue from the newest checkpoint in --out")
    args = parser.parse_args(argv)
    args.pipe_arg = dict(args.pipe_arg)
    judge = args.task == "judge"
    if not judge and (args.adapter or args.precompute_ref):
        parser.error("--adapter and --precompute-ref are for judges: a generator is asked at new noise levels in every step")
    args.data = args.data or ("toy" if judge else "out/sift/pairs.jsonl")
    out, args.data, args.eval_data = in_world(args.world, args.data, args.eval_data)
    defaults = dict(model=f"{out}{args.task}-sft/model", out=f"{out}{args.task}-dpo",
                    eval_num=400 if judge else 1024, lora_rank=16 if judge else 32, beta=.3 if judge else 50, lr=3e-4 if judge else 1e-3,
                    max_steps=60 if judge else 200, batch_size=16 if judge else 32, bf16=has_bf16(),
                    lora_targets=r"(language|text)_model\..*_proj\w*$" if judge else
                    r"blocks\.\d+\..*(to_(q|k|v|out\.0)|add_(q|k|v)_proj|to_add_out|proj_mlp|proj_out|net\.(0\.proj|2))$")
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    args.max_new_tokens = args.max_new_tokens or (256 if args.data.split(":")[0] in TOYS else 2048)
    args.judge_batch = args.judge_batch or (200 if args.max_new_tokens <= 256 else 16)
    return args


# ---------------------------------------------------------------- the loss

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """(losses, chosen rewards, rejected rewards), each (B,), from the log-probabilities of two responses or samples, (B,).

    Eq. 7 of arXiv 2305.18290: -log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))). Equal policy and
    reference give ln 2. A reward is beta times the log-ratio to the reference.
    """
    chosen_rewards, rejected_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards.detach(), rejected_rewards.detach()


# ---------------------------------------------------------------- the judge: log-probabilities of two responses

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


class Judge:
    """Any image-text-to-text model of transformers, on preference records or pairs. `before` is its exam on held-out pairs."""
    window, adapter_file, curves, unit = 8, "adapter_model.safetensors", ["loss", "rewards/margin", "rewards/accuracy"], "pairs"

    def __init__(self, args, ranks):
        self.args, self.ranks = args, ranks
        ready = Path(args.data).is_file() and '"chosen"' in open(args.data).readline()
        self.held_out = list(open_records(args.eval_data, "pair", args.eval_num, 1))[:args.eval_num] if ranks.rank == 0 else []
        template = args.template and Path(args.template).read_text()
        judge = LocalJudge(args.model, template=template, batch_size=args.judge_batch, max_new_tokens=args.max_new_tokens)
        self.before = self.exam(judge) if ranks.rank == 0 else None
        self.records = read_records(args.data, "preference", args.skip_bad) if ready else sample_preferences(args, judge, ranks)
        del judge                                                               # its memory is the training's now
        torch.manual_seed(args.seed)
        lora = args.lora_rank or args.adapter
        judge = LocalJudge(args.model, template=template, device="cpu" if args.fsdp else ranks.device, dtype=frozen_dtype(ranks, args.bf16, lora))
        self.model, self.processor, self.template = judge.model, judge.processor, judge.templates[Comparison] or TEMPLATE
        self.score_template = judge.templates[Candidate]
        self.model.set_attn_implementation("sdpa" if ranks.device.type == "cuda" else "eager")
        self.share = can_share_prompt(self.model) if args.share_prompt is None else args.share_prompt
        self.modules, self.reference, self.table = {"base_model.model.": self.model}, self.model, None
        if not lora and not args.precompute_ref:
            self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
            shard(self.reference, ranks, args.fsdp, args.bf16)
        prepare_training(self.model, ranks, args.lora_rank, args.lora_alpha, args.lora_targets, args.adapter, args.freeze, args.grad_ckpt,
                         args.compile, args.fsdp, args.bf16)
        if args.precompute_ref:                                                 # every rank does as many batches, so that none waits in vain
            shares = [range(len(self.records))[i:i + args.batch_size] for i in range(0, len(self.records), args.batch_size)]
            rounds = [shares[(i + ranks.rank) % len(shares)] for i in range(0, len(shares), ranks.world)]
            found = [(list(part), self.reference_logps(self.batch(part)).cpu()) for part in tqdm(rounds, desc="reference", disable=ranks.rank > 0)]
            self.table = torch.empty(2, len(self.records), dtype=torch.float64)
            for part, values in gather(found, ranks):
                self.table[:, part] = values

    def batch(self, indices, step=0):
        """(the indices, what response_logps takes, the share of padding) for these records."""
        pairs = [self.records[i] for i in indices]
        responses = [(p["chosen"], p["rejected"]) for p in pairs] if self.share else [(p[k],) for k in ("chosen", "rejected") for p in pairs]
        batch = encode(self.processor, pairs if self.share else pairs * 2, responses, self.template, self.args.max_tokens)
        return list(indices), {k: v.to(self.ranks.device) for k, v in batch.items()}, 1 - batch["attention_mask"].float().mean().item()

    def logps(self, batch, policy=None):
        """((2, B) of chosen and rejected, what else to log of each pair)."""
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.args.bf16):
            logps, lengths = enter(policy or self.model, response_logps, batch[1])
        return logps, {"nll": -logps[0] / lengths[0], "padding": torch.full_like(logps[0], batch[2])}

    def reference_stats(self, reference):
        return {}

    @torch.no_grad()
    def reference_logps(self, batch):
        if self.table is not None:
            return self.table[:, batch[0]].to(self.ranks.device)
        with adapters_off(self.model) if self.args.lora_rank or self.args.adapter else contextlib.nullcontext():
            return self.logps(batch, self.reference)[0]

    def exam(self, judge):
        labels = [WINNERS[p["winner"]] for p in self.held_out]
        return {**evaluate_judge(judge, [comparison(p) for p in self.held_out], labels, random.Random(0)), "labels": labels}

    def evaluate(self, out):
        """The exam again, and verdict.png: before and after on a pair that was mended, if any. Rank 0's."""
        if self.ranks.rank:
            return None
        before, after = self.before, self.exam(LocalJudge(out / "model", batch_size=self.args.judge_batch, max_new_tokens=self.args.max_new_tokens))
        right = [[v.winner and (3 - v.winner if flip else v.winner) == label for v, flip, label in zip(d["verdicts"], d["flipped"], d["labels"])]
                 for d in (before, after)]
        mended = [i for i in range(len(self.held_out)) if right[1][i] and not right[0][i]]       # shown: one whose categories stayed, if any
        stayed = [sum(a.winner == b.winner for a, b in zip(*(d["verdicts"][i].categories for d in (before, after)))) for i in mended]
        shown = mended[stayed.index(max(stayed))] if mended else 0
        pair = comparison(self.held_out[shown], swap=before["flipped"][shown])
        texts = [f"{when}\n\n{format_verdict(d['verdicts'][shown], pair.prompt)}" for when, d in (("before", before), ("after", after))]
        draw_verdict([pair.media_1, pair.media_2], texts, out / "verdict.png")
        return after

    def save(self, folder):
        save_judge(folder, self.model, self.processor, self.template, self.score_template)


# ---------------------------------------------------------------- the generator: denoising errors of two samples

class Generator:
    """A diffusers pipeline that denoises a VAE's latents, on pairs of images or videos, which are encoded once, before training. `before`
    are the numbers of its samples for held-out prompts."""
    window, adapter_file, unit = 1, "pytorch_lora_weights.safetensors", "samples"
    curves = ["loss", "rewards/margin", "rewards/accuracy", "error/winner", "error/loser", "grad_norm"]

    def __init__(self, args, ranks):
        self.args, self.ranks = args, ranks
        args.pipe_arg = {**know_toy_classes(args.model), **args.pipe_arg}
        self.pipe = pipe = load_pipeline(args.model, ranks.device, frozen_dtype(ranks, args.bf16, args.lora_rank))
        models = denoisers(pipe)
        if args.fsdp and len(models) > 1:
            raise ValueError("--fsdp: ranks at different noise levels would gather the shards of different experts. Train without it")
        self.kind = prediction_type(pipe)
        if self.kind not in ("flow", "epsilon", "v_prediction"):
            raise ValueError(f"{args.model}: its scheduler predicts {self.kind!r}; expected epsilon, v_prediction or a flow")
        embedded = any(m.config.get("guidance_embeds") or m.config.get("time_cond_proj_dim") for m in models.values())      # then it is an input like others
        self.call = dict(autocast=torch.bfloat16 if args.bf16 else None, **({} if embedded else {"guidance_scale": 0}) | args.pipe_arg)
        records = list(open_records(args.data, "pair", args.data_num, args.seed, args.skip_bad))
        self.records = [r for r in records if WINNERS[r["winner"]]]
        if ranks.rank == 0:
            print(f"{args.data}: {len(self.records)} pairs, {len(records) - len(self.records)} ties are dropped", flush=True)
        if not self.records:
            raise ValueError(f"{args.data} holds nothing but ties: there is nothing to prefer")
        self.latents = self.encode_pairs()
        self.held_out = list(open_records(args.eval_data, "prompt", args.eval_num, 7))[:args.eval_num]
        self.before = self.sample()
        torch.manual_seed(args.seed)
        self.modules, self.reference = {f"{name}.": model for name, model in models.items()}, copy.copy(pipe)
        for name, model in models.items():
            if not args.lora_rank:
                frozen = vars(self.reference)[name] = copy.deepcopy(model).requires_grad_(False)
                shard(frozen, ranks, args.fsdp, args.bf16)
            prepare_training(model, ranks, args.lora_rank, args.lora_alpha, args.lora_targets, grad_ckpt=args.grad_ckpt, compile=args.compile,
                             fsdp=args.fsdp, bf16=args.bf16)
            model.eval()                                                        # dropout would part policy and reference

    def encode_pairs(self):
        """Clean latents of all records, (N, 2, ...) on the CPU, winners first. The ranks encode shares, a batch at a time."""
        size = {k: v for k, v in self.args.pipe_arg.items() if k in ("height", "width")}
        num_frames, latents = num_frames_of(self.pipe, self.args.pipe_arg), {}
        for start in range(0, len(self.records), per_round := self.args.batch_size * self.ranks.world):
            mine = range(len(self.records))[start + self.ranks.rank:start + per_round:self.ranks.world]
            media = [load_frames(r, m, num_frames, self.pipe) for r in (self.records[i] for i in mine) for m in r[medium_of(r)][::3 - 2 * WINNERS[r["winner"]]]]
            found = encode_media(self.pipe, media, **size).cpu().unflatten(0, (-1, 2)) if mine else []
            latents.update(gather(zip(mine, found), self.ranks))
        return torch.stack([latents[i] for i in range(len(self.records))])

    def batch(self, indices, step):
        """(latents (2B, ...), winners first, their timesteps (2B,), what should be predicted there, prompts). Noise and timestep are
        functions of (seed, step, record), the same for winner and loser."""
        x0, seed, scheduler = self.latents[indices], self.args.seed, self.pipe.scheduler                        # (B, 2, ...)
        noise = torch.stack([seeded_noise(x0.shape[2:], seed, step, i) for i in indices])[:, None].expand_as(x0)
        if self.kind == "flow":                                                 # x = (1 - sigma) x0 + sigma noise
            b = torch.stack([seeded_noise((), seed, step, i, "sigma") for i in indices]).add(self.args.sigma_mean).sigmoid()
            t, a = b * scheduler.config.num_train_timesteps, 1 - b
        else:                                                                   # x = sqrt(acp) x0 + sqrt(1 - acp) noise
            t = torch.stack([torch.randint(scheduler.config.num_train_timesteps, (), generator=generator(seed, step, i, "t")) for i in indices])
            a, b = (z[t].sqrt() for z in (scheduler.alphas_cumprod.cpu(), 1 - scheduler.alphas_cumprod.cpu()))
        a, b = (z.view(-1, *[1] * (x0.ndim - 1)) for z in (a, b))
        target = {"flow": noise - x0, "epsilon": noise, "v_prediction": a * noise - b * x0}[self.kind]
        x, target = (z.transpose(0, 1).flatten(0, 1).to(self.ranks.device) for z in (a * x0 + b * noise, target))
        return x, t.repeat(2).to(self.ranks.device), target, [self.records[i]["prompt"] for i in indices]

    def logps(self, batch, policy=None):
        """((2, B) of winner and loser, what else to log of each pair): minus half the mean squared denoising error, by which dpo_loss is
        Eq. 14 of arXiv 2311.12908 as its authors compute it, T omega(lambda_t) and the number of elements folded into beta."""
        x, t, target, prompts = batch
        predicted = predict(policy or self.pipe, x, t, grad=policy is None, prompt=prompts * 2, **self.call)
        error = (predicted.double() - target).pow(2).flatten(1).mean(1).unflatten(0, (2, -1))       # whose last digits beta magnifies
        return -error / 2, {"error/winner": error[0].detach(), "error/loser": error[1].detach()}

    def reference_stats(self, reference):
        """The reference's errors, (B,) each: where winner's and loser's both rise, these tell drift from harder noise levels."""
        return {"error/winner_ref": -2 * reference[0], "error/loser_ref": -2 * reference[1]}

    @torch.no_grad()
    def reference_logps(self, batch):
        with adapters_off(*self.modules.values()) if self.args.lora_rank else contextlib.nullcontext():
            return self.logps(batch, self.reference)[0]

    def sample(self):
        """Samples for the held-out prompts by the stock sampler, the work split over the ranks, and in the toy world what is true of them."""
        options = dict(autocast=self.call["autocast"] if self.ranks.device.type == "cuda" else None, **self.args.pipe_arg)
        media = sample_shares(self.pipe, [r["prompt"] for r in self.held_out], [7 * 1_000_003 + i for i in range(len(self.held_out))], self.ranks,
                              2 * self.args.batch_size, **options)
        truth = toy_world(self.args.world).truth(self.held_out, media) if "toy_prompt" in self.held_out[0] else {}
        return {**truth, "media": media}

    def evaluate(self, out):
        """The samples again, and before_after.png: the same prompts and seeds, a row before and a row after."""
        after = self.sample()
        if self.ranks.rank == 0:
            draw_before_after(self.before["media"], after["media"], out / "before_after.png")
        return after

    def save(self, folder):
        save_pipeline(self.pipe, folder)


# ---------------------------------------------------------------- the loop

def main(argv=None):
    args, ranks = parse_args(argv), start_ranks()
    need(args.model, "python sft.py" + " --task generator" * (args.task == "generator") + " --world video" * (args.world == "video"))
    need(args.data, f"python data.py sift toy:train --model {args.model} --out {args.data}")
    task = Judge(args, ranks) if args.task == "judge" else Generator(args, ranks)
    params = {prefix + name: p for prefix, module in task.modules.items() for name, p in trainable(module).items()}
    optimizers = make_optimizers(params, args.optim, args.lr, args.weight_decay)
    first = load_checkpoint(args.out, params, optimizers, vars(args), ranks) if args.resume else 0
    log = Log(args.out, vars(args), ranks, first)

    per_step = args.batch_size * args.accumulation * ranks.world
    if ranks.rank == 0:
        print(f"{args.task}: {sum(p.numel() for p in params.values()) / 1e6:.2f}M trained parameters, {len(task.records)} preferences, "
              f"{per_step} a step = {args.batch_size} x {args.accumulation} accumulated x {ranks.world} ranks", flush=True)
    bar = tqdm(range(first, args.max_steps), initial=first, total=args.max_steps, disable=ranks.rank > 0)
    for step in bar:
        began, sums = time.time(), {}
        lr = set_lr(optimizers, args.lr, step, args.warmup_steps, args.max_steps)
        indices = batch_indices(task.records, per_step, step, args.seed, task.window)[ranks.rank::ranks.world]
        for i in range(0, len(indices), args.batch_size):
            batch = task.batch(indices[i:i + args.batch_size], step)
            reference = task.reference_logps(batch)                             # (2, B)
            logps, stats = task.logps(batch)
            losses, chosen_rewards, rejected_rewards = dpo_loss(*logps, *reference, args.beta)
            (losses.sum() / per_step).backward()
            for name, value in {"loss": losses, "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
                                "rewards/margin": chosen_rewards - rejected_rewards,
                                "rewards/accuracy": (chosen_rewards > rejected_rewards).float(), **stats, **task.reference_stats(reference)}.items():
                sums[name] = sums.get(name, 0) + value.sum().item()
        grad_norm = optimizer_step(list(params.values()), optimizers, ranks, args.max_norm)
        row = {name: total(value, ranks) / per_step for name, value in sums.items()}
        log.write(step=step + 1, **row, lr=lr, grad_norm=grad_norm, records_per_s=per_step / (time.time() - began), peak_gib=peak_gib())
        bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['rewards/accuracy']:.2f}")
        if step + 1 in (1, args.max_steps) or (step + 1) % args.save_every == 0:
            save_checkpoint(args.out, step + 1, params, optimizers, vars(args), ranks)

    if args.lora_rank or args.adapter:
        save_adapter(Path(args.out, "adapter"), task.modules, task.adapter_file)
    if merged := args.merge or not (args.lora_rank or args.adapter):
        task.save(Path(args.out, "model"))
    if ranks.rank == 0:
        draw_curves(log.rows, task.curves, Path(args.out, "curves.png"))
    after = task.evaluate(Path(args.out)) if merged else None
    if ranks.rank == 0 and merged:
        print(f"{len(task.held_out)} held-out {task.unit}".ljust(24), "before   after")
        numbers = {name: value for name, value in task.before.items() if isinstance(value, float)}
        for name, value in numbers.items():
            print(f"  {name:22s} {value:6.3f}  {after[name]:6.3f}")
        log.write(**{f"{name}_{when}": d[name] for when, d in (("before", task.before), ("after", after)) for name in numbers})


if __name__ == "__main__":
    main()
