"""The driver on every generator family, as tiny random pipelines: one code path, no table of exceptions."""
import pytest
import torch

import grpo
import sft
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
