"""Losses, seconds and memory of sft.py and dpo.py beside TRL and PEFT, on the same tiny judge with a vocabulary of 151,936.

    pip install trl peft && python tests/bench_train.py        about 15 minutes a round on 2 cores
    python tests/bench_train.py --growth                       ours alone: time and memory against tokens, pairs and ranks

Every run is a process of its own, ours and TRL's by turns; the same weights, adapter, records, learning rate and threads, float32.
Seconds are the median of the steps but the first two; memory is the most that a process held.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RANK, LR, BETA, STEPS = 8, 1e-5, .1, 5
TARGETS = r".*language_model\..*_proj$"


def make_inputs(folder, tokens, pairs):
    """A judge, an adapter for it, `pairs` records with responses of so many tokens, and a held-out pair."""
    import torch
    import data
    import sft
    import toy_models
    import toy_world
    model, processor = toy_models.make_judge(0, width=256, layers=2)
    model.resize_token_embeddings(151_936)
    model.config.text_config.max_position_embeddings = 8192
    model.generation_config.max_new_tokens = 1
    toy_models.save_judge(folder / "judge", model, processor)
    torch.manual_seed(RANK)
    sft.add_lora(model, RANK, TARGETS)
    sft.save_adapter(SimpleNamespace(out=folder, lora_rank=RANK), model, "base_model.model.", "adapter_model.safetensors")
    records, world = [], toy_world.Records("train", "pair", pairs)
    for i in range(pairs):
        texts = []
        for seed in range(2):
            ids = torch.randint(300, len(processor.tokenizer), (2 * tokens,), generator=torch.Generator().manual_seed(2 * i + seed)).tolist()
            text = processor.tokenizer.decode(ids, skip_special_tokens=True)
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
            texts.append(processor.tokenizer.decode(ids))
        records.append({"prompt": world[i]["prompt"], "images": world[i]["images"], "response": texts[0], "chosen": texts[0], "rejected": texts[1]})
    data.write_jsonl(folder / "records.jsonl", records)
    data.write_jsonl(folder / "pairs.jsonl", [world[0]])


def ours(stage, lora, folder, pairs, ranks=1):
    """(seconds of the steps but the first, GiB, losses) of our script; a row of its log is a step. The first step's checkpoint is in
    the second step's time, which is left out."""
    out = tempfile.mkdtemp(dir=folder)
    options = ["--model", folder / "judge", "--data", folder / "records.jsonl", "--eval-data", folder / "pairs.jsonl", "--no-bf16", "--lr", LR,
               "--warmup-steps", 1, "--max-steps", STEPS, "--batch-size", pairs, "--lora-rank", RANK if lora else 0, "--out", out]
    options += ["--targets", TARGETS] if lora else []
    options += ["--beta", BETA] if stage == "dpo" else ["--optim", "adamw"]
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run([*start, __file__, "--ours", json.dumps([stage, *map(str, options)])], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-9000:]
    rows = [row for row in map(json.loads, filter(str.strip, Path(out, "log.jsonl").read_text().splitlines())) if "lr" in row]
    times = [row["time"] for row in rows]
    return [after - before for before, after in zip(times[1:], times[2:])], rows[-1]["peak_gib"], [row["loss"] for row in rows]


def our_process(stage, *options):
    """The stage, its adapter drawn as in make_inputs."""
    import importlib
    import torch
    import sft
    stock = sft.add_lora

    def add_lora(*args):
        torch.manual_seed(RANK)
        stock(*args)
    sft.add_lora = add_lora
    importlib.import_module(stage).main(options)


def trl(stage, lora, folder, pairs):
    """The same of TRL's trainer, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--trl", stage, str(int(lora)), str(folder), str(pairs)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-9000:]
    return json.loads(done.stdout.splitlines()[-1])


def trl_process(stage, lora, folder, pairs):
    import datasets
    import peft
    import torch
    import trl as library
    from transformers import AutoModelForImageTextToText, TrainerCallback
    import data
    import sft
    from reward import build_messages, chat_text, load_processor
    torch.manual_seed(0)
    datasets.arrow_dataset.generate_fingerprint = lambda dataset: "bench"       # it cannot pickle what newer versions of pyarrow hold
    folder, processor, rows = Path(folder), load_processor(Path(folder, "judge")), []
    model = AutoModelForImageTextToText.from_pretrained(folder / "judge", dtype=torch.float32).train()
    model.set_attn_implementation("eager")
    template, eos = (folder / "judge" / "template.txt").read_text(), processor.tokenizer.eos_token
    for record in data.read_records(folder / "records.jsonl", "preference"):
        messages, images = build_messages(data.as_question(record), template)
        answers = {"completion": record["response"] + eos} if stage == "sft" else {k: record[k] + eos for k in ("chosen", "rejected")}
        rows.append({"images": images, "prompt": chat_text(processor, messages), **answers})
    options = dict(output_dir=str(folder / "trl"), per_device_train_batch_size=pairs, max_steps=STEPS, logging_steps=1, report_to="none", save_strategy="no",
                   bf16=False, gradient_checkpointing=False, max_grad_norm=1.0, max_length=None, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False)
    config = library.SFTConfig(**options) if stage == "sft" else library.DPOConfig(**options, beta=BETA)
    Trainer = library.SFTTrainer if stage == "sft" else library.DPOTrainer
    trainer = Trainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor,
                      **({"peft_config": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)} if lora else {}))
    if lora:
        from safetensors.torch import load_file
        peft.set_peft_model_state_dict(trainer.model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    optimizer, = sft.make_optimizers(trainer.model)
    optimizer.param_groups[0]["lr"] = LR
    schedule = SimpleNamespace(lr=1.0, warmup_steps=1, max_steps=STEPS)
    trainer.optimizer = optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: sft.learning_rate(step, schedule))
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(-time.time())

        def on_step_end(self, *args, **kwargs):
            times[-1] += time.time()
    trainer.add_callback(Clock())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(json.dumps([times[2:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, losses]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stages", nargs="+", default=["sft", "dpo"], choices=["sft", "dpo"])
    parser.add_argument("--modes", nargs="+", default=["LoRA", "full"], choices=["LoRA", "full"])
    parser.add_argument("--trl", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--ours", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        return trl_process(args.trl[0], args.trl[1] == "1", args.trl[2], int(args.trl[3]))
    if args.ours:
        return our_process(*args.ours)
    os.environ.update(OMP_NUM_THREADS="2", TOKENIZERS_PARALLELISM="false")
    if args.growth:
        print("dpo, LoRA        tokens  pairs  ranks   s/step    GiB a rank")
        for tokens, pairs, ranks in [(250, 1, 1), (500, 1, 1), (1000, 1, 1), (2000, 1, 1), (500, 2, 1), (500, 4, 1), (500, 1, 2)]:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["OMP_NUM_THREADS"] = "1"
                make_inputs(Path(folder), tokens, pairs * ranks)
                seconds, gib, _ = ours("dpo", True, Path(folder), pairs, ranks)
                print(f"{tokens:23d} {pairs:6d} {ranks:6d} {statistics.median(seconds):8.2f} {gib:10.2f}", flush=True)
        return
    print(f"{args.tokens} response tokens, 1 pair a step, {args.rounds} runs each, medians   s/step: ours, TRL, ratio    GiB: ours, TRL, ratio    largest relative difference of the losses")
    for stage in args.stages:
        for lora in (mode == "LoRA" for mode in args.modes if (stage, mode) != ("dpo", "full")):     # ours needs adapters
            with tempfile.TemporaryDirectory() as folder:
                make_inputs(Path(folder), args.tokens, 1)
                found = [(ours(stage, lora, Path(folder), 1), trl(stage, lora, Path(folder), 1)) for _ in range(args.rounds)]
            seconds = [statistics.median(s for run in side for s in run[0]) for side in zip(*found)]
            gib = [statistics.median(run[1] for run in side) for side in zip(*found)]
            apart = max(abs(a - b) / abs(b) for x, y in found for a, b in zip(x[2], y[2]))
            print(f"{stage} {'LoRA' if lora else 'full'}  {seconds[0]:.2f} {seconds[1]:.2f} {seconds[0] / seconds[1]:.2f}    "
                  f"{gib[0]:.2f} {gib[1]:.2f} {gib[0] / gib[1]:.2f}    {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
