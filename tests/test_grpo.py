"""The stochastic sampler, the objective, the reward of a group, whole runs."""
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.distributions import Normal

import grpo
import reward
import sft
from sft import generator
from test_sft import GRPO, rows, weights
from toy_models import PIPE_ARGS


@pytest.fixture(scope="module")
def pipe(generator_folder):
    return sft.load_pipeline(generator_folder, torch.device("cpu"))


ARGS = grpo.parse_args(["--no-shared-noise", "--no-ratio-norm", "--kl", "0"])
PROMPTS = ["a red circle", "a blue star above a green square"]
SEEDS = [(0, 1), (0, 2)]


def test_log_prob_is_the_normal_density():
    x, mean, std = torch.randn(3, 9, 32), torch.randn(3, 9, 32), torch.tensor(.3)
    torch.testing.assert_close(grpo.log_prob(x, mean, std), Normal(mean, std).log_prob(x).mean((1, 2)))


def test_transition_is_the_flow_sde_worked_by_hand():
    """sigma .5 -> .4, eta .7: s^2 = .49 * .5 / .5, dt = -.1; x = 1, v = 2: mean .951 - 2 * 1.245 * .1 = .702, std sqrt(.049)."""
    sigmas, x, v = torch.tensor([.6, .5, .4]), torch.ones(1, 1), 2 * torch.ones(1, 1)
    mean, std = grpo.transition(sigmas, 1, x, v, .7)
    torch.testing.assert_close(mean, torch.tensor([[.702]]))
    torch.testing.assert_close(std, torch.tensor(.2213594))


def test_the_other_samplers_worked_by_hand():
    """The same step. dance: s^2 = .49, so .8 + .49 / 1 * 2 * -.1 = .702 here too, as sigma / (1 - sigma) is 1 at .5; at .8 -> .6 it is not:
    1 + 2 * -.2 + .49 / 1.6 * 1.4 * -.2 = .51425, std .7 sqrt(.2). cps at eta .5, .5 -> .4: s = .4 sin 45 = .2828427, x0 = 1 - 1 = 0, x1 = 2,
    mean = .6 * 0 + sqrt(.16 - .08) * 2 = .5656854."""
    x, v = torch.ones(1, 1), 2 * torch.ones(1, 1)
    mean, std = grpo.transition(torch.tensor([.9, .8, .6]), 1, x, v, .7, "dance")
    torch.testing.assert_close((mean, std), (torch.tensor([[.51425]]), torch.tensor(.3130495)))
    mean, std = grpo.transition(torch.tensor([.6, .5, .4]), 1, x, v, .5, "cps")
    torch.testing.assert_close((mean, std), (torch.tensor([[.5656854]]), torch.tensor(.2828427)))


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_samplers_keep_the_variance_of_the_schedule(kind):
    """Where the clean data is the one point 0, v = x / sigma, x has std sigma on the flow; cps keeps that exactly, the SDEs up to dt^2."""
    sigmas = torch.linspace(.9, .1, 801)
    variance = sigmas[1] ** 2
    for i in range(1, 800):
        mean, std = grpo.transition(sigmas, i, torch.ones(1), torch.ones(1) / sigmas[i], .3, kind)
        variance = mean ** 2 * variance + std ** 2
    assert abs(variance.item() ** .5 - .1) < (1e-5 if kind == "cps" else 5e-3)


@pytest.mark.parametrize("where, starts", [("first", {0}), ("random", {0, 1, 2, 3, 4}), ("slide", {0, 1, 2, 3, 4})])
def test_the_window_of_stochastic_steps(where, starts):
    """3 of 8 steps; the last one stays deterministic; half of the three are trained."""
    args = grpo.parse_args(["--sde-window", where, "--max-steps", "50", "--train-share", ".5"])
    found = [grpo.window(args, 8, step) for step in range(50)]
    assert {steps[0] for steps, _ in found} == starts and all(steps == list(range(steps[0], steps[0] + 3)) for steps, _ in found)
    assert all(len(trained) == 2 and set(trained) < set(steps) for steps, trained in found)
    assert where != "slide" or [steps[0] for steps, _ in found] == sorted(steps[0] for steps, _ in found)
    with pytest.raises(ValueError, match="leaves no deterministic last step of 3"):
        grpo.window(args, 3, 0)


def test_nft_loss_and_its_slope():
    """At v = v_old = 1, v* = 3, A = 5 (r = 1) and 0 (r = 1/2): loss 4; slope 2 beta (2 r - 1) (v - v*) = -4 and 0."""
    v = torch.ones(2, 1, requires_grad=True)
    losses = grpo.nft_loss(v, torch.ones(2, 1), torch.full((2, 1), 3.), torch.tensor([5., 0.]), 1.0)
    losses.sum().backward()
    torch.testing.assert_close((losses.detach(), v.grad), (torch.tensor([4., 4.]), torch.tensor([[-4.], [0.]])))


def test_eta_0_is_the_stock_euler_sampler_bit_for_bit(pipe):
    args = SimpleNamespace(**{**vars(ARGS), "eta": 0.0})
    ours, trajectory = grpo.rollout(pipe, PROMPTS, SEEDS, args, output_type="pt", **PIPE_ARGS)
    stock = sft.run(pipe, prompt=PROMPTS, generator=[generator(*s) for s in SEEDS], output_type="pt", **PIPE_ARGS).images
    assert torch.equal(torch.stack([frame for frame, in ours]), stock) and stock.std() > .01
    assert len(trajectory["x"]) == 11 and len(trajectory["means"]) == 10


def test_image_is_a_function_of_its_prompt_and_seed(pipe):
    both, _ = grpo.rollout(pipe, PROMPTS, SEEDS, ARGS, output_type="pt", **PIPE_ARGS)
    one, _ = grpo.rollout(pipe, PROMPTS[1:], SEEDS[1:], ARGS, output_type="pt", **PIPE_ARGS)
    torch.testing.assert_close(both[1:], one)
    assert not torch.allclose(both[0][0], both[1][0])


def test_shared_noise_is_shared_by_a_group_only(pipe):
    args = SimpleNamespace(**{**vars(ARGS), "shared_noise": True})
    x = grpo.rollout(pipe, PROMPTS[:1] * 3, [(0, 1), (0, 2), (1, 1)], args, **PIPE_ARGS)[1]["x"]
    assert torch.equal(x[0][0], x[0][1]) and not torch.equal(x[0][0], x[0][2])      # the same start,
    assert not torch.equal(x[1][0], x[1][1])                                        # other ways


@pytest.mark.parametrize("ratio_norm", [False, True])
def test_first_update_has_ratio_1_and_the_policy_gradient(pipe, ratio_norm):
    """max |ratio - 1| is 0 before any update, and the gradient is that of -A mean log-prob, written out by hand."""
    args = SimpleNamespace(**{**vars(ARGS), "ratio_norm": ratio_norm})
    _, trajectory = grpo.rollout(pipe, PROMPTS, SEEDS, args, **PIPE_ARGS)
    advantages = torch.tensor([1., -.5])
    pipe.transformer.zero_grad()
    stats = grpo.accumulate_gradients(pipe, trajectory, advantages, args, torch.full((2,), 1 / 2), prompt=PROMPTS, **PIPE_ARGS)
    assert stats["max_ratio_error"] == 0 and stats["clip_fraction"] == 0
    ours = {n: p.grad.clone() for n, p in pipe.transformer.named_parameters()}
    pipe.transformer.zero_grad()
    sigmas = trajectory["sigmas"]
    for i in range(3):
        v = sft.velocity(pipe, trajectory["x"][i], sigmas[i], prompt=PROMPTS, **PIPE_ARGS)
        mean, std = grpo.transition(sigmas, i, trajectory["x"][i], v, .7)
        logp = Normal(mean, std).log_prob(trajectory["x"][i + 1]).mean((1, 2))
        scale = std / (sigmas[i] - sigmas[i + 1]) if ratio_norm else 1.0
        (-(advantages * logp * scale).mean() / 3).backward()
    for name, p in pipe.transformer.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-3)


def test_ratio_norm_is_the_log_ratio_without_its_quadratic_term_times_std():
    old, new, noise, std = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.tensor(.4)
    x = old + std * noise
    plain = grpo.policy_ratio(x, new, old, std, noise, False).log()
    quadratic = ((new - old) ** 2).mean((1, 2)) / (2 * std ** 2)
    torch.testing.assert_close(grpo.policy_ratio(x, new, old, std, noise, True).log(), (plain + quadratic) * std)


def test_grpo_loss_worked_by_hand():
    losses, clipped = grpo.grpo_loss(torch.tensor([1., 1.5, 1.5, .5, .5]), torch.tensor([2., 2., -2., 2., -2.]), .2)
    torch.testing.assert_close(losses, torch.tensor([-2., -2.4, 3., -1., 1.6]))         # the pessimistic side of the clip
    torch.testing.assert_close(clipped, torch.tensor([0., 1., 1., 1., 1.]))


def test_advantages_stay_within_groups_and_are_counted():
    """A fake judge that likes bright images: advantages follow brightness in each group, whatever the other group holds."""
    from PIL import Image
    from test_dpo import GOOD
    images, prompts = [[Image.new("RGB", (4, 4), (v, v, v))] for v in (10, 30, 20, 250, 200, 240)], ["a"] * 3 + ["b"] * 3

    def judge(comparisons):
        better = [1 if c.media_1[0].getpixel((0, 0)) > c.media_2[0].getpixel((0, 0)) else 2 for c in comparisons]
        return [GOOD.replace("Image 1", f"Image {w}").replace('_1":7', f'_1":{7 if w == 1 else 3}')
                .replace('_2":3', f'_2":{3 if w == 1 else 7}') for w in better]
    args = SimpleNamespace(group_size=3, pairs="all", both_orders=False, category_weights=[1, 1, 1], alpha=.7, std_floor=0.0, adv_clip=5.0)
    flex = [(1.0, "flex", None)]

    def step(judge, rewards):
        pairs = [(k + i, k + j) for k in (0, 3) for i, j in reward.schedule_pairs(3, "all", random.Random(k), args.both_orders)]
        answers, _ = grpo.ask_rewards(judge, rewards, [(p, reward.Comparison(prompts[i], images[i], images[j])) for p, (i, j) in enumerate(pairs)],
                                      list(zip(range(6), images, prompts)))
        return grpo.sample_advantages(pairs, {(kind, n): answer for kind, n, answer in answers}, rewards, 6, args)

    advantages, counts, bad = step(judge, flex)
    torch.testing.assert_close(advantages, torch.tensor([-1., 1., 0., 1., -1., 0.]))
    assert counts["verdicts"] == 6 and counts["undecided"] == counts["ties"] == counts["dead"] == 0 and not bad
    args.both_orders = True
    advantages, counts, bad = step(lambda c: ["?"] * len(c), flex)
    assert counts["undecided"] == 12 and counts["dead"] == 2 and advantages.eq(0).all() and bad == ["?"]
    index = (.3, "index", lambda media, prompts: [0, 0, 0, 5, 6, 7])            # a further reward, told apart inside its group only
    advantages, counts, _ = step(judge, [(.7, "flex", None), index])
    torch.testing.assert_close(advantages, torch.tensor([-.7, .7, 0, .7 - .3, -.7, .3]))
    assert counts["reward/index"] == 18 and counts["verdicts"] == 12


def run_grpo(generator_folder, judge_folder, out, *extra):
    grpo.main(["--model", generator_folder, "--judge", judge_folder, "--out", str(out), *GRPO, *extra])


def fake_verdicts(monkeypatch):
    """The untrained judge's texts replaced by verdicts drawn from the images, so that there is something to learn from."""
    from test_dpo import GOOD
    pick = lambda c: 1 if sum(c.media_1[0].tobytes()) > sum(c.media_2[0].tobytes()) else 2
    monkeypatch.setattr(reward.LocalJudge, "__call__", lambda self, comparisons, **k: [GOOD.replace("Image 1", f"Image {pick(c)}") for c in comparisons])


@pytest.mark.parametrize("lora", ["0", "4"])
def test_run_resumes_exactly_and_starts_at_ratio_1(lora, generator_folder, judge_folder, tmp_path, monkeypatch, capsys):
    fake_verdicts(monkeypatch)
    out, args = tmp_path / "run", ["--lora-rank", lora, "--kl", "0", "--max-steps", "4", "--save-every", "2", "--lr", "1e-3"]
    run_grpo(generator_folder, judge_folder, out, *args)
    log, whole = rows(out), weights(out, 4)
    assert log[0]["max_ratio_error"] == 0 and "max |ratio - 1| at the first update: 0" in capsys.readouterr().out
    assert any(r["grad_norm"] > 0 for r in log)
    shutil.rmtree(out / "step_000004")
    run_grpo(generator_folder, judge_folder, out, *args, "--resume")
    assert all(torch.equal(v, weights(out, 4)[k]) for k, v in whole.items())
    assert [r["loss"] for r in rows(out)] == [r["loss"] for r in log]


@pytest.mark.parametrize("options", [["--loss", "nft"], ["--epochs", "2", "--sde", "cps"], ["--sde", "dance", "--sde-window", "random", "--train-share", ".5"]])
def test_the_other_algorithms_run(options, generator_folder, judge_folder, tmp_path, monkeypatch):
    fake_verdicts(monkeypatch)
    run_grpo(generator_folder, judge_folder, tmp_path / "run", *options, "--kl", ".1", "--max-steps", "2", "--lr", "1e-2")
    first, second = rows(tmp_path / "run")
    assert first["max_ratio_error"] == 0 and second["kl"] > 0 and first["grad_norm"] > 0
    assert "--epochs" not in options or first["clip_fraction"] > 0             # the second update of a rollout has left ratio 1
    with pytest.raises(SystemExit):
        grpo.parse_args(["--loss", "nft", "--epochs", "2"])


def test_kl_is_0_at_the_base_and_grows_away_from_it(generator_folder, judge_folder, tmp_path, monkeypatch):
    fake_verdicts(monkeypatch)
    run_grpo(generator_folder, judge_folder, tmp_path / "run", "--kl", ".1", "--max-steps", "3", "--lr", "1e-2")
    kl = [r["kl"] for r in rows(tmp_path / "run")]
    assert kl[0] == 0 < kl[1]
    with pytest.raises(SystemExit):
        grpo.parse_args(["--kl", ".1", "--lora-rank", "0"])


def test_a_judge_sees_8_frames_of_a_long_clip_as_in_its_training():
    clips, seen = [[Image.new("RGB", (8, 8), (t, 0, 0)) for t in range(33)] for _ in range(2)], []
    found = grpo.win_rate_over(lambda questions: seen.extend(questions) or ["Image 1 is better."], clips[:1], clips[1:], [{"prompt": "a cat"}], 0, sft.start_ranks())
    assert found["win_rate"] in (0, 1)
    score, = reward.open_rewards("score", lambda questions: seen.extend(questions) or ["Final Score: 3"])
    assert reward.reward_values(score, clips[:1], ["a cat"]).tolist() == [3]
    for medium in [*seen[0][1:], seen[1].media]:
        assert [frame.getpixel((0, 0))[0] for frame in medium] == [0, 5, 9, 14, 18, 23, 27, 32]


def test_the_judges_wording_is_an_option(generator_folder, tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("Which is better for {prompt}?")

    def found(judge, num, **options):
        raise ValueError(options["template"])
    monkeypatch.setattr(grpo, "open_judge", found)
    with pytest.raises(SystemExit, match="Which is better for"):
        grpo.main([*GRPO, "--model", generator_folder, "--judge", "http://localhost:1", "--template", str(tmp_path / "words.txt"), "--out", str(tmp_path / "run")])


def test_too_many_undecided_verdicts_stop_the_run_and_show_one(generator_folder, judge_folder, tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)6 of 6 verdicts are undecided, more than --max-parse-fail 0.5. One of them:"):
        run_grpo(generator_folder, judge_folder, tmp_path / "run", "--max-parse-fail", ".5")


def test_missing_stages_name_their_commands(tmp_path, monkeypatch, generator_folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="python sft.py --task generator"):
        grpo.main([])
    with pytest.raises(SystemExit, match="python sft.py"):
        grpo.main(["--model", generator_folder])
