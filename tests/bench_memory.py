"""Memory and arithmetic of the four commands for real models in README.md, counted, not measured.

    python tests/bench_memory.py                          the table
    python tests/bench_memory.py --check [--grad-ckpt]    a small SFT here, counted and measured

Models of the real sizes without storage (FakeTensorMode), on one of 8 ranks that are not there, are
trained by the stages' own functions on the CPU's code path, whose flash attention holds no T x T
scores either; what tensors take and matrix products cost is added up. Not counted: CUDA's context,
NCCL's buffers, fragmentation, the text encoders' work (their weights are), sampling, decoding.
"""
import contextlib, functools, re, resource, shlex, sys, weakref
from pathlib import Path
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import dpo, grpo, sft

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put_.default)
FLOP = {                                            # causal attention counts like a full one
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda query, key, *rest, **options: 4 * query.numel() * key.shape[-2],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, query, key, *rest, **options: 10 * query.numel() * key.shape[-2]}

class Counter(TorchDispatchMode):
    """Bytes of the storages that live, their peak, and FLOP. Floats are fake in it, integers real,
    as models read the sizes of images from them; the value of a fake number is 1."""
    def __init__(self):
        super().__init__()
        self.sizes = {}                             # {id of a storage: bytes}
        self.live = self.peak = self.flop = 0

    def track(self, storage):
        key = id(storage)
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        self.live += storage.nbytes() - self.sizes.get(key, 0)
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def forget(self, key):
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented                   # it comes again with the local tensors
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_fake = any(isinstance(x, FakeTensor) for x in tensors)
        if func is aten._local_scalar_dense.default and is_fake:
            return 1.0
        if is_fake and func in INDEXING and args[1][0].dtype == torch.bool:
            with unset_fake_temporarily():          # a real mask: its places
                args = (args[0], args[1][0].nonzero().unbind(1), *args[2:])
        with unset_fake_temporarily() if tensors and not is_fake else contextlib.nullcontext():
            output = func(*args, **kwargs)
        made = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        if made and not tensors and not made[0].is_floating_point():
            with unset_fake_temporarily():
                output = func(*args, **kwargs)
        for x in made:
            self.track(x.untyped_storage())
        if func.overloadpacket in FLOP:
            self.flop += FLOP[func.overloadpacket](*args, **kwargs, out_val=output)
        return output

@contextlib.contextmanager
def counting():
    """A Counter under which FSDP's resizing counts, and DTensor's trials on whole shapes do not."""
    counter = Counter()
    stock_resize = torch.UntypedStorage.resize_
    stock_trial = ShardingPropagator._propagate_tensor_meta_non_cached

    def resize(storage, size):
        stock_resize(storage, size)
        counter.track(storage)

    def trial(*args):
        with _disable_current_modes():
            return stock_trial(*args)
    with (mock.patch.object(torch.UntypedStorage, "resize_", resize),
          mock.patch.object(ShardingPropagator, stock_trial.__name__, trial),
          FakeTensorMode(allow_non_fake_inputs=True), counter):
        yield counter

def num_bytes(tensors):                             # of this rank's parts
    return sum(x.to_local().nbytes if isinstance(x, DTensor) else x.nbytes for x in tensors)

def count(make_run, args):
    """(the columns' GiB, FLOP) of a micro-step that finds gradients of an earlier one and AdamW's
    state, which is made last here; "backward" and "step" are what they add at their peaks."""
    with counting() as counter:
        model, frozen, [adamw], micro_step = make_run(args)
        micro_step().backward()
        weights = num_bytes([*model.parameters(), *frozen.parameters()])
        gradients = num_bytes([p.grad for p in model.parameters() if p.requires_grad])
        counter.flop = 0
        loss = micro_step()
        forward = counter.live - weights - gradients
        counter.peak = counter.live
        loss.backward()
        backward = counter.peak - weights - gradients - forward
        live = counter.peak = counter.live
        sft.optimizer_step(model, [adamw], 0, args)
        optimizer = sum(num_bytes(state.values()) for state in adamw.state.values())
        step = counter.peak - live - optimizer
    peak = weights + gradients + optimizer + max(forward + backward, step)
    sizes = (weights, gradients, optimizer, forward, backward, step, peak)
    return [size / 2 ** 30 for size in sizes], counter.flop

def prepare(model, frozen, loss, args):
    """A run: model and frozen models, after prepare_training, optimizers and micro-step."""
    frozen = nn.ModuleList(frozen).requires_grad_(False)
    dtype, frozen_dtype = sft.weights_dtypes(args, torch.device("cuda"))
    for p in frozen.parameters():
        p.data = p.data.to(frozen_dtype)
    for p in model.parameters():                    # "auto" until sharded, then float32
        p.data = p.data.to(torch.float32 if dtype == "auto" else dtype)
    for module in model.modules():
        module.to = lambda device: None             # it is there, and fake weights cannot move
        module.float = lambda: None
    sft.prepare_training(model, args, torch.device("cpu"))
    optimizers = sft.make_optimizers(model)
    optimizers[0].param_groups[0]["foreach"] = True             # the default on a GPU
    return model, frozen, optimizers, sft.autocast(args, torch.device("cpu"))(loss)

def run_judge(args, depth=9, width=4096, vision_width=1152, vocab=151936, side=1024, num_text=1200,
              num_response=1000):
    """A Qwen3-VL of 4 * depth layers and 3 * depth vision layers, and a batch as of encode: rows
    with two images of `side` pixels, `num_text` tokens and a response, for DPO two."""
    text = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4 * depth,
            "num_attention_heads": width // 128, "num_key_value_heads": width // 512,
            "head_dim": 128, "vocab_size": vocab}
    vision = {"hidden_size": vision_width, "out_hidden_size": width, "depth": 3 * depth,
              "deepstack_visual_indexes": [0, 1, 2]}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=1,
                                        vision_start_token_id=2, vision_end_token_id=3)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    num_rows = 2 if "beta" in args else 1
    grid = side // 16
    prompt = [2, *[1] * (grid // 2) ** 2, 3] * 2 + [0] * num_text
    ids = torch.tensor([prompt + [0] * num_response] * num_rows)
    labels = torch.tensor([[-100] * len(prompt) + [0] * num_response] * num_rows)
    batch = {
        "input_ids": ids, "mm_token_type_ids": (ids == 1).long(), "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * 2 * num_rows),
        "pixel_values": torch.randn(2 * num_rows * grid ** 2, 3 * 2 * 16 ** 2)}

    def loss():
        if num_rows == 1:
            return sft.call_sharded(model, sft.response_loss, batch)
        with torch.no_grad(), sft.disable_lora():
            reference_logps = sft.call_sharded(model, dpo.response_logps, batch)
        logps = sft.call_sharded(model, dpo.response_logps, batch)
        return dpo.dpo_loss(logps, reference_logps, args.beta)[0].sum()
    return prepare(model, [], loss, args)

def run_generator(args):
    """FLUX.1-dev or Wan2.1-14B, and a step of the replay of a rollout."""
    call = args.pipe_args
    is_flux = "FLUX" in args.model
    if is_flux:
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        shape = ((call["height"] // 16) * (call["width"] // 16), 64)
    else:
        model = diffusers.WanTransformer3DModel()
        shape = (16, call["num_frames"] // 4 + 1, call["height"] // 8, call["width"] // 8)
    encoder = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=32128 if is_flux else 256384, d_model=4096, d_ff=10240, num_layers=24,
        num_heads=64, feed_forward_proj="gated-gelu"))          # the weights of UMT5, too
    x, x_next, old_mean = torch.randn(3, args.batch_size, *shape)
    sigmas = torch.linspace(1, 0, call["num_inference_steps"] + 1)

    def mean_at():
        text = torch.randn(len(x), 512, 4096)
        t = torch.full((len(x),), 0.5)
        if is_flux:                     # guidance is an input
            v = model(x, text, torch.randn(len(x), 768), t, guidance=t,
                      img_ids=torch.zeros(shape[0], 3), txt_ids=torch.zeros(512, 3)).sample
        else:                           # with the prompt and with the negative prompt
            v, negative = [model(x.bfloat16(), t, text.bfloat16()).sample for _ in range(2)]
            v = negative + call["guidance_scale"] * (v - negative)
        return grpo.sde_step(sigmas, 1, x, v, args.eta)

    def loss():
        with torch.no_grad(), sft.disable_lora():
            ref_mean = mean_at()[0] if args.kl else old_mean
        mean, std = mean_at()
        ratio = grpo.policy_ratio(x_next, mean, old_mean, std)
        losses, _ = grpo.grpo_loss(ratio, torch.randn(len(x)), args.clip_range)
        return (losses + args.kl * grpo.gaussian_kl(mean, ref_mean, std)).sum()
    return prepare(nn.ModuleDict({"transformer": model}), [encoder], loss, args)

def check(options):
    """Print what a small judge takes, counted and measured: within 10 % of each other."""
    args = sft.parse_args(["--no-bf16", *options])
    run_small = functools.partial(run_judge, depth=1, width=1024, vision_width=384, vocab=32768,
                                  side=384, num_text=200, num_response=400)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model, _, optimizers, micro_step = run_small(args)
    micro_step().backward()
    sft.optimizer_step(model, optimizers, 0, args)
    for _ in range(2):
        micro_step().backward()
    measured = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20
    counted = count(run_small, args)[0][-1]
    print(f"counted {counted:.2f} GiB, measured {measured:.2f}")
    assert 0.9 < counted / measured < 1.1

def main():
    if sys.argv[1:2] == ["--check"]:
        return check(sys.argv[2:])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    text = (ROOT / "README.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^torchrun --nproc_per_node=8 (\w+)\.py (--model .*)$", text, re.M)
    rows = ["| GiB | weights | gradients | optimizer | forward | backward | step | peak | TFLOP | "
            "seconds |", "|---" * 10 + "|"]
    for stage, options in commands:
        args = sys.modules[stage].parse_args([*shlex.split(options), "--bf16"])
        sizes, flop = count(run_generator if stage == "grpo" else run_judge, args)
        cells = [f"`{stage}.py` {args.model}", *[f"{size:.1f}" for size in sizes],
                 f"{flop / 1e12:,.0f}", f"{flop / (0.4 * 989e12):.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    print(*rows, "Counted, not measured. At 40 % of an H100's 989 TFLOP/s.", sep="\n")

if __name__ == "__main__":
    main()
