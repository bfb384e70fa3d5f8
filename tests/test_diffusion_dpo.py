"""Diffusion-DPO on tiny random pipelines: the loss against direct calls of their denoisers, clean latents, sampling, candidates, whole runs."""
import json
import math
import shutil

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import dpo
from data import denoisers, drive, load_pipeline, predict, run_pipeline, sample_media, seeded_generator, seeded_noise, unguided
from reward import Candidate, Failure
from sft import add_noise, disable_lora, prepare_training
from test_ranks import COMMON, SIX, launch
from test_sft import rows, small, weights
from tiny_pipelines import BETAS, DIFFUSION, make

PROMPTS, CPU = ["a cat", "a dog on a cube", "a red cube"], torch.device("cpu")
FAST = ["--warmup-steps", "1", "--no-bf16", "--batch-size", "2", "--watch", "none"]


def picture(seed, side=16):
    """Soft random stripes."""
    small = Image.fromarray(np.random.RandomState(seed).randint(0, 255, (4, 4, 3), dtype="uint8"))
    return small.resize((side, side), Image.BICUBIC)


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def folder_of(family, path, winners=("Image 2", "Tie", "Image 1"), side=16):
    """The options of a run in a folder that holds the pipeline, pairs for it and prompts; a pair's winner is its brighter one."""
    pipe, args = make(family)
    pipe.save_pretrained(path / "base")
    num_frames, records = args.get("num_frames", 1), []
    for i, (prompt, winner) in enumerate(zip(PROMPTS, winners)):
        media = []
        for k in range(2):
            bright = (k == 1) == (winner == "Image 2")
            for f in range(num_frames):
                file = path / f"{i}{k}" / f"{f}.png" if num_frames > 1 else path / f"{i}{k}.png"
                file.parent.mkdir(exist_ok=True)
                picture(100 * i + 10 * k + f, side).point(lambda v: 128 + v // 2 if bright else v // 2).save(file)
            media.append(str(file.parent.relative_to(path) if num_frames > 1 else file.name))
        kind = "Video" if num_frames > 1 else "Image"
        records.append({"prompt": prompt, f"{kind.lower()}s": media, "winner": winner.replace("Image", kind)})
    (path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "prompts.txt").write_text("a cat\na dog\n")
    call = {k: v for k, v in args.items() if k not in ("guidance_scale", "negative_prompt")} | {"num_inference_steps": 2}
    return ["--task", "generator", "--model", str(path / "base"), "--data", str(path / "pairs.jsonl"), "--eval-data", str(path / "prompts.txt"),
            *FAST, "--pipe-args", json.dumps(call)]


def direct(family, pipe, x, t, prompts):
    """What the denoiser itself predicts without guidance, its inputs made by hand."""
    B = len(x)
    if family == "FLUX.1":
        embeds, pooled, text_ids = pipe.encode_prompt(prompts, prompts, max_sequence_length=32)
        return pipe.transformer(hidden_states=x, timestep=t / 1000, guidance=torch.full((B,), 3.5), encoder_hidden_states=embeds, pooled_projections=pooled, txt_ids=text_ids,
                                img_ids=pipe._prepare_latent_image_ids(B, 4, 4, "cpu", x.dtype)).sample
    if family == "SD3.5":
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=32)
        return pipe.transformer(hidden_states=x, timestep=t, encoder_hidden_states=embeds, pooled_projections=pooled).sample
    if family == "Wan 2.1":
        return pipe.transformer(hidden_states=x, timestep=t, encoder_hidden_states=pipe.encode_prompt(prompts, None, False, max_sequence_length=32)[0]).sample
    embeds, _, *pooled = pipe.encode_prompt(prompt=prompts, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = dict(added_cond_kwargs={"text_embeds": pooled[0], "time_ids": torch.tensor([[16., 16, 0, 0, 16, 16]] * B)}) if pooled else {}
    return pipe.unet(x, t, encoder_hidden_states=embeds, **added).sample


def clean(family, pipe, frames):
    """(1, ...) latents of one image or clip, by hand."""
    config = pipe.vae.config
    if family == "Wan 2.1":
        z = pipe.vae.encode(torch.stack([pixels(f)[0] for f in frames], 1)[None]).latent_dist.mode()
        mean, std = (torch.tensor(v)[None, :, None, None, None] for v in (config.latents_mean, config.latents_std))
        return (z - mean) / std
    z = torch.cat([pipe.vae.encode(pixels(f)).latent_dist.mode() for f in frames])
    if family in DIFFUSION:
        return config.scaling_factor * (z if len(frames) == 1 else z.transpose(0, 1)[None])
    z = (z - config.shift_factor) * config.scaling_factor
    return z if family == "SD3.5" else z.reshape(1, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 16)


@pytest.mark.parametrize("family", [*DIFFUSION, "SD3.5", "FLUX.1", "Wan 2.1"])
def test_loss_is_that_of_direct_calls_and_ln2_at_first(family, tmp_path):
    args = dpo.parse_args([*folder_of(family, tmp_path), "--lora-rank", "2", "--sigma-mean", ".5", "--seed", "3"])
    pipe = load_pipeline(args.model, CPU)
    policy, call = denoisers(pipe), args.pipe_args
    prepare_training(policy, args, CPU)
    policy.eval()
    pairs = [r for r in data.read_records(args.data, "pair") if r["winner"] != "Tie"]
    latents = dpo.encode_pairs(pipe, pairs, call)
    indices, step = [1, 0], 5
    x, t, target = add_noise(pipe, latents[:, indices].flatten(0, 1), args, step, indices + indices)
    inputs = {**unguided(pipe, call), "prompt": [pairs[i]["prompt"] for i in indices + indices]}

    def losses_and_errors(beta):
        """((B,) losses, {name: (B,) errors}) by the functions of the loop."""
        with torch.no_grad(), disable_lora():
            reference_logps = dpo.denoising_logps(pipe, x, t, target, inputs)
        logps = dpo.denoising_logps(pipe, x, t, target, inputs)
        assert not reference_logps.requires_grad and logps.requires_grad
        names = ("error/chosen", "error/rejected", "error_ref/chosen", "error_ref/rejected")
        parts = [*logps.detach().chunk(2), *reference_logps.chunk(2)]
        return dpo.dpo_loss(logps, reference_logps, beta)[0], {name: -2 * part for name, part in zip(names, parts)}

    torch.testing.assert_close(losses_and_errors(args.beta)[0], torch.full((2,), math.log(2)).double(), atol=3e-4, rtol=0)
    torch.manual_seed(0)
    for p in [p for p in policy.parameters() if p.requires_grad]:
        p.data += .3 * torch.randn_like(p)
    beta = 5
    losses, stats = losses_and_errors(beta)

    base = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "base")
    records = [r for r in map(json.loads, open(args.data)) if r["winner"] != "Tie"]
    for b, i in enumerate(indices):
        media = records[i].get("videos") or records[i]["images"]
        media = media[::-1] if records[i]["winner"].endswith("2") else media
        errors = {}
        for side, path in zip("wl", media):
            files = sorted((tmp_path / path).glob("*.png")) if "videos" in records[i] else [tmp_path / path]
            with torch.no_grad():
                x0 = clean(family, base, [Image.open(f) for f in files])
            noise = seeded_noise(x0.shape[1:], 3, step, i)[None]
            if family in DIFFUSION:
                t = torch.randint(1000, (), generator=seeded_generator(3, step, i, "t"))[None]
                ddpm = diffusers.DDPMScheduler(**BETAS)
                x, target = ddpm.add_noise(x0, noise, t), ddpm.get_velocity(x0, noise, t) if family == "SD2.1" else noise
            else:
                sigma = torch.sigmoid(.5 + seeded_noise((), 3, step, i, "sigma"))
                x, target, t = x0 + sigma * (noise - x0), noise - x0, 1000 * sigma[None]
            with torch.no_grad():
                errors[side] = [(direct(family, model, x, t, [records[i]["prompt"]]) - target).pow(2).mean() for model in (pipe, base)]
        (w, w_ref), (l, l_ref) = errors["w"], errors["l"]
        torch.testing.assert_close(torch.stack([stats["error/chosen"][b], stats["error/rejected"][b]]), torch.stack([w, l]).double(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.stack([stats["error_ref/chosen"][b], stats["error_ref/rejected"][b]]), torch.stack([w_ref, l_ref]).double(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(losses[b], -F.logsigmoid(-beta / 2 * ((w - w_ref) - (l - l_ref))).double(), atol=1e-5, rtol=1e-4)
        assert (w - w_ref).abs() > 1e-4 < (l - l_ref).abs()                     # there is something to compare
    losses.sum().backward()
    assert sum(p.grad.abs().sum() for p in policy.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("family", ["SD1.5", "text-to-video", "FLUX.1", "SD3.5", "Qwen-Image", "Z-Image", "Sana", "Wan 2.1", "HunyuanVideo"])
def test_the_pipeline_decodes_encoded_media_as_its_vae_does(family):
    """Shift, scale and packing are undone; media come to height and width by the pipeline's processor."""
    pipe, args = make(family)
    pipe, num_frames = drive(pipe, CPU), args.get("num_frames", 1)
    media = [[picture(10 * i + f, 40) for f in range(num_frames)] for i in range(2)]
    x = data.encode_media(pipe, media, args)

    def keep(i, latents, v):
        return x if latents.shape == x.shape else x.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        images = run_pipeline(pipe, keep, prompt=PROMPTS[:2], **{**args, "num_inference_steps": 1, "output_type": "pt"})[0]
    inputs = torch.stack([torch.cat([pixels(f.resize((args["width"], args["height"]), Image.LANCZOS)) for f in frames]) for frames in media])     # (B, F, 3, H, W)
    with torch.no_grad():
        deep = family in ("Qwen-Image", "Wan 2.1", "HunyuanVideo")
        coded = pipe.vae.encode(inputs.transpose(1, 2) if deep else inputs.flatten(0, 1))
        decoded = pipe.vae.decode(coded.latent if family == "Sana" else coded.latent_dist.mode()).sample
    decoded = decoded.transpose(1, 2) if deep else decoded.unflatten(0, inputs.shape[:2])
    images = images if num_frames > 1 else images[:, None]
    torch.testing.assert_close(images, (decoded / 2 + .5).clamp(0, 1), atol=1e-4, rtol=0)
    assert images.std() > .001


@pytest.mark.parametrize("family", DIFFUSION)
def test_samples_through_the_driver_are_the_stock_ones(family):
    """Euler schedulers scale the model's input, ancestral ones draw noise from the generators."""
    pipe, args = make(family)
    ask = lambda call: call(prompt=PROMPTS, generator=[seeded_generator(i) for i in range(3)], num_inference_steps=3, output_type="pt", **args)[0]
    stock = ask(pipe)
    pipe = drive(pipe, CPU)
    with torch.no_grad():
        torch.testing.assert_close(ask(lambda **kwargs: run_pipeline(pipe, **kwargs)), stock, atol=1e-5, rtol=0)


def test_wan_with_two_experts_takes_one_timestep_a_call():
    pipe, args = make("Wan 2.2")
    pipe = drive(pipe, CPU)
    x, t, args = torch.randn(2, 16, 2, 2, 2), torch.tensor([900., 100.]), {**args, "guidance_scale": 0, "guidance_scale_2": 0}
    with torch.no_grad():
        together = predict(pipe, x, t, prompt=PROMPTS[:2], **args)
        embeds = pipe.encode_prompt(PROMPTS[:2], None, False, max_sequence_length=32)[0]
        alone = [model(hidden_states=x[i:i + 1], timestep=t[i:i + 1], encoder_hidden_states=embeds[i:i + 1]).sample
                 for i, model in enumerate((pipe.transformer, pipe.transformer_2))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_a_run_resumes_exactly_and_its_adapter_loads_in_diffusers(tmp_path, capsys):
    out = tmp_path / "run"
    args = [*folder_of("SD1.5", tmp_path), "--out", str(out), "--lora-rank", "4", "--max-steps", "4", "--save-every", "2", "--lr", "3e-2"]
    dpo.main(args)
    said = capsys.readouterr().out
    assert "2 pairs of 3 are no ties, 2 a step" in said
    log, saved = rows(out), weights(out, 4)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[0]["rewards/margin"] == pytest.approx(0, abs=1e-5) != log[-1]["rewards/margin"]
    page = (out / "before_after.html").read_text()
    assert page.count("<img") == 4 and "before and after" in page and "<figcaption>a cat" in page
    shutil.rmtree(out / "step_000004")
    dpo.main([*args, "--resume"])
    again = weights(out, 4)
    assert all(torch.equal(v, again[k]) for k, v in saved.items())
    assert [r["loss"] for r in rows(out)] == [r["loss"] for r in log]
    ask = lambda pipe: pipe(prompt="a cat", height=16, width=16, num_inference_steps=3, output_type="np", generator=seeded_generator(1)).images
    base, ours = (diffusers.DiffusionPipeline.from_pretrained(folder) for folder in (tmp_path / "base", out / "model"))
    assert type(ours.scheduler) is diffusers.PNDMScheduler
    first, merged = ask(base), ask(ours)
    assert abs(first - merged).max() > .002
    pytest.importorskip("peft")
    base.load_lora_weights(out / "adapter")
    assert abs(ask(base) - merged).max() < 1e-4


def test_two_ranks_with_shards_equal_one_process(generator_folder, tmp_path):
    """On pairs, and from three prompts, whose candidates the ranks share."""
    options = folder_of("SD1.5", tmp_path, winners=("Image 2", "Image 1", "Image 1"))
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "three.txt").write_text("a red circle\na blue star\na red cube\n")
    prompts = ["--task", "generator", "--model", generator_folder, "--data", f"{tmp_path}/three.txt", "--eval-data", f"{tmp_path}/prompts.txt",
               "--judge", f"{tmp_path}/judge.py:bright", "--num-samples", "4", "--watch", "none"]
    for ranks, more in ((1, []), (2, ["--fsdp"])):
        batch, accumulation = SIX[ranks]
        command = ["dpo", *options, *COMMON, "--batch-size", batch, "--accumulation", accumulation, "--beta", "50", *more]
        runs = [[*command, "--lora-rank", "4", "--out", str(tmp_path / f"{ranks}-pairs")]]
        size = ["--batch-size", batch, "--accumulation", accumulation]
        launch(ranks, [*runs, ["dpo", *prompts, *COMMON, *size, *more, "--out", str(tmp_path / f"{ranks}-prompts")]])
    pairs = [(tmp_path / f"{ranks}-prompts/pairs.jsonl").read_text().splitlines() for ranks in (1, 2)]
    assert pairs[0] == pairs[1] and len(pairs[0]) == 3
    for i in range(3):
        for k in (1, 2):
            one, two = (np.asarray(Image.open(tmp_path / f"{n}-prompts/images/pairs_{i:06d}_{k}.png"), dtype=int) for n in (1, 2))
            assert abs(one - two).max() <= 1
    for data_of in ("pairs", "prompts"):
        one, two = rows(tmp_path / f"1-{data_of}"), rows(tmp_path / f"2-{data_of}")
        for a, b in zip(one, two, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-6)
        a, b = weights(tmp_path / f"1-{data_of}", 2), weights(tmp_path / f"2-{data_of}", 2)
        assert max((a[k] - b[k]).abs().max().item() for k in a) < 1.5e-4
        assert (tmp_path / f"2-{data_of}" / "model").exists()


# ---------------------------------------------------------------- candidates of prompts

JUDGE = """
import numpy as np

def brightness(frames):
    return float(np.mean([np.asarray(frame).mean() for frame in frames]))

def bright(questions):
    # the brighter one wins
    return ['{"winner": "Image %d"}' % (1 if brightness(q.media_1) > brightness(q.media_2) else 2) for q in questions]

def silent(questions):
    return ["no idea"] * len(questions)
"""


def brightness(path):
    return np.asarray(Image.open(path)).mean()


def test_from_prompts_the_best_and_the_worst_candidates_become_pairs(generator_folder, toy_folder, tmp_path, capsys, monkeypatch):
    """By a judge to which brighter is better the brightest of a prompt's candidates wins against the darkest, in random order; a
    run that goes on takes the same pairs, on any number of ranks they are the same."""
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.setattr(dpo, "NUM_PROMPTS", 7)
    monkeypatch.setattr(dpo, "CHUNK", 3)
    prompts = (tmp_path / "prompts.txt")
    prompts.write_text("".join(open(f"{toy_folder}/prompts.txt").readlines()[:9]))
    out = tmp_path / "run"
    args = [*small(toy_folder, "generator"), "--model", generator_folder, "--data", str(prompts), "--judge", f"{tmp_path}/judge.py:bright",
            "--num-samples", "4", "--lora-rank", "2", "--max-steps", "2", "--save-every", "1", "--seed", "5", "--no-bf16", "--out", str(out)]
    dpo.main(args)
    said = capsys.readouterr().out
    assert "'kept': 7" in said and ", 7 pairs of 7 are no ties, " in said
    assert (out / "before_after.html").exists() and "true" in said              # what --watch measures by default
    pairs = data.read_records(out / "pairs.jsonl", "pair")
    assert [p["prompt"] for p in pairs] == [r["prompt"] for r in data.read_records(prompts, "prompt")][:7]
    assert {p["winner"] for p in pairs} == {"Image 1", "Image 2"}
    pipe = load_pipeline(generator_folder, CPU)
    for i, pair in enumerate(pairs):
        media = sample_media(pipe, [pair] * 4, [(5, i, member) for member in range(4)], 4, pipe.call_args)
        levels = [np.asarray(frames[0]).mean() for frames in media]
        winner, loser = pair["images"] if pair["winner"] == "Image 1" else pair["images"][::-1]
        assert brightness(winner) == max(levels) > min(levels) == brightness(loser)
    log = rows(out)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    shutil.rmtree(out / "step_000002")
    (tmp_path / "judge.py").write_text(JUDGE.replace(">", "<"))
    dpo.main([*args, "--resume"])
    assert data.read_records(out / "pairs.jsonl", "pair") == pairs and [r["loss"] for r in rows(out)] == [r["loss"] for r in log]
    dpo.main([*args, "--max-steps", "1"])                                       # a new run, by another judge
    for old, new in zip(pairs, data.read_records(out / "pairs.jsonl", "pair"), strict=True):
        assert (old["winner"] == "Image 1") == (new["winner"] == "Image 1")     # the order is of (seed, prompt)
        assert old["images"] == new["images"]
    with pytest.raises(ValueError, match="nothing is preferred: .*undecided"):
        dpo.main([*args[:-1], str(tmp_path / "silent"), "--judge", f"{tmp_path}/judge.py:silent"])


def test_a_judge_that_scores_ranks_by_half_the_comparisons_and_all_scores(tmp_path):
    """Sec. 3 of arXiv 2503.05236, for a judge with a score template in its folder. Candidates are grey levels; the judge prefers and scores the brighter one."""
    groups = [[[Image.new("RGB", (4, 4), (level,) * 3)] for level in levels] for levels in ([10, 90, 50, 30, 70, 20], [5, 5, 5, 5])]
    asked = []

    def judge(questions):
        asked.append([type(q) for q in questions])
        level = lambda frames: frames[0].getpixel((0, 0))[0]
        if type(questions[0]) is Candidate:
            return [f"Final Score: {level(q.media)}" for q in questions]
        return ['{"winner": "%s"}' % ("Tie" if level(q.media_1) == level(q.media_2) else
                                     "Image 1" if level(q.media_1) > level(q.media_2) else "Image 2") for q in questions]

    prompts = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    groups = dict(zip([2, 0], groups))
    plain, scored = (dpo.parse_args(["--task", "generator", "--judge", str(tmp_path / name)]) for name in ("plain", "scored"))
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored/score_template.txt").write_text("How good? {prompt}")
    cases = dpo.rank_groups(judge, scored, prompts, groups)
    assert [len(questions) for questions in asked] == [3 + 2, 6 + 4]
    assert cases[1] == ("dropped: equal or undecided", None)
    case, pair = cases[0]
    images = pair["images"] if pair["winner"] == "Image 1" else pair["images"][::-1]
    assert (case, pair["prompt"]) == ("kept", "c") and [image.getpixel((0, 0))[0] for image in images] == [90, 10]
    asked.clear()
    cases = dpo.rank_groups(judge, plain, prompts, groups)      # win rates: rings of 6 and 4
    assert [len(questions) for questions in asked] == [12 + 6] and cases[1] == ("dropped: equal or undecided", None)
    assert cases[0][0] == "kept"
    cases = dpo.rank_groups(lambda questions: [Failure("down"), *judge(questions)[1:]], plain, prompts, groups)
    assert [case for case, _ in cases] == ["dropped: a comparison failed", "dropped: equal or undecided"]
    with pytest.raises(ValueError, match="none of 18 questions is answered: no route"):
        dpo.rank_groups(lambda questions: [Failure("no route")] * len(questions), plain, prompts, groups)


# ---------------------------------------------------------------- what is refused, and why

def refused(folder_options, *extra):
    with pytest.raises(ValueError) as error:
        dpo.main([*folder_options, "--max-steps", "1", *extra])
    return str(error.value)


def test_bad_pairs_are_refused_with_the_reason(tmp_path, monkeypatch):
    options = folder_of("SD1.5", tmp_path)
    out = ["--out", str(tmp_path / "run")]
    pairs = tmp_path / "pairs.jsonl"
    sound = pairs.read_text()
    pairs.write_text(sound.splitlines()[1])
    assert "holds nothing but ties" in refused(options, *out)
    picture(0).save(tmp_path / "film.gif", save_all=True, append_images=[picture(1)])
    pairs.write_text(sound.replace("20.png", "film.gif"))
    assert "pairs.jsonl:3:" in (text := refused(options, *out)) and "film.gif has more frames, the pipeline makes 1: num_frames in --pipe-args" in text
    pairs.write_text(sound)
    picture(0, 40).save(tmp_path / "20.png")
    assert "media of different sizes, as [(16, 16), (40, 40)]: pass height and width" in refused([*options, *out], "--pipe-args", '{"num_inference_steps": 1}')
    picture(0, 16).save(tmp_path / "20.png")
    diffusers.DDIMScheduler(**BETAS, prediction_type="sample").save_pretrained(tmp_path / "base" / "scheduler")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(index.read_text().replace("PNDMScheduler", "DDIMScheduler"))
    assert "predicts 'sample': expected epsilon" in refused(options, *out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="sft.py --task generator"):
        dpo.main(["--task", "generator"])
    with pytest.raises(SystemExit, match="out/toy/prompts.txt is not there yet"):
        dpo.main(["--task", "generator", "--model", str(tmp_path / "base")])


def test_clips_of_another_length_foreign_latents_and_packing_are_refused(tmp_path):
    options = folder_of("text-to-video", tmp_path)
    (tmp_path / "00" / "2.png").unlink()
    assert "00 has 2 frames, the pipeline makes 3" in refused(options, "--out", str(tmp_path / "run"))
    (tmp_path / "wan").mkdir()
    assert "would gather other experts' shards" in refused(folder_of("Wan 2.2", tmp_path / "wan"), "--fsdp")
    pipe, args = make("SD1.5")
    with pytest.raises(ValueError, match="latents of shape .1, 4, 6, 6., but this call makes others, of .1, 4, 8, 8."):
        predict(drive(pipe, CPU), torch.randn(1, 4, 6, 6), torch.tensor([7]), prompt=["a cat"], **args)
    pipe, _ = make("LTX")
    with pytest.raises(ValueError, match="LTXPipeline.*packs latents in a way of its own"):
        data.encode_media(pipe, [[picture(0)]], {})
