"""Diffusion-DPO on tiny random pipelines: the loss against direct calls of their denoisers, clean latents, sampling, whole runs."""
import json
import math
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dpo
import sft
from test_ranks import COMMON, SIX, launch
from test_sft import rows, weights
from tiny_pipelines import BETAS, DIFFUSION, make

PROMPTS, CPU = ["a cat", "a dog on a cube", "a red cube"], torch.device("cpu")
FAST = ["--warmup-steps", "1", "--no-bf16", "--batch-size", "2", "--eval-num", "2"]


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
            *FAST, "--pipe-arg", *(f"{k}={v}" for k, v in call.items())]


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


@pytest.mark.parametrize("rank", ["2", "0"])
@pytest.mark.parametrize("family", [*DIFFUSION, "SD3.5", "FLUX.1", "Wan 2.1"])
def test_loss_is_that_of_direct_calls_and_ln2_at_first(family, rank, tmp_path):
    args = dpo.parse_args([*folder_of(family, tmp_path), "--lora-rank", rank, "--sigma-mean", ".5", "--seed", "3"])
    task = dpo.Generator(args, sft.start_ranks())
    indices, step = [1, 0], 5
    batch = task.batch(indices, step)
    losses = dpo.dpo_loss(*task.logps(batch)[0], *task.reference_logps(batch), args.beta)[0]
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)).double(), atol=3e-4, rtol=0)
    torch.manual_seed(0)
    for module in task.modules.values():
        for p in sft.trainable(module).values():
            p.data += (.02 if rank == "0" else .3) * torch.randn_like(p)
    logps, stats = task.logps(batch)
    losses, *rewards = dpo.dpo_loss(*logps, *(reference := task.reference_logps(batch)), beta := 5)
    stats |= task.reference_stats(reference)

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
            noise = sft.seeded_noise(x0.shape[1:], 3, step, i)[None]
            if family in DIFFUSION:
                t = torch.randint(1000, (), generator=sft.generator(3, step, i, "t"))[None]
                ddpm = diffusers.DDPMScheduler(**BETAS)
                x, target = ddpm.add_noise(x0, noise, t), ddpm.get_velocity(x0, noise, t) if family == "SD2.1" else noise
            else:
                sigma = torch.sigmoid(.5 + sft.seeded_noise((), 3, step, i, "sigma"))
                x, target, t = x0 + sigma * (noise - x0), noise - x0, 1000 * sigma[None]
            with torch.no_grad():
                errors[side] = [(direct(family, pipe, x, t, [records[i]["prompt"]]) - target).pow(2).mean() for pipe in (task.pipe, base)]
        (w, w_ref), (l, l_ref) = errors["w"], errors["l"]
        torch.testing.assert_close(torch.stack([stats["error/winner"][b], stats["error/loser"][b]]), torch.stack([w, l]).double(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.stack([stats["error/winner_ref"][b], stats["error/loser_ref"][b]]), torch.stack([w_ref, l_ref]).double(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(losses[b], -F.logsigmoid(-beta / 2 * ((w - w_ref) - (l - l_ref))).double(), atol=1e-5, rtol=1e-4)
        assert (w - w_ref).abs() > 1e-4 < (l - l_ref).abs()                     # there is something to compare
    losses.sum().backward()
    assert sum(p.grad.abs().sum() for module in task.modules.values() for p in sft.trainable(module).values() if p.grad is not None) > 0


@pytest.mark.parametrize("family", ["SD1.5", "text-to-video", "FLUX.1", "SD3.5", "Qwen-Image", "Z-Image", "Sana", "Wan 2.1", "HunyuanVideo"])
def test_the_pipeline_decodes_encoded_media_as_its_vae_does(family):
    """Shift, scale and packing are undone; media come to height and width by the pipeline's processor."""
    pipe, args = make(family)
    pipe, num_frames = sft.prepare(pipe, CPU), args.get("num_frames", 1)
    media = [[picture(10 * i + f, 40) for f in range(num_frames)] for i in range(2)]
    x = sft.encode_media(pipe, media, height=args["height"], width=args["width"])

    def keep(i, latents, v):
        return x if latents.shape == x.shape else x.transpose(1, 2).flatten(0, 1)
    images = sft.run(pipe, keep, prompt=PROMPTS[:2], **{**args, "num_inference_steps": 1, "output_type": "pt"})[0]
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
    ask = lambda call: call(prompt=PROMPTS, generator=[sft.generator(i) for i in range(3)], num_inference_steps=3, output_type="pt", **args)[0]
    stock = ask(pipe)
    pipe = sft.prepare(pipe, CPU)
    torch.testing.assert_close(ask(lambda **kwargs: sft.run(pipe, **kwargs)), stock, atol=1e-5, rtol=0)


def test_wan_with_two_experts_takes_one_timestep_a_call():
    pipe, args = make("Wan 2.2")
    pipe = sft.prepare(pipe, CPU)
    x, t, args = torch.randn(2, 16, 2, 2, 2), torch.tensor([900., 100.]), {**args, "guidance_scale": 0, "guidance_scale_2": 0}
    together = sft.predict(pipe, x, t, grad=False, prompt=PROMPTS[:2], **args)
    embeds = pipe.encode_prompt(PROMPTS[:2], None, False, max_sequence_length=32)[0]
    with torch.no_grad():
        alone = [model(hidden_states=x[i:i + 1], timestep=t[i:i + 1], encoder_hidden_states=embeds[i:i + 1]).sample
                 for i, model in enumerate((pipe.transformer, pipe.transformer_2))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", ["4", "0"])
def test_a_run_resumes_exactly_and_its_adapter_loads_in_diffusers(rank, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*folder_of("SD1.5", tmp_path), "--out", str(out), "--lora-rank", rank, "--max-steps", "4", "--save-every", "2", "--lr", "3e-2"]
    dpo.main(args)
    said = capsys.readouterr().out
    assert "2 pairs, 1 ties are dropped" in said and "2 held-out samples" in said
    log, whole = rows(out), weights(out, 4)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[0]["rewards/margin"] == pytest.approx(0, abs=1e-5) != log[-1]["rewards/margin"]
    assert all(row["error/winner"] > 0 < row["error/loser"] for row in log)
    assert log[0]["error/winner_ref"] == pytest.approx(log[0]["error/winner"], rel=1e-4) and log[-1]["error/loser_ref"] != log[-1]["error/loser"]
    assert (out / "before_after.png").exists() and (out / "curves.png").exists()
    shutil.rmtree(out / "step_000004")
    dpo.main([*args, "--resume"])
    assert all(torch.equal(v, weights(out, 4)[k]) for k, v in whole.items())
    assert [r["loss"] for r in rows(out)] == [r["loss"] for r in log]
    ask = lambda pipe: pipe(prompt="a cat", height=16, width=16, num_inference_steps=3, output_type="np", generator=sft.generator(1)).images
    base, ours = (diffusers.DiffusionPipeline.from_pretrained(folder) for folder in (tmp_path / "base", out / "model"))
    assert type(ours.scheduler) is diffusers.PNDMScheduler
    first, merged = ask(base), ask(ours)
    assert abs(first - merged).max() > .002
    if rank != "0":
        pytest.importorskip("peft")
        base.load_lora_weights(out / "adapter")
        assert abs(ask(base) - merged).max() < 1e-4


def test_two_ranks_with_shards_equal_one_process(tmp_path):
    options = folder_of("SD1.5", tmp_path, winners=("Image 2", "Image 1", "Image 1"))
    for ranks, more in ((1, []), (2, ["--fsdp"])):
        batch, accumulation = SIX[ranks]
        command = ["dpo", *options, *COMMON, "--batch-size", batch, "--accumulation", accumulation, "--eval-num", "3", "--beta", "50", *more]
        launch(ranks, [[*command, "--lora-rank", rank, "--out", str(tmp_path / f"{ranks}-{rank}")] for rank in ("4", "0")])
    for rank in ("4", "0"):
        one, two = rows(tmp_path / f"1-{rank}"), rows(tmp_path / f"2-{rank}")
        for a, b in zip(one, two, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-6)
        a, b = weights(tmp_path / f"1-{rank}", 2), weights(tmp_path / f"2-{rank}", 2)
        assert max((a[k] - b[k]).abs().max().item() for k in a) < 1.5e-4
        assert (tmp_path / f"2-{rank}" / "model").exists()


# ---------------------------------------------------------------- what is refused, and why

def refused(folder_options, *extra):
    with pytest.raises(ValueError) as error:
        dpo.main([*folder_options, "--max-steps", "1", *extra])
    return str(error.value)


def test_bad_pairs_are_refused_with_the_reason(tmp_path, monkeypatch, capsys):
    options = folder_of("SD1.5", tmp_path)
    out = ["--out", str(tmp_path / "run")]
    pairs = tmp_path / "pairs.jsonl"
    sound = pairs.read_text()
    pairs.write_text(sound.splitlines()[1])
    assert "holds nothing but ties" in refused(options, *out)
    picture(0).save(tmp_path / "film.gif", save_all=True, append_images=[picture(1)])
    pairs.write_text(sound.replace("20.png", "film.gif"))
    assert "pairs.jsonl:3:" in (text := refused(options, *out)) and "film.gif has more frames, StableDiffusionPipeline makes 1" in text
    pairs.write_text(sound)
    picture(0, 40).save(tmp_path / "20.png")
    assert "media of different sizes, as [(16, 16), (40, 40)]: pass --pipe-arg height=" in refused([*options, *out], "--pipe-arg", "num_inference_steps=1")
    picture(0, 16).save(tmp_path / "20.png")
    config = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"sample"'))
    assert "predicts 'sample'; expected epsilon" in refused(options, *out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="python sft.py --task generator"):
        dpo.main(["--task", "generator"])
    with pytest.raises(SystemExit, match="out/sift/pairs.jsonl is not there yet"):
        dpo.main(["--task", "generator", "--model", str(tmp_path / "base")])
    with pytest.raises(SystemExit):
        dpo.main(["--task", "generator", "--precompute-ref"])
    assert "are for judges" in capsys.readouterr().err


def test_clips_of_another_length_foreign_latents_and_packing_are_refused(tmp_path):
    options = folder_of("text-to-video", tmp_path)
    (tmp_path / "00" / "2.png").unlink()
    assert "00 has 2 frames, TextToVideoSDPipeline makes 3" in refused(options, "--out", str(tmp_path / "run"))
    (tmp_path / "wan").mkdir()
    assert "shards of different experts" in refused(folder_of("Wan 2.2", tmp_path / "wan"), "--fsdp")
    pipe, args = make("SD1.5")
    with pytest.raises(ValueError, match="latents of shape .1, 4, 6, 6. where this call of the pipeline denoises .1, 4, 8, 8."):
        sft.predict(sft.prepare(pipe, CPU), torch.randn(1, 4, 6, 6), torch.tensor([7]), prompt=["a cat"], **args)
    pipe, _ = make("LTX")
    with pytest.raises(ValueError, match="LTXPipeline packs latents in a way of its own"):
        sft.encode_media(pipe, [[picture(0)]])
