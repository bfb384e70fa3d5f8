"""What the driver costs, whether judging hides behind rollouts, and which algorithm learns fastest, on the toy generator.

    python tests/bench_grpo.py overhead                               replay against bare calls of the transformer, by turns
    python tests/bench_grpo.py overlap                                a judge server of known latency beside the rollouts
    python tests/bench_grpo.py compare --seeds 0 1 2                  about 3 minutes a run on a core; runs that are there are kept
    python tests/bench_grpo.py compare --generator FOLDER --judge FOLDER      of other models than those in out/

`compare` writes a table and algorithms.png: true success of 192 held-out samples by the pixel oracle against processor seconds and judge calls.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data
import grpo
import sft
from plots import plot

ALGORITHMS = {"Flow-GRPO": ["--sde-steps", "9", "--no-ratio-norm"],
              "window": ["--no-ratio-norm"],
              "cps": ["--sde", "cps", "--sde-steps", "9", "--no-ratio-norm"],
              "window + RatioNorm": [],
              "nft": ["--loss", "nft", "--no-shared-noise", "--sde-steps", "1"]}
CPU_CLOCK = "import sys, time; time.time = time.process_time; import grpo; grpo.main(sys.argv[1:])"
VERDICT = json.dumps({"categories": [{"name": f"{a}. x", "dims": [], "cat_winner": "Image 1"} for a in "ABC"], "winner": "Image 1"})


def overhead(args, rounds=15, images=96):
    """Seconds of backward through the trained steps of a rollout, by replay and by bare calls of the transformer, and their ratio."""
    pipe = sft.load_pipeline(args.generator, torch.device("cpu"))
    call, settings = data.toy_models().PIPE_ARGS, grpo.parse_args(["--kl", "0", "--lora-rank", "0"])
    prompts = ["a red circle above a blue square"] * images
    _, trajectory = grpo.rollout(pipe, prompts, [(0, i) for i in range(images)], settings, **call)
    embeds, pooled, text_ids = pipe.encode_prompt(prompt=prompts, prompt_2=None, device=pipe.device, max_sequence_length=call["max_sequence_length"])
    image_ids = pipe._prepare_latent_image_ids(images, 3, 3, pipe.device, torch.float32)
    times = {"replay": [], "bare": []}
    for _ in range(rounds):
        began = time.perf_counter()
        grpo.replay(pipe, trajectory, trajectory["steps"], lambda i, v: v.square().mean().backward(), prompt=prompts, **call)
        middle = time.perf_counter()
        for i in trajectory["steps"]:
            v = pipe.transformer(trajectory["x"][i], timestep=trajectory["sigmas"][i].expand(images), pooled_projections=pooled, encoder_hidden_states=embeds,
                                 txt_ids=text_ids, img_ids=image_ids, return_dict=False)[0]
            v.square().mean().backward()
        times["replay"].append(middle - began)
        times["bare"].append(time.perf_counter() - middle)
    ratio = statistics.median(a / b for a, b in zip(*times.values()))
    print(f"forward and backward of {len(trajectory['steps'])} steps of {images} images, replayed against bare: {ratio:.3f} times (median of {rounds} rounds)")


def overlap(args, steps=6):
    """A step's seconds in rollouts, judging, training and waiting, with groups of 8 going one by one to a server that takes its time."""
    class Server(BaseHTTPRequestHandler):
        def answer(self, content):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.answer(b'{"data": [{"id": "toy"}]}')

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(self.server.latency)
            self.answer(json.dumps({"choices": [{"message": {"content": VERDICT}}]}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("latency   rollout     judge     train   waiting   the step / larger of rollout + train and judge   the three one after the other / the same")
    for latency in (.05, .2, .4):
        server.latency = latency
        with tempfile.TemporaryDirectory() as out:
            grpo.main(["--model", args.generator, "--judge", f"http://127.0.0.1:{server.server_port}", "--batch-size", "8", "--max-steps", str(steps), "--eval-num", "8",
                       "--eval-every", "0", "--out", out])
            rows = [row for row in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()) if "idle_s" in row][1:]
        longer = [max(row["rollout_s"] + row["train_s"], row["judge_s"]) for row in rows]
        step = statistics.median((row["rollout_s"] + row["train_s"] + row["idle_s"]) / x for row, x in zip(rows, longer))
        serial = statistics.median((row["rollout_s"] + row["train_s"] + row["judge_s"]) / x for row, x in zip(rows, longer))
        medians = [statistics.median(row[name] for row in rows) for name in ("rollout_s", "judge_s", "train_s", "idle_s")]
        print(f"{latency:5.2f} s" + "".join(f"{x:8.2f} s" for x in medians) + f"{step:10.2f}{serial:12.2f}   (medians of {len(rows)} steps of 12 groups)")


def compare(args):
    """Runs every algorithm with every seed on one thread, unless its log is whole, and reports. Its clock is the processor's time, so that a run is as
    long on a busy machine as on a free one."""
    curves = {}
    for name, options in ALGORITHMS.items():
        for seed in args.seeds:
            out = Path(args.out, f"{name.replace(' ', '')}-{seed}")
            log = out / "log.jsonl"
            if not log.exists() or "true_after" not in log.read_text():
                print(f"{name}, seed {seed}", flush=True)
                with open(Path(args.out, f"{out.name}.txt"), "w") as file:
                    subprocess.run([sys.executable, "-c", CPU_CLOCK, "--model", args.generator.format(seed=seed), "--judge", args.judge.format(seed=seed), "--seed",
                                    str(seed), "--kl", "0", "--max-steps", str(args.max_steps), "--warmup-steps", "4", "--eval-every", "4", "--eval-num", "512", "--out", str(out),
                                    *options], check=True, stdout=file,
                                   stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            points, seconds, calls = [], 0.0, 0                             # true_before is of other samples
            for row in rows[1:-1]:
                seconds += row["rollout_s"] + row["idle_s"] + row["train_s"]
                calls += row["verdicts"]
                if "held_out_true" in row:
                    points.append((seconds, calls, row["held_out_true"]))
            curves.setdefault(name, []).append((points, rows[-1]))
    plain = [points for points, _ in curves["Flow-GRPO"]]
    print(f"{'':20s} true on 512 before and after, by seed                  gain    cast     time and calls to plain Flow-GRPO's best, as shares of its own")
    for name, runs in curves.items():
        last = [row for _, row in runs]
        shares = {0: [], 1: []}
        for (points, _), theirs in zip(runs, plain):
            goal = max(theirs, key=lambda p: p[2])
            reached = next((p for p in points if p[2] >= goal[2]), None)
            for axis in (0, 1):
                shares[axis].append(reached[axis] / max(goal[axis], 1e-9) if reached else None)
        text = ["/".join("never" if x is None else f"{x:.2f}" for x in shares[axis]) for axis in (0, 1)]
        gains = [100 * (row["true_after"] - row["true_before"]) for row in last]
        print(f"{name:20s} " + "  ".join(f"{row['true_before']:.3f} {row['true_after']:.3f}" for row in last) + f"  {statistics.mean(gains):+5.1f}  "
              + "/".join(f"{row['cast_after']:.1f}" for row in last) + f"   {text[0]}   {text[1]}")
    plot({label: {name: [[(p[axis], p[2]) for p in points] for points, _ in runs] for name, runs in curves.items()}
          for axis, label in ((0, "processor seconds of training"), (1, "judge calls"))}, Path(args.out, "algorithms.png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["overhead", "overlap", "compare"])
    parser.add_argument("--generator", default="out/generator-sft/model", help="a toy generator; {seed} in it is replaced")
    parser.add_argument("--judge", default="out/judge-dpo/model", help="a toy judge; {seed} in it is replaced")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=16)
    parser.add_argument("--out", default="out/bench-grpo")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    sft.start_ranks()
    data.know_toy_classes(args.generator.format(seed=args.seeds[0]))
    {"overhead": overhead, "overlap": overlap, "compare": compare}[args.command](args)
