"""The driver on every generator family, as tiny random pipelines: one code path, no table of exceptions."""
import diffusers
import pytest
import torch

import grpo
import sft
from test_sft import rows
from tiny_pipelines import FAMILIES, make

PROMPTS, STEPS = ["a cat", "a dog on a cube", "a dog on a cube"], 4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(the pipeline with the driver installed, the arguments of a call)"""
    pipe, args = make(request.param)
    return sft.prepare(pipe, torch.device("cpu")), {**args, "num_inference_steps": STEPS, "output_type": "pt"}


def options(*extra):
    return grpo.parse_args(["--sde-steps", "2", "--no-shared-noise", *extra])


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
    stats = grpo.accumulate_gradients(pipe, trajectory, torch.tensor([1., -1., .5]), settings, 1 / 3, prompt=PROMPTS, **args)
    assert stats["max_ratio_error"] == 0
    assert sum(p.grad.abs().sum().item() for p in params if p.grad is not None) > 0
    for p in params:
        p.grad = None
    for module in modules:                           # as it was, for the next test
        for name, layer in sft.lora_layers(module).items():
            sft.replace_module(module, name, layer.base)
        module.requires_grad_(True)


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
