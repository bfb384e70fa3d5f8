"""The driver on every generator family, as tiny random pipelines: one code path, no table of exceptions."""
import json

import diffusers
import pytest
import torch
from PIL import Image

import data
import grpo
import sft
from test_sft import rows
from tiny_pipelines import FAMILIES, NEGATIVE, make

PROMPTS, STEPS = ["a cat", "a dog on a cube", "a dog on a cube"], 4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(the pipeline with the driver installed, the arguments of a call)"""
    pipe, args = make(request.param)
    return sft.prepare(pipe, torch.device("cpu")), {**args, "num_inference_steps": STEPS, "output_type": "pt"}


def options(*extra):
    return grpo.parse_args(["--sde-steps", "2", "--no-shared-noise", *extra])


def test_media_for_training_have_as_many_frames_as_the_pipeline_makes(family, tmp_path):
    pipe, args = family
    call = {**args, "output_type": "pil", "prompt": PROMPTS}
    frames = sft.frames_of(sft.run(pipe, **call))[0]
    assert len(frames) == sft.num_frames_of(pipe, call)
    assert data.load_frames({}, frames, len(frames), pipe) == frames
    with pytest.raises(ValueError, match="films.jsonl:3: .* has more frames"):
        data.load_frames({"where": "films.jsonl:3"}, frames * 2, len(frames), pipe)


def test_eta_0_is_the_stock_sampler(family):
    pipe, args = family
    seeds = [(7, i) for i in range(len(PROMPTS))]
    stock = sft.run(pipe, prompt=PROMPTS, generator=[sft.generator(*seed) for seed in seeds], **args)[0]
    images, _ = grpo.rollout(pipe, PROMPTS, seeds, options("--eta", "0"), **args)
    assert torch.equal(torch.stack([frames[0] for frames in images]), stock)


@pytest.mark.parametrize("lora", [True, False])
def test_ratio_is_1_at_the_first_update_and_gradients_arrive(family, lora):
    pipe, args = family
    settings = options("--lora-rank", "2", "--kl", "0") if lora else options("--lora-rank", "0", "--kl", "0")
    _, trajectory = grpo.rollout(pipe, PROMPTS, [(7, i) for i in range(len(PROMPTS))], settings, **args)
    modules = sft.denoisers(pipe).values()
    if lora:
        for module in modules:
            sft.add_lora(module, 2, 2, r"(attn|attention).*(to_q|to_out\.0|\.q_proj)$")
    params = [p for module in modules for p in sft.trainable(module).values()]
    stats = grpo.accumulate_gradients(pipe, trajectory, torch.tensor([1., -1., .5]), settings, torch.full((3,), 1 / 3), prompt=PROMPTS, **args)
    assert stats["max_ratio_error"] == 0
    assert sum(p.grad.abs().sum().item() for p in params if p.grad is not None) > 0
    for p in params:
        p.grad = None
    for module in modules:                           # as it was, for the next test
        for name, layer in sft.lora_layers(module).items():
            module.set_submodule(name, layer.base)
        module.requires_grad_(True)


def guided_by_hand(name, pipe, x, sigma, args):
    """The velocity of one guided step by direct calls of the denoiser, without the driver."""
    model, device, num = pipe.transformer, torch.device("cpu"), len(PROMPTS)
    with torch.no_grad():
        if name == "FLUX.1":
            embeds, pooled, text_ids = pipe.encode_prompt(prompt=PROMPTS, prompt_2=None, device=device, max_sequence_length=32)
        elif name == "SD3.5":
            embeds, negative, pooled, negative_pooled = pipe.encode_prompt(prompt=PROMPTS, prompt_2=None, prompt_3=None, negative_prompt=[NEGATIVE] * num, device=device,
                                                                           max_sequence_length=32)
        else:
            embeds, negative = pipe.encode_prompt(prompt=PROMPTS, negative_prompt=[NEGATIVE] * num, max_sequence_length=32)
    if name == "FLUX.1":                             # its guidance is an input, its time runs from 0 to 1
        return model(x, timestep=sigma.expand(num), guidance=torch.full((num,), 3.5), pooled_projections=pooled, encoder_hidden_states=embeds, txt_ids=text_ids,
                     img_ids=pipe._prepare_latent_image_ids(num, 4, 4, device, torch.float32))[0]
    t = (1000 * sigma).expand(num)
    if name == "SD3.5":
        both = model(torch.cat([x, x]), timestep=t.repeat(2), encoder_hidden_states=torch.cat([negative, embeds]), pooled_projections=torch.cat([negative_pooled, pooled]))[0]
        away, toward = both.chunk(2)
    else:
        away, toward = (model(x, timestep=t, encoder_hidden_states=e)[0] for e in (negative, embeds))
    return away + args["guidance_scale"] * (toward - away)


@pytest.mark.parametrize("name", ["FLUX.1", "SD3.5", "Wan 2.1"])
@pytest.mark.parametrize("bf16", [False, True])
def test_velocity_and_gradients_equal_a_direct_call(name, bf16):
    pipe, args = make(name)
    sft.prepare(pipe, torch.device("cpu"))
    shape, autocast = {"FLUX.1": (3, 16, 16), "SD3.5": (3, 4, 8, 8), "Wan 2.1": (3, 16, 2, 2, 2)}[name], torch.bfloat16 if bf16 else None
    x, sigma, weight = torch.randn(shape), torch.tensor(.6), torch.randn(shape)
    with torch.autocast("cpu", autocast, enabled=bf16):
        by_hand = guided_by_hand(name, pipe, x, sigma, args)
    (by_hand.float() * weight).sum().backward()
    gradients = {n: p.grad.clone() for n, p in pipe.transformer.named_parameters() if p.grad is not None}
    pipe.transformer.zero_grad()
    v = sft.velocity(pipe, x, sigma, prompt=PROMPTS, autocast=autocast, **args)
    (v.float() * weight).sum().backward()
    torch.testing.assert_close(v, by_hand)
    assert len(gradients) > 10
    for n, gradient in gradients.items():
        torch.testing.assert_close(dict(pipe.transformer.named_parameters())[n].grad, gradient, **dict(rtol=1e-2, atol=1e-2) if bf16 else {})


def test_bf16_autocast_keeps_the_ratio_near_1_and_checkpointing_the_gradients(family):
    pipe, args = family
    settings, gradients = options("--lora-rank", "0", "--kl", "0"), []
    _, trajectory = grpo.rollout(pipe, PROMPTS, [(7, i) for i in range(len(PROMPTS))], settings, autocast=torch.bfloat16, **args)
    for recompute in (False, True):
        for module in sft.denoisers(pipe).values():
            module.zero_grad()
            module.enable_gradient_checkpointing() if recompute else None
        stats = grpo.accumulate_gradients(pipe, trajectory, torch.tensor([1., -1., .5]), settings, torch.full((3,), 1 / 3), prompt=PROMPTS, autocast=torch.bfloat16, **args)
        gradients.append([p.grad for module in sft.denoisers(pipe).values() for p in module.parameters() if p.grad is not None])
        assert stats["max_ratio_error"] < 1e-6
    for module in sft.denoisers(pipe).values():
        module.disable_gradient_checkpointing()
        module.zero_grad()
    assert len(gradients[0]) > 5
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", FAMILIES)
def test_parked_encoders_change_nothing(name, tmp_path):
    """They leave the pipeline while nothing is encoded, come back for another prompt, and are saved."""
    pictures = []
    for park in (False, True):
        pipe, args = make(name)
        sft.prepare(pipe, torch.device("cpu"), park)
        for prompts in (PROMPTS, PROMPTS[::-1]):
            pictures.append(grpo.rollout(pipe, prompts, [(7, i) for i in range(3)], options(), num_inference_steps=STEPS, output_type="pt", **args)[0])
            assert not park or pipe.text_encoder is None
    for stock, parked in zip(pictures[:2], pictures[2:]):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(stock, parked))
    assert not torch.equal(pictures[0][0][0], pictures[1][0][0])
    sft.save_pipeline(pipe, tmp_path / "saved")
    assert (tmp_path / "saved" / "text_encoder").is_dir() and pipe.text_encoder is None


EDITORS = ["FLUX.1 Kontext", "Qwen-Image-Edit", "Wan image-to-video"]


@pytest.mark.parametrize("name", EDITORS)
def test_source_images_go_along_with_their_prompts(name, tmp_path):
    """Each prompt has an image of its own to edit or animate: another source gives another result, in a batch as alone."""
    pipe, args = make(name)
    sft.prepare(pipe, torch.device("cpu"))
    args.pop("image")
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{name}.png")
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps({"prompt": "a cat", "source": f"{name}.png"}) + "\n" for name in "ab"))
    records = data.read_records(tmp_path / "edits.jsonl", "prompt")
    call = dict(**args, num_inference_steps=STEPS, output_type="pt")
    both = sft.sample_media(pipe, ["a cat"] * 2, [1, 1], **grpo.source_images(records), **call)
    alone = sft.sample_media(pipe, ["a cat"], [1], **grpo.source_images(records[1:]), **call)
    assert not torch.allclose(both[0][0], both[1][0])
    torch.testing.assert_close(both[1][0], alone[0][0])
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a cat", "source": "c.png"}\n')
    with pytest.raises(ValueError, match="edits.jsonl:1: .*c.png does not exist"):
        data.read_records(tmp_path / "edits.jsonl", "prompt")


@pytest.mark.parametrize("name", EDITORS)
def test_editors_start_at_ratio_1_from_records_with_sources(name, tmp_path):
    """A group of each source, through rollout and replay as grpo.main does; Wan's call takes one source, so its groups come one by one."""
    pipe, args = make(name)
    sft.prepare(pipe, torch.device("cpu"))
    args.pop("image")
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps({"prompt": "a cat", "source": f"{color}.png"}) + "\n" for color in ("red", "blue")))
    records = [record for record in data.read_records(tmp_path / "edits.jsonl", "prompt") for _ in range(2)]
    settings, found = options("--lora-rank", "0", "--kl", "0"), []
    for chunk in ([0, 1], [2, 3]) if name.startswith("Wan") else ([0, 1, 2, 3],):
        call = dict(prompt=[records[n]["prompt"] for n in chunk], **grpo.source_images([records[n] for n in chunk]), **args, num_inference_steps=STEPS, output_type="pt")
        media, trajectory = grpo.rollout(pipe, seeds=[(7, n % 2) for n in chunk], args=settings, **call)
        stats = grpo.accumulate_gradients(pipe, trajectory, torch.tensor([1., -1., .5, .25])[:len(chunk)], settings, torch.full((len(chunk),), 1 / 4), **call)
        assert stats["max_ratio_error"] == 0
        found += media
    assert not torch.allclose(found[0][0], found[2][0])                        # the same prompt and noise, another source
    assert sum(p.grad.abs().sum().item() for p in pipe.transformer.parameters() if p.grad is not None) > 0


def test_wan_with_several_sources_in_a_call_says_what_to_do():
    pipe, args = make("Wan image-to-video")
    sft.prepare(pipe, torch.device("cpu"))
    args["image"] = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    with pytest.raises(ValueError, match="WanImageToVideoPipeline takes one source image a call, not 2: pass a --batch-size that divides --group-size"):
        grpo.rollout(pipe, ["a cat"] * 2, [(7, 0), (7, 1)], options(), num_inference_steps=STEPS, **args)


def test_a_run_on_prompts_with_sources(tmp_path):
    """grpo.py on Wan image-to-video, a folder: groups of two sources, evaluations with the sources of the held-out records."""
    pipe, args = make("Wan image-to-video")
    pipe.save_pretrained(tmp_path / "wan")
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps({"prompt": "a cat", "source": f"{color}.png"}) + "\n" for color in ("red", "blue")))
    (tmp_path / "bright.py").write_text("import numpy as np\nbright = lambda media, prompts: [float(np.mean([np.asarray(f) for f in frames])) for frames in media]\n")
    call = {k: v for k, v in args.items() if k != "image"} | {"num_inference_steps": STEPS}
    grpo.main(["--model", str(tmp_path / "wan"), "--data", str(tmp_path / "edits.jsonl"), "--eval-data", str(tmp_path / "edits.jsonl"), "--eval-num", "2",
               "--reward", f"{tmp_path}/bright.py:bright", "--pipe-arg", *(f"{k}={v}" for k, v in call.items()), "--sde-steps", "2", "--lora-rank", "2",
               "--lora-targets", r"attn\d\.to_q$", "--num-prompts", "2", "--group-size", "2", "--batch-size", "2", "--max-steps", "2", "--warmup-steps", "1",
               "--lr", "1e-2", "--out", str(tmp_path / "run")])
    first, second = rows(tmp_path / "run")
    assert first["max_ratio_error"] == 0 and first["grad_norm"] > 0 and second["kl"] > 0


def test_wan_with_its_own_scheduler():
    """The released folders hold a UniPC scheduler with flow sigmas: it is a flow, sampled by it without us, by Euler steps with us."""
    pipe, args = make("Wan 2.1")
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert sft.prediction_type(pipe) == "flow"
    sft.prepare(pipe, torch.device("cpu"))
    settings, args = options("--kl", "0", "--lora-rank", "0"), dict(**args, num_inference_steps=STEPS, output_type="pt")
    _, trajectory = grpo.rollout(pipe, PROMPTS, [(7, i) for i in range(3)], settings, **args)
    sigmas = trajectory["sigmas"]
    assert sigmas[-1] == 0 and (sigmas.diff() < 0).all() and sigmas[0] <= 1
    stats = grpo.accumulate_gradients(pipe, trajectory, torch.tensor([1., -1., .5]), settings, torch.full((3,), 1 / 3), prompt=PROMPTS, **args)
    assert stats["max_ratio_error"] == 0 and sft.prediction_type(pipe) == "flow"


def test_what_the_driver_cannot_carry_is_refused_with_the_reason():
    pipe, _ = make("SD3.5")
    pipe.transformer.transformer_blocks[0]._hf_hook = object()
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline is offloaded by hooks"):
        sft.install(pipe)
    for kind, reason in ((diffusers.LTX2Pipeline, "copies its scheduler"), (diffusers.DDPMPipeline, "no prepare_latents")):
        with pytest.raises(ValueError, match=f"{kind.__name__} .*{reason}"):
            sft.install(object.__new__(kind))


def test_a_video_generator_is_rewarded_by_its_frames(tmp_path):
    """A whole run on Wan 2.1: the reward sees the 5 frames of a clip; the adapter loads in diffusers."""
    pipe, args = make("Wan 2.1")
    pipe.save_pretrained(tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cube\n")
    (tmp_path / "bright.py").write_text("import numpy as np\n"
        "def bright(media, prompts):\n    assert all(len(frames) == 5 for frames in media)\n    return [float(np.mean([np.asarray(f) for f in frames])) for frames in media]\n")
    call = {**args, "num_inference_steps": 4}
    grpo.main(["--model", str(tmp_path / "wan"), "--data", str(tmp_path / "prompts.txt"), "--eval-data", str(tmp_path / "prompts.txt"), "--eval-num", "2",
               "--reward", f"{tmp_path}/bright.py:bright", "--pipe-arg", *(f"{k}={v}" for k, v in call.items()), "--sde-steps", "2", "--lora-rank", "2",
               "--lora-targets", r"attn\d\.to_q$", "--num-prompts", "2", "--group-size", "2", "--max-steps", "2", "--warmup-steps", "1", "--lr", "1e-2",
               "--out", str(tmp_path / "run")])
    first, second = rows(tmp_path / "run")
    assert first["max_ratio_error"] == 0 and second["kl"] > 0 and (tmp_path / "run" / "before_after.png").exists()
    theirs = diffusers.WanPipeline.from_pretrained(tmp_path / "wan")
    ours = diffusers.WanPipeline.from_pretrained(tmp_path / "run" / "model")
    theirs.load_lora_weights(tmp_path / "run" / "adapter")
    base, merged = (dict(p.transformer.named_parameters()) for p in (theirs, ours))
    name = "blocks.0.attn1.to_q"
    delta = base[f"{name}.lora_B.default_0.weight"] @ base[f"{name}.lora_A.default_0.weight"]
    torch.testing.assert_close(base[f"{name}.base_layer.weight"] + delta, merged[f"{name}.weight"], atol=1e-5, rtol=1e-4)
