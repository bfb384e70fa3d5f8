"""The stochastic sampler, the objective, the reward of a group, whole runs."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributions import Normal

import data
import grpo
import reward
import sft
from conftest import ROOT
from data import run_pipeline, seeded_generator
from test_dpo import GOOD
from test_sft import rows, weights

PROMPTS = ["a red circle", "a blue star above a green square"]
RECORDS = [{"prompt": prompt} for prompt in PROMPTS]
SEEDS = [(0, 0, 0, 0), (0, 0, 1, 1)]                 # (seed, step, prompt's index, member)
FLEX = data.Reward(1.0, "flex", None)


@pytest.fixture(scope="module")
def pipe(generator_folder):
    return data.load_pipeline(generator_folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def files(toy_folder, tmp_path_factory):
    """A folder of a few prompts, and of rewards that need no judge."""
    folder = tmp_path_factory.mktemp("files")
    prompts = Path(toy_folder, "prompts.txt").read_text().splitlines()
    (folder / "prompts.txt").write_text("\n".join(prompts[:6]) + "\n")
    (folder / "held_out.txt").write_text("\n".join(prompts[6:10]) + "\n")
    (folder / "rewards.py").write_text(
        "import time\nimport numpy as np\n"
        "def bright(media, prompts):\n    return [float(np.asarray(frames[0]).mean()) for frames in media]\n"
        "def missing(media, prompts):\n    return [float('nan')] * len(media)\n"
        "def hangs(media, prompts):\n    print('hanging', flush=True)\n    time.sleep(600)\n"
        "def breaks(media, prompts):\n    raise KeyError('a broken reward')\n")
    return folder


def options(files, generator_folder, out, *extra):
    """The words of a run that lasts seconds; `extra` override them."""
    return ["--model", generator_folder, "--data", f"{files}/prompts.txt", "--eval-data", f"{files}/held_out.txt",
            "--watch", "none", "--eval-every", "2", "--group-size", "3", "--pairs", "all", "--num-prompts", "2", "--batch-size", "6",
            "--max-steps", "1", "--warmup-steps", "1", "--max-new-tokens", "8", "--no-bf16", "--out", str(out), *extra]


def arguments(*extra):
    return grpo.parse_args(["--kl", "0", "--no-bf16", *extra])


def call(pipe, **extra):
    return {**pipe.call_args, "output_type": "pt", **extra}


# ---------------------------------------------------------------- the sampler

def test_the_ratio_is_that_of_normal_densities():
    x, mean, old = torch.randn(3, 3, 9, 32)
    std = torch.tensor(.3)
    expected = (Normal(mean, std).log_prob(x) - Normal(old, std).log_prob(x)).mean((1, 2)).exp()
    torch.testing.assert_close(grpo.policy_ratio(x, mean, old, std), expected)


def test_sde_step_worked_by_hand():
    """sigma .5 -> .4, eta .7: s^2 = .49 * .5 / .5, dt = -.1; x = 1, v = 2: mean .951 - 2 * 1.245 * .1 = .702, std sqrt(.049)."""
    sigmas, x, v = torch.tensor([.6, .5, .4]), torch.ones(1, 1), 2 * torch.ones(1, 1)
    mean, std = grpo.sde_step(sigmas, 1, x, v, .7)
    torch.testing.assert_close(mean, torch.tensor([[.702]]))
    torch.testing.assert_close(std, torch.tensor(.2213594))


def test_first_step_takes_the_next_sigma():
    """sigma 1 -> .8: s^2 = .49 * 1 / (1 - .8) = 2.45, dt = -.2; x = 1, v = 2: mean .6 - 1.225 * .2 * 1 = .355, std .7."""
    mean, std = grpo.sde_step(torch.tensor([1., .8, 0.]), 0, torch.ones(1, 1), 2 * torch.ones(1, 1), .7)
    torch.testing.assert_close((mean, std), (torch.tensor([[.355]]), torch.tensor(.7)))


def test_the_sde_keeps_the_variance_of_the_schedule():
    """Where the clean data is the one point 0, v = x / sigma, x has std sigma on the flow; the SDE keeps that up to dt^2."""
    sigmas = torch.linspace(.9, .1, 801)
    variance = sigmas[1] ** 2
    for i in range(1, 800):
        mean, std = grpo.sde_step(sigmas, i, torch.ones(1), torch.ones(1) / sigmas[i], .3)
        variance = mean ** 2 * variance + std ** 2
    assert abs(variance.item() ** .5 - .1) < 5e-3


def test_eta_0_is_the_stock_euler_sampler_bit_for_bit(pipe):
    rollout = grpo.sample(pipe, RECORDS, SEEDS, arguments("--eta", "0"), call(pipe))
    generators = [seeded_generator(*seed[:-1]) for seed in SEEDS]
    with torch.no_grad():
        stock = run_pipeline(pipe, generator=generators, **call(pipe, prompt=PROMPTS))[0]
    assert torch.equal(torch.stack([frame for frame, in rollout.media]), stock) and stock.std() > .01
    assert len(rollout.x) == len(rollout.timesteps) and len(rollout.means) == 3
    assert len(rollout.sigmas) == len(rollout.timesteps) + 1 == pipe.call_args["num_inference_steps"] + 1


def test_a_rollout_records_its_own_noise(pipe):
    """x[i+1] = mean + std noise, where noise is a function of the sample's seed and i."""
    rollout = grpo.sample(pipe, RECORDS, SEEDS, arguments(), call(pipe))
    for i in range(3):
        std = grpo.sde_step(rollout.sigmas, i, rollout.x[i], rollout.x[i], 1.0)[1]
        noise = torch.stack([data.seeded_noise(rollout.x[0].shape[1:], *seed, i) for seed in SEEDS])
        assert torch.equal(rollout.x[i + 1], rollout.means[i] + std * noise)


def test_image_is_a_function_of_its_prompt_and_seed(pipe):
    both = grpo.sample(pipe, RECORDS, SEEDS, arguments(), call(pipe)).media
    one = grpo.sample(pipe, RECORDS, SEEDS[1:], arguments(), call(pipe)).media
    torch.testing.assert_close(both[1:], one)
    assert not torch.allclose(both[0][0], both[1][0])


def test_a_group_shares_its_first_noise_only(pipe):
    seeds = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0)]
    x = grpo.sample(pipe, RECORDS[:1] * 2, seeds, arguments(), call(pipe)).x
    assert torch.equal(x[0][0], x[0][1]) and not torch.equal(x[0][0], x[0][2])      # the same start,
    assert not torch.equal(x[1][0], x[1][1])                                        # other ways


def test_schedules_that_the_sde_does_not_fit_are_refused(pipe):
    with pytest.raises(ValueError, match="(?s)--sde-steps 10 .*the last step must be deterministic"):
        grpo.sample(pipe, RECORDS, SEEDS, arguments("--sde-steps", "10"), call(pipe, num_inference_steps=10))


# ---------------------------------------------------------------- the objective

def test_grpo_loss_worked_by_hand():
    losses, clipped = grpo.grpo_loss(torch.tensor([1., 1.5, 1.5, .5, .5]), torch.tensor([2., 2., -2., 2., -2.]), .2)
    torch.testing.assert_close(losses, torch.tensor([-2., -2.4, 3., -1., 1.6]))     # the pessimistic side of the clip
    assert clipped.tolist() == [False, True, True, True, True]


def test_gaussian_kl_is_torchs():
    mean, other, std = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.tensor(.4)
    theirs = torch.distributions.kl_divergence(Normal(mean, std), Normal(other, std)).mean((1, 2))
    torch.testing.assert_close(grpo.gaussian_kl(mean, other, std), theirs)


@pytest.mark.parametrize("batch_size", [6, 1])
def test_first_update_is_the_policy_gradient(batch_size, generator_folder, files, tmp_path, monkeypatch):
    """What main has accumulated at its first update is the gradient of -A mean log-prob, written out by hand."""
    rollouts, pipes = [], []
    sample, optimizer_step = grpo.sample, grpo.optimizer_step

    def keep_rollouts(pipe, records, seeds, *args):
        rollout = sample(pipe, records, seeds, *args)
        if seeds[0][1] >= 0:                         # not the trial before the first step
            pipes.append(pipe)
            rollouts.append(rollout)
        return rollout

    def compare(policy, *args):
        ours = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        policy.zero_grad()
        assert sum(len(rollout.seeds) for rollout in rollouts) == 6 and len(rollouts) == 6 // batch_size
        for rollout in rollouts:
            for i in range(3):
                v = data.predict(pipes[0], rollout.x[i], rollout.timesteps[i], **rollout.call)
                mean, std = grpo.sde_step(rollout.sigmas, i, rollout.x[i], v, 1.0)
                logp = Normal(mean, std).log_prob(rollout.x[i + 1]).mean((1, 2))
                (-(rollout.advantages * logp).sum() / 18).backward()
        for name, p in policy.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-3)
        assert sum(gradient.abs().sum() for gradient in ours.values()) > 0
        return optimizer_step(policy, *args)

    monkeypatch.setattr(grpo, "sample", keep_rollouts)
    monkeypatch.setattr(grpo, "optimizer_step", compare)
    grpo.main(options(files, generator_folder, tmp_path / "run", "--reward", f"{files}/rewards.py:bright", "--kl", "0",
                      "--batch-size", str(batch_size)))
    row, = rows(tmp_path / "run")
    assert row["ratio_error"] == 0 and row["clip_fraction"] == 0


# ---------------------------------------------------------------- the reward

def test_advantages_stay_within_groups_and_are_counted():
    """A fake judge that likes bright images: advantages follow brightness in each group, whatever the other group holds."""
    words = ["--group-size", "3", "--pairs", "all", "--num-prompts", "2", "--std-floor", "0", "--max-parse-fail", "1"]
    asked = []

    def judge(comparisons):
        asked.append(len(comparisons))
        better = [1 if c.media_1[0].getpixel((0, 0)) > c.media_2[0].getpixel((0, 0)) else 2 for c in comparisons]
        return [GOOD.replace("Image 1", f"Image {w}").replace('_1":7', f'_1":{7 if w == 1 else 3}')
                .replace('_2":3', f'_2":{3 if w == 1 else 7}') for w in better]

    def step(judge, rewards, *extra):
        args = grpo.parse_args([*words, *extra])
        media = [[Image.new("RGB", (4, 4), (v, v, v))] for v in (10, 30, 20, 250, 200, 240)]
        records = [{"prompt": "a"}] * 3 + [{"prompt": "b"}] * 3
        seeds = [(0, 0, n // 3, n % 3) for n in range(6)]
        rollout = grpo.Rollout({}, seeds, records, media)
        grpo.judge_rollouts([rollout], [], judge, rewards, args)
        return rollout.advantages, grpo.reward_numbers([rollout], args)

    advantages, numbers = step(judge, [FLEX])
    torch.testing.assert_close(advantages, torch.tensor([-1., 1., 0., 1., -1., 0.]))
    assert asked == [6] and numbers["verdicts"] == 6                            # one call of the judge
    assert numbers["undecided"] == numbers["ties"] == numbers["zero_variance_groups"] == 0
    advantages, numbers = step(lambda c: ["?"] * len(c), [FLEX], "--pairs", "ring:1")
    assert numbers["verdicts"] == 6 and numbers["undecided"] == numbers["zero_variance_groups"] == 1
    assert advantages.eq(0).all() and numbers["judge_failures"] == 0
    assert step(lambda c: [reward.Failure("down")] * len(c), [FLEX])[1]["judge_failures"] == 1
    index = data.Reward(.3, "index", lambda media, prompts: [{10: 0, 30: 0, 20: 0, 250: 5, 200: 6, 240: 7}[frames[0].getpixel((0, 0))[0]] for frames in media])
    advantages, numbers = step(judge, [data.Reward(.7, "flex", None), index])     # a further reward, told apart inside its group only
    torch.testing.assert_close(advantages, torch.tensor([-.7, .7, 0, .7 - .3, -.7, .3]))
    assert numbers["reward/index"] == 3 and numbers["verdicts"] == 6
    assert step(judge, [data.Reward(100.0, "flex", None)])[0].abs().max() == 5
    half = data.Reward(1.0, "half", lambda media, prompts: [4, math.nan, 3, 2, math.nan, math.nan])
    assert step(judge, [half])[1]["reward/half"] == 3                               # of those that are there
    none = data.Reward(1.0, "none", lambda media, prompts: [math.nan] * 6)
    with pytest.raises(RuntimeError, match="6 of 6 scores/none are missing"):
        step(judge, [half, none], "--max-parse-fail", ".5")


def test_a_judge_sees_8_frames_of_a_long_clip_as_in_its_training(tmp_path, monkeypatch):
    clips, questions = [[Image.new("RGB", (8, 8), (t, 0, 0)) for t in range(33)] for _ in range(2)], []

    def judge(asked):
        questions.extend(asked)
        return ["Image 1 is better."] * len(asked)

    seeds = [(0, 0, 0, 0), (0, 0, 0, 1)]
    rollout = grpo.Rollout({}, seeds, [{"prompt": "a cat"}] * 2, clips)
    grpo.judge_rollouts([rollout], [], judge, [FLEX], grpo.parse_args(["--group-size", "2", "--pairs", "all"]))
    assert rollout.advantages.abs().min() > 0
    score, = data.load_rewards("score", lambda asked: questions.extend(asked) or ["Final Score: 3"])
    assert data.reward_values(score, clips[:1], ["a cat"])["score"].tolist() == [3]
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.setattr(grpo, "evaluate_samples", lambda *args: (clips[:1], {}))
    args = grpo.parse_args(["--eval-data", str(tmp_path / "prompts.txt"), "--out", str(tmp_path)])
    assert grpo.evaluate(None, judge, clips[1:], args, {})["win_rate"] in (0, 1)
    for medium in [questions[0].media_1, questions[0].media_2, questions[1].media, questions[2].media_1]:
        assert [frame.getpixel((0, 0))[0] for frame in medium] == [0, 4, 9, 13, 18, 22, 27, 32]


def test_the_win_rate_over_the_base_names_the_trained_samples(tmp_path, monkeypatch):
    """Bright samples after, dark ones before, in random order: a judge that likes the bright ones gives 1, its opposite 0."""
    bright, dark = ([[Image.new("RGB", (8, 8), (v + t, 0, 0))] for t in range(8)] for v in (200, 10))
    (tmp_path / "prompts.txt").write_text("a cat\n" * 8)
    monkeypatch.setattr(grpo, "evaluate_samples", lambda *args: (bright, {}))
    args = grpo.parse_args(["--eval-data", str(tmp_path / "prompts.txt"), "--out", str(tmp_path)])
    orders = []

    def judge(questions, likes_bright=True):
        orders.extend(q.media_1[0].getpixel((0, 0))[0] >= 200 for q in questions)
        return [f"Image {1 if first == likes_bright else 2} is better." for first in orders[-len(questions):]]

    assert grpo.evaluate(None, judge, dark, args, {})["win_rate"] == 1
    assert grpo.evaluate(None, lambda q: judge(q, False), dark, args, {})["win_rate"] == 0
    assert 0 < sum(orders) < 16


# ---------------------------------------------------------------- runs

def fake_verdicts(monkeypatch):
    """The untrained judge's texts replaced by verdicts drawn from the images, so that there is something to learn from."""
    def answer(self, questions, **_):
        winners = [1 if sum(q.media_1[0].tobytes()) > sum(q.media_2[0].tobytes()) else 2 for q in questions]
        return [GOOD.replace("Image 1", f"Image {winner}") for winner in winners]

    monkeypatch.setattr(reward.LocalJudge, "__call__", answer)


@pytest.mark.parametrize("lora", ["0", "4"])
def test_run_resumes_exactly_and_starts_at_ratio_1(lora, generator_folder, judge_folder, files, tmp_path, monkeypatch, capsys):
    fake_verdicts(monkeypatch)
    out = tmp_path / "run"
    words = options(files, generator_folder, out, "--judge", judge_folder, "--lora-rank", lora, "--kl", "0",
                    "--max-steps", "4", "--save-every", "2", "--watch", f"{files}/rewards.py:bright")
    grpo.main(words)
    log, whole = rows(out), weights(out, 4)
    assert all(row["ratio_error"] == 0 for row in log)
    said = capsys.readouterr().out
    assert "max |ratio - 1| of a trial rollout: 0. It" in said
    moved = float(re.search(r"first rollout moved means by at most (\S+) std", said)[1])
    assert 0 < moved < 1
    assert any(row["grad_norm"] > 0 for row in log)
    name = f"{files}/rewards.py:bright"
    assert f"held_out_{name}" in log[1] and 0 <= log[1]["held_out_win_rate"] <= 1 and "held_out_win_rate" not in log[0]
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["before"].keys() == last["after"].keys() == {name, "win_rate", "undecided"} and last["before"]["win_rate"] == .5
    shutil.rmtree(out / "step_000004")
    grpo.main([*words, "--resume"])
    torch.testing.assert_close(weights(out, 4), whole, rtol=0, atol=0)
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in log]
    for page, num in (("samples.html", 4), ("before_after.html", 8)):
        assert (out / page).read_text().count("data:image") == num


def test_batches_of_groups_and_of_parts_of_them_give_the_same_update(generator_folder, judge_folder, files, tmp_path, monkeypatch):
    fake_verdicts(monkeypatch)
    for size in ("6", "3", "1"):
        grpo.main(options(files, generator_folder, tmp_path / size, "--judge", judge_folder, "--batch-size", size))
    one, *others = [rows(tmp_path / size)[0] for size in ("6", "3", "1")]
    for other in others:
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3) and one["grad_norm"] > 0
        assert other["first_position_share"] == one["first_position_share"] and other["verdicts"] == 6


def test_several_updates_of_a_rollout_leave_ratio_1(generator_folder, judge_folder, files, tmp_path, monkeypatch):
    fake_verdicts(monkeypatch)
    grpo.main(options(files, generator_folder, tmp_path / "run", "--judge", judge_folder, "--updates", "2", "--max-steps", "2",
                      "--lr", "1e-2"))
    first, second = rows(tmp_path / "run")
    assert first["ratio_error"] == second["ratio_error"] == 0 and first["clip_fraction"] > 0 and second["kl"] > 0


def test_kl_is_0_at_the_base_and_grows_away_from_it(generator_folder, judge_folder, files, tmp_path, monkeypatch):
    fake_verdicts(monkeypatch)
    grpo.main(options(files, generator_folder, tmp_path / "run", "--judge", judge_folder, "--kl", ".1", "--max-steps", "3",
                      "--lr", "1e-2"))
    kl = [row["kl"] for row in rows(tmp_path / "run")]
    assert kl[0] == 0 < kl[1]


def test_the_kl_is_torchs_at_the_stochastic_steps_and_at_a_late_one(generator_folder, judge_folder, files, tmp_path, monkeypatch):
    """Three of seven steps are stochastic, the last two are late; there half the squared distance of velocities counts. The log has means over samples."""
    fake_verdicts(monkeypatch)
    seen, stock, stock_predict, predicted = [], grpo.mean_at, grpo.predict, []

    def predict(*inputs, **options):
        predicted.append(stock_predict(*inputs, **options))
        return predicted[-1]

    def mean_at(pipe, rollout, i, args):
        mean, std = stock(pipe, rollout, i, args)
        seen.append((i, torch.is_grad_enabled(), sft.LoRALinear.enabled, Normal(mean.detach(), std.expand_as(mean)), predicted[-1].detach()))
        return mean, std
    monkeypatch.setattr(grpo, "predict", predict)
    monkeypatch.setattr(grpo, "mean_at", mean_at)
    grpo.main(options(files, generator_folder, tmp_path / "run", "--judge", judge_folder, "--kl", ".1", "--max-steps", "3", "--lr", "1e-2",
                      "--eval-every", "0", "--batch-size", "3", "--pipe-args", '{"num_inference_steps": 7}'))
    pairs = [(seen[k], seen[k + 1]) for k in range(len(seen)) if not seen[k][2]]                # the reference, then the policy
    assert [reference[0] for reference, _ in pairs] == 2 * [0, 1, 2, 5] + 2 * [0, 1, 2, 6] + 2 * [0, 1, 2, 5]          # two rollouts a step
    assert all(reference[:2] == (policy[0], False) and policy[1] for reference, policy in pairs)
    kl = torch.stack([torch.distributions.kl_divergence(policy[3], reference[3]).mean() for reference, policy in pairs]).view(3, 2, 4)
    apart = torch.stack([torch.nn.functional.mse_loss(policy[4], reference[4]) / 2 for reference, policy in pairs]).view(3, 2, 4)
    for row, ours, late in zip(rows(tmp_path / "run"), kl, apart):
        assert row["kl"] == pytest.approx(ours[:, :3].mean().item(), rel=1e-4, abs=1e-9)
        assert row["later_kl"] == pytest.approx(late[:, 3].mean().item(), rel=1e-4, abs=1e-9)
    assert all(row["kl"] > 0 and row["later_kl"] > 0 for row in rows(tmp_path / "run")[1:])


def test_a_policy_that_is_not_the_one_that_sampled_stops_the_run(generator_folder, files, tmp_path, monkeypatch):
    """Weights that change between rollout and update, as dropout would do."""
    judge_rollouts = grpo.judge_rollouts

    def disturb(*args):
        pipes[0].transformer.proj_out.weight.data.mul_(1.1)
        judge_rollouts(*args)

    pipes = []
    load = grpo.load_generator

    def keep_pipe(*args):
        pipe, policy, call = load(*args)
        pipes.append(pipe)
        return pipe, policy, call
    monkeypatch.setattr(grpo, "load_generator", keep_pipe)
    monkeypatch.setattr(grpo, "judge_rollouts", disturb)
    with pytest.raises(RuntimeError, match=r"max \|ratio - 1\| is .* before the first update, above 1e-05. .*dropout"):
        grpo.main(options(files, generator_folder, tmp_path / "run", "--reward", f"{files}/rewards.py:bright"))


def test_too_many_undecided_verdicts_stop_the_run_and_show_one(generator_folder, judge_folder, files, tmp_path):
    message = r"(?s)6 of 6 verdicts are undecided, more than --max-parse-fail. One of them:\n."
    with pytest.raises(RuntimeError, match=message):
        grpo.main(options(files, generator_folder, tmp_path / "run", "--judge", judge_folder))
    with pytest.raises(RuntimeError, match="6 of 6 scores/.*rewards.py:missing are missing, more than --max-parse-fail"):
        grpo.main(options(files, generator_folder, tmp_path / "run", "--reward", f"{files}/rewards.py:missing"))
    grpo.main(options(files, generator_folder, tmp_path / "run", "--judge", judge_folder, "--max-parse-fail", "1"))
    assert rows(tmp_path / "run")[0]["undecided"] == 1 and rows(tmp_path / "run")[0]["zero_variance_groups"] == 1


def test_a_reward_of_your_own_needs_no_judge_whatever_its_name(generator_folder, files, tmp_path, monkeypatch):
    shutil.copy(files / "rewards.py", tmp_path / "flexible_score.py")
    monkeypatch.setattr(grpo, "load_judge", None)
    grpo.main(options(files, generator_folder, tmp_path / "run", "--reward", f"{tmp_path}/flexible_score.py:bright:.5"))
    assert rows(tmp_path / "run")[0][f"scores/{tmp_path}/flexible_score.py:bright"] == 6 and rows(tmp_path / "run")[0]["verdicts"] == 0


def test_an_error_of_the_reward_ends_the_run(generator_folder, files, tmp_path):
    with pytest.raises(KeyError, match="a broken reward"):
        grpo.main(options(files, generator_folder, tmp_path / "run", "--reward", f"{files}/rewards.py:breaks"))


def test_a_judge_that_only_scores_is_not_asked_to_compare(generator_folder, files, tmp_path):
    (tmp_path / "judge.py").write_text("def score(questions):\n    return [f'Final Score: {q.media[0].getpixel((0, 0))[0]}' for q in questions]\n")
    words = options(files, generator_folder, tmp_path / "run", "--reward", "score", "--judge", f"{tmp_path}/judge.py:score", "--eval-every", "1")
    grpo.main(words)
    assert rows(tmp_path / "run")[0]["scores/score"] == 6 and "held_out_win_rate" not in rows(tmp_path / "run")[0]


def test_a_reward_by_a_network_trains_as_its_values_do(generator_folder, files, tmp_path):
    """A torch model in a reward without no_grad: the log is that of the same numbers as a list."""
    (tmp_path / "mine.py").write_text(
        "import numpy, torch\nweight = torch.nn.Parameter(torch.tensor([.1, -.2, .3]))\n"
        "def net(media, prompts):\n"
        "    return torch.stack([(torch.from_numpy(numpy.array(f[0])).float() @ weight).mean() for f in media])\n"
        "def listed(media, prompts):\n    return net(media, prompts).tolist()\n")
    for name in ("net", "listed"):
        grpo.main(options(files, generator_folder, tmp_path / name, "--reward", f"{tmp_path}/mine.py:{name}", "--max-steps", "2"))
    first, second = [[(row["loss"], row["grad_norm"]) for row in rows(tmp_path / name)] for name in ("net", "listed")]
    assert first == second and first[0][1] > 0


def test_ctrl_c_does_not_wait_for_the_judge(generator_folder, files, tmp_path):
    words = options(files, generator_folder, tmp_path / "run", "--reward", f"{files}/rewards.py:hangs")
    process = subprocess.Popen([sys.executable, "grpo.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a shell's & has it ignored
    for line in process.stdout:
        if line.startswith("hanging"):
            break
    time.sleep(2)                                    # main waits for the answer by now
    process.send_signal(signal.SIGINT)
    began = time.time()
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and process.returncode != 0 and time.time() - began < 10


@pytest.mark.parametrize("extra, message", [
    (["--batch-size", "4"], "--batch-size 4: pass a multiple or a divisor of --group-size 3"),
    (["--num-prompts", "7"], "--num-prompts 7: .* at most 6 as in .*prompts.txt"),
    (["--kl", ".1", "--lora-rank", "0"], "--kl is the distance .*: pass --lora-rank"),
    (["--group-size", "1", "--batch-size", "1"], "nothing sets a sample apart: raise .* or --group-size"),
    (["--eta", "0"], "nothing sets a sample apart: raise --eta"), (["--sde-steps", "0"], "nothing sets a sample apart: raise --eta")])
def test_options_that_do_not_fit_are_refused(extra, message, generator_folder, files, tmp_path):
    with pytest.raises(ValueError, match=message):
        grpo.main(options(files, generator_folder, tmp_path / "run", "--reward", f"{files}/rewards.py:bright", *extra))


def test_prompts_are_shared_equally_by_the_ranks(generator_folder, files, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="--num-prompts 6: pass a multiple of the 4 ranks"):
        grpo.main(options(files, generator_folder, tmp_path / "run", "--reward", f"{files}/rewards.py:bright", "--num-prompts", "6"))


def test_the_judges_wording_is_an_option(generator_folder, files, tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("Which is better for {prompt}?")

    def load(name, **extra):
        raise ValueError(extra["template"])

    monkeypatch.setattr(grpo, "load_judge", load)
    with pytest.raises(ValueError, match="Which is better for"):
        grpo.main(options(files, generator_folder, tmp_path / "run", "--judge", "http://localhost:1", "--template", str(tmp_path / "words.txt")))


def test_missing_stages_name_their_commands(tmp_path, monkeypatch, generator_folder, files):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="sft.py --task generator"):
        grpo.main([])
    with pytest.raises(ValueError, match="no judge in out/judge-dpo/model: train one by sft.py and dpo.py, or pass --judge"):
        grpo.main(options(files, generator_folder, tmp_path / "run"))
