"""What the driver costs, whether judging hides behind rollouts, and what makes GRPO learn faster, on the toy generator.

    python tests/bench_grpo.py overhead                   a step's call of the pipeline against the transformer alone, by turns
    python tests/bench_grpo.py overlap                    a judge server of known latency beside the rollouts
    python tests/bench_grpo.py compare --seeds 0 1 2      about 3 minutes a run on a core; runs that are there are kept
    python tests/bench_grpo.py compare --generator FOLDER --judge FOLDER      of other models than those in out/

`compare` writes a table and algorithms.png: true success of 192 held-out samples by the pixel oracle against processor seconds and
judge calls. tests/results/ has the same for algorithms that grpo.py no longer holds (CPS, DiffusionNFT).
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
from plots import plot

ALGORITHMS = {"Flow-GRPO": ["--sde-steps", "9"], "first 3 steps": []}
CPU_CLOCK = "import sys, time; time.time = time.process_time; import grpo; grpo.main(sys.argv[1:])"
VERDICT = json.dumps({"categories": [{"name": f"{a}. x", "dims": [], "cat_winner": "Image 1"} for a in "ABC"], "winner": "Image 1"})


def overhead(options, rounds=15, images=96):
    """Prints the seconds of forward and backward at the trained steps of a rollout, by a call of the pipeline a step as grpo.py has
    it, over those of bare calls of the transformer."""
    pipe = data.load_pipeline(options.generator, torch.device("cpu"))
    args = grpo.parse_args(["--kl", "0", "--lora-rank", "0"])
    prompts = ["a red circle above a blue square"] * images
    call = pipe.call_args
    rollout = grpo.sample(pipe, [{"prompt": prompts[0]}], [(0, 0, 0, i) for i in range(images)], args, call)
    embeds, pooled, text_ids = pipe.encode_prompt(prompt=prompts, prompt_2=None, device=pipe.device,
                                                  max_sequence_length=call["max_sequence_length"])
    side = call["height"] // pipe.vae_scale_factor // 2
    image_ids = pipe._prepare_latent_image_ids(images, side, side, pipe.device, torch.float32)

    def bare(i):
        v = pipe.transformer(rollout.x[i], timestep=rollout.sigmas[i].expand(images), pooled_projections=pooled,
                             encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=image_ids, return_dict=False)[0]
        return grpo.sde_step(rollout.sigmas, i, rollout.x[i], v, args.eta)[0]

    def piped(i):
        return grpo.mean_at(pipe, rollout, i, args)[0]

    torch.testing.assert_close(bare(0), piped(0))
    for grad, what in ((True, "forward and backward"), (False, "forward alone")):
        ratios = []
        for _ in range(rounds):
            times = []
            for function in (piped, bare):
                started = time.perf_counter()
                for i in range(args.sde_steps):
                    with torch.set_grad_enabled(grad):
                        mean = function(i)
                        if grad:
                            mean.square().mean().backward()
                times.append(time.perf_counter() - started)
            ratios.append(times[0] / times[1])
        print(f"{what} of {args.sde_steps} steps of {images} images, a pipeline call a step against the transformer alone: "
              f"{statistics.median(ratios):.3f} times (median of {rounds} rounds; {1000 * times[1] / args.sde_steps:.0f} ms a bare step)")


class SlowJudge(BaseHTTPRequestHandler):
    """A server that answers every question with VERDICT after `server.latency` seconds."""

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


def overlap(options, steps=6):
    """Prints a step's seconds with groups of 8 going one by one to a server that takes its time. `train` holds the waiting for
    answers; what it takes without is the row of latency 0."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("latency   rollout     judge     train   the step / larger of rollout + train alone and judge   one after the other / the same")
    alone = 0.0
    for latency in (0.0, .05, .2, .4):
        server.latency = latency
        with tempfile.TemporaryDirectory() as out:
            prompts = Path(out, "held_out.txt")
            prompts.write_text("a red circle\na blue square\n")
            grpo.main(["--model", options.generator, "--judge", f"http://127.0.0.1:{server.server_port}", "--data", options.data,
                       "--eval-data", str(prompts), "--watch", "none", "--batch-size", "8", "--max-steps", str(steps),
                       "--eval-every", "0", "--out", f"{out}/run"])
            rows = [json.loads(line) for line in Path(out, "run/log.jsonl").read_text().splitlines() if line]
        rows = [row for row in rows if "judge_s" in row][1:]
        rollout, judge, step = (statistics.median(row[name] for row in rows) for name in ("rollout_s", "judge_s", "step_s"))
        train = step - rollout
        alone = alone or train
        longer = max(rollout + alone, judge)
        print(f"{latency:5.2f} s{rollout:8.2f} s{judge:8.2f} s{train:8.2f} s{(rollout + train) / longer:10.2f}"
              f"{(rollout + alone + judge) / longer:12.2f}   (medians of {len(rows)} steps of 12 groups)")


def compare(options):
    """Runs every algorithm with every seed on one thread, unless its log is whole, and reports. Its clock is the processor's time, so
    that a run is as long on a busy machine as on a free one."""
    curves = {}
    for name, extra in ALGORITHMS.items():
        for seed in options.seeds:
            out = Path(options.out, f"{name.replace(' ', '')}-{seed}")
            log = out / "log.jsonl"
            if not log.exists() or '"after"' not in log.read_text():
                print(f"{name}, seed {seed}", flush=True)
                words = ["--model", options.generator.format(seed=seed), "--judge", options.judge.format(seed=seed), "--seed", seed,
                         "--data", options.data, "--eval-data", options.eval_data, "--kl", 0, "--max-steps", options.max_steps,
                         "--warmup-steps", 4, "--eval-every", 4, "--out", out, *extra]
                with open(Path(options.out, f"{out.name}.txt"), "w") as file:
                    subprocess.run([sys.executable, "-c", CPU_CLOCK, *map(str, words)], check=True, stdout=file, stderr=file,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
            rows = [json.loads(line) for line in log.read_text().splitlines() if line]
            points, seconds, calls = [], 0.0, 0                             # true before is of other samples
            for row in rows:
                if "step" in row:
                    seconds += row["step_s"]
                    calls += row["verdicts"]
                if "held_out_true" in row:
                    points.append((seconds, calls, row["held_out_true"]))
            curves.setdefault(name, []).append((points, rows[-1]))
    report(curves)
    plot({label: {name: [[(p[axis], p[2]) for p in points] for points, _ in runs] for name, runs in curves.items()}
          for axis, label in ((0, "processor seconds of training"), (1, "judge calls"))}, Path(options.out, "algorithms.png"))


def report(curves):
    plain = [points for points, _ in curves["Flow-GRPO"]]
    print(f"{'':26s} true before and after, by seed      gain    cast     time and calls to plain Flow-GRPO's best, as shares of its own")
    for name, runs in curves.items():
        shares = {0: [], 1: []}
        for (points, _), theirs in zip(runs, plain):
            goal = max(theirs, key=lambda p: p[2])
            reached = next((p for p in points if p[2] >= goal[2]), None)
            for axis in (0, 1):
                shares[axis].append(reached[axis] / max(goal[axis], 1e-9) if reached else None)
        text = ["/".join("never" if x is None else f"{x:.2f}" for x in shares[axis]) for axis in (0, 1)]
        ends = [(row["before"], row["after"]) for _, row in runs]
        gain = statistics.mean(100 * (after["true"] - before["true"]) for before, after in ends)
        print(f"{name:26s} " + "  ".join(f"{before['true']:.3f} {after['true']:.3f}" for before, after in ends) + f"  {gain:+5.1f}  "
              + "/".join(f"{after['cast']:.1f}" for _, after in ends) + f"   {text[0]}   {text[1]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["overhead", "overlap", "compare"])
    parser.add_argument("--generator", default="out/generator-sft/model", help="a toy generator; {seed} in it is replaced")
    parser.add_argument("--judge", default="out/judge-dpo/model", help="a toy judge; {seed} in it is replaced")
    parser.add_argument("--data", default="out/toy/prompts.txt")
    parser.add_argument("--eval-data", default="out/toy/prompts_test.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=16)
    parser.add_argument("--out", default="out/bench-grpo")
    options = parser.parse_args()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    {"overhead": overhead, "overlap": overlap, "compare": compare}[options.command](options)
