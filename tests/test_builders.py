"""The builders of training data: what they keep and drop and why, kill -9 at any moment, and their errors."""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageStat

import conftest  # paths, where this file runs as a script
import data
import toy_world as W
from conftest import ROOT
from reward import Candidate, Comparison, Failure, parse_verdict
from test_reward import answer


@pytest.fixture(autouse=True)
def one_thread():
    """Two are slower for tiny models, by far where cores are shared."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num)


def trace(winner=1, **change):
    """A whole verdict that says so, as text."""
    return json.dumps(answer(f"Image {winner}", **change))


def write_pairs(folder, *winners):
    """pairs.jsonl of a red and a blue image each; the prompts tell them apart."""
    folder.mkdir(exist_ok=True)
    data.write_jsonl(folder / "pairs.jsonl", [{"prompt": f"prompt {i}", "images": [Image.new("RGB", (16, 16), c) for c in ("red", "blue")], "winner": winner}
                                              for i, winner in enumerate(winners)])
    return str(folder / "pairs.jsonl")


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def counts(printed):
    """{case: number} of the closing table."""
    return {line[2:36].strip(): int(line[36:44]) for line in printed.splitlines() if line.startswith("  ")}


def use_judges(monkeypatch, **judges):
    """open_judge(name) gives judges[name], called with (question, temperature) for each question."""
    def many(one):
        return lambda questions, temperature: [one(question, temperature) for question in questions]
    monkeypatch.setattr(data, "open_judge", lambda name, *args, **options: type("Judge", (), {"__call__": lambda self, *a, **k: many(judges[name])(*a, **k)})())


def red(frames):
    return ImageStat.Stat(frames[0]).mean[0]


# ---------------------------------------------------------------- runs that are killed

def chunks(rng_seed=0, num=7):
    """What append_rows needs for a build of its own: rows of many lengths, some dropped, é among them."""
    args = argparse.Namespace(command="distill", file="toy", chunk=2, resume=True, seed=rng_seed, out="", concurrency=1)
    made = [("kept", {"prompt": "é" * (7 * i % 5), "number": i}) if i % 3 else ("dropped: contradicts", None) for i in range(num)]
    return args, [None] * num, lambda numbers: ([made[i] for i in numbers], {"traces": len(numbers)})


def test_a_run_cut_at_any_byte_ends_as_the_whole_one(tmp_path):
    """Every state that a kill can leave: the counting file cut anywhere, rows cut anywhere behind what it counts."""
    args, records, build = chunks()
    args.out = str(tmp_path / "whole.jsonl")
    expected = data.append_rows(args, records, build)
    whole, log = Path(args.out).read_bytes(), Path(args.out + ".progress").read_bytes()
    assert expected == ({"kept": 4, "dropped: contradicts": 3}, {"traces": 7}) and len(log.splitlines()) == 5
    head = log.index(b"\n") + 1
    ends = [0] + [json.loads(line)["end"] for line in log.splitlines()[1:]] + [len(whole)]
    args.out = str(tmp_path / "cut.jsonl")
    for cut in [*range(0, head, 40), *range(head - 1, len(log) + 1, 4), len(log)]:
        done = max(log[:cut].count(b"\n") - 1, 0)
        for size in {ends[done], (ends[done] + ends[done + 1]) // 2, ends[done + 1]} if cut >= head else {None}:
            Path(args.out + ".progress").write_bytes(log[:cut])
            Path(args.out).unlink(missing_ok=True) if size is None else Path(args.out).write_bytes(whole[:size])
            assert data.append_rows(args, records, build) == expected
            assert Path(args.out).read_bytes() == whole and Path(args.out + ".progress").read_bytes() == log


def test_what_cannot_be_continued_is_refused(tmp_path):
    args, records, build = chunks()
    args.out = str(tmp_path / "rows.jsonl")
    data.append_rows(args, records, build)
    args.resume = False
    with pytest.raises(ValueError, match="rows.jsonl is there already. Go on with it by --resume, or remove it"):
        data.append_rows(args, records, build)
    args.resume, args.seed = True, 1
    with pytest.raises(ValueError, match="begun with other options: seed 0 -> 1. Give the same ones, or another --out"):
        data.append_rows(args, records, build)
    args.seed, args.file = 0, str(tmp_path / "source.txt")
    Path(args.file).write_text("a")
    with pytest.raises(ValueError, match="other options: file 'toy' -> '.*source.txt .{16}'"):
        data.append_rows(args, records, build)
    args.file = "toy"
    Path(args.out).write_text("x")
    with pytest.raises(ValueError, match=r"rows.jsonl has 1 bytes, but .*rows.jsonl.progress knows of \d+. Remove both"):
        data.append_rows(args, records, build)
    Path(args.out + ".progress").unlink()
    with pytest.raises(ValueError, match="is there already, without .*rows.jsonl.progress. Remove it or name another"):
        data.append_rows(args, records, build)


def test_a_source_that_changed_is_refused_and_a_server_that_moved_is_not(tmp_path, monkeypatch):
    use_judges(monkeypatch, **{"http://a:1#m": lambda q, t: trace(1), "http://b:2#m": lambda q, t: trace(1)})
    pairs, out = write_pairs(tmp_path, "Image 1", "Image 2"), str(tmp_path / "out.jsonl")
    data.main(["distill", pairs, "--teacher", "http://a:1#m", "--out", out])
    data.main(["distill", pairs, "--teacher", "http://b:2#m", "--out", out, "--resume"])
    write_pairs(tmp_path, "Image 2", "Image 2")
    with pytest.raises(SystemExit, match="begun with other options: file '.*pairs.jsonl .{16}' -> "):
        data.main(["distill", pairs, "--teacher", "http://a:1#m", "--out", out, "--resume"])


def coin_judge(question, temperature):
    """A policy that is right half of the time, at random, as torch's generator has it; slow enough to be killed."""
    time.sleep(.001)
    return trace(1 + torch.randint(2, ()).item(), reason=str(torch.randint(10 ** 6, ()).item()))


def red_judge(question, temperature):
    """Prefers and scores by redness."""
    if isinstance(question, Candidate):
        return f"Final Score: {red(question.media):.3f}"
    return trace(1 if red(question.media_1) > red(question.media_2) else 2)


def kill_and_resume(argv, out, kills=4):
    """Run the command into out/whole and, killed so many times after some more chunks, into out/killed; the numbers of chunks then."""
    whole, killed, moments = out / "whole/rows.jsonl", out / "killed/rows.jsonl", []

    def start(path):
        if pid := os.fork():
            return pid
        try:
            sys.stdout = sys.stderr = open(out / "log.txt", "a")
            data.main([*argv, "--out", str(path), "--resume"])
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)

    def num_chunks():
        progress = Path(f"{killed}.progress")
        return progress.read_bytes().count(b"\n") - 1 if progress.exists() else -1

    rng = random.Random(0)
    assert os.waitpid(start(whole), 0)[1] == 0, (out / "log.txt").read_text()
    while len(moments) < kills:
        before, pid = num_chunks() + rng.randrange(3), start(killed)
        while num_chunks() <= before and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(.0005)
        time.sleep(rng.random() * .02)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), f"it ended before kill {len(moments) + 1}"
        moments.append(num_chunks())
    assert os.waitpid(start(killed), 0)[1] == 0, (out / "log.txt").read_text()
    files = [sorted(p.relative_to(path.parent) for p in path.parent.rglob("*") if p.is_file()) for path in (whole, killed)]
    assert files[0] == files[1] and all((whole.parent / f).read_bytes() == (killed.parent / f).read_bytes() for f in files[0]), files
    assert len(rows(whole)) > 5 and moments[-1] < num_chunks()
    return moments


def main(folder, generator):
    """Forked from one process, which has imported everything and computed nothing, so that a run takes no time to start."""
    import functools
    import sft
    torch.set_num_threads(1)                         # a pool of threads does not survive a fork
    folder = Path(folder)
    pairs = write_pairs(folder, *["Image 1", "Image 2"] * 30)
    (folder / "prompts.txt").write_text("a red circle\n" * 24)
    data.open_judge = lambda name, *args, **options: lambda questions, temperature: [{"coin": coin_judge, "red": red_judge}[name](q, temperature) for q in questions]
    data.know_toy_classes(generator)
    sft.load_pipeline = functools.cache(sft.load_pipeline)
    sft.load_pipeline(generator, torch.device("cpu"), torch.float32)
    small = "height=48 width=48 max_sequence_length=12 num_inference_steps=2".split()
    for name, argv in {"distill": ["distill", "toy:train", "--num", "60", "--teacher", "toy", "--chunk", "1"],
                       "rank": ["rank", pairs, "--policy", "coin", "--chunk", "2"],
                       "sift": ["sift", str(folder / "prompts.txt"), "--model", generator, "--judge", "red", "--num-candidates", "4", "--chunk", "1",
                                "--pipe-arg", *small]}.items():
        (folder / name).mkdir()
        print(name, "killed after chunks", kill_and_resume(argv, folder / name), flush=True)


def test_killed_builders_end_in_the_same_bytes(generator_folder, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import test_builders; "
                           f"test_builders.main({str(tmp_path)!r}, {generator_folder!r})"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("killed after chunks") == 3, done.stdout + done.stderr[-3000:]


# ---------------------------------------------------------------- distill

def test_the_toy_teacher_sees_what_is_shown(tmp_path, capsys):
    """Traces fit the images in the order of the record; winners are people's; dazzled ones are tried again, or dropped."""
    pairs, out = str(tmp_path / "pairs.jsonl"), str(tmp_path / "traces.jsonl")
    data.main(["toy", pairs, "--num", "60"])
    data.main(["distill", pairs, "--teacher", "toy", "--out", out, "--tries", "3"])
    found, kept = counts(capsys.readouterr().out), data.read_records(out, "trace")
    assert sum(found.values()) == 60 and found["kept at try 1"] > 35 and found["kept at try 2"] > 0 and found["dropped: contradicts"] > 0
    assert len(kept) == sum(num for case, num in found.items() if case.startswith("kept"))
    assert {record["toy"]["swapped"] for record in kept} == {True, False}
    for record in kept:
        prompt, scenes, _, _ = W.Records("train", "pair", 60).scenes(record["toy"]["index"])
        said, order = parse_verdict(record["response"]), scenes[::-1] if record["toy"]["swapped"] else scenes
        for path, scene in zip(record["images"], order):
            assert Image.open(path).tobytes() == W.render(prompt, scene).tobytes()
        for dim in (dim for category in said.categories for dim in category.dims):
            assert [dim.reason_1, dim.reason_2] == [W.facts(prompt, scene)[dim.name][0] for scene in order]
        assert said.winner == data.WINNERS[record["winner"]] == W.judge_pair(prompt, *order)[1]


def test_distill_keeps_whole_traces_that_agree(tmp_path, monkeypatch, capsys):
    asked = []

    def teacher(question, temperature):
        asked.append((question.prompt, temperature))
        winner = 1 if red(question.media_1) else 2                              # the red image, which is the winner of every pair
        attempt = asked.count((question.prompt, temperature)) + (temperature > 0)
        return {"prompt 0": f"Here it is:\n```json\n{trace(winner)}\n```", "prompt 1": trace(3 - winner if attempt < 3 else winner),
                "prompt 2": trace(3 - winner), "prompt 3": Failure("HTTP 400"), "prompt 4": trace(winner, categories=answer()["categories"][:2]),
                "prompt 5": trace(winner)[:-1], "prompt 6": f"<think>{trace(winner)}", "prompt 7": f"<think>Image {3 - winner}? {{}}</think>{trace(winner)}",
                }[question.prompt]

    use_judges(monkeypatch, teacher=teacher)
    out = str(tmp_path / "traces.jsonl")
    data.main(["distill", write_pairs(tmp_path, *["Image 1"] * 8), "--teacher", "teacher", "--out", out, "--tries", "3", "--temperature", ".9", "--seed", "2"])
    assert counts(capsys.readouterr().out) == {"kept at try 1": 2, "kept at try 3": 1, "dropped: contradicts": 1, "dropped: failure": 1, "dropped: unparsed": 3}
    kept = rows(out)
    assert [row["prompt"] for row in kept] == ["prompt 0", "prompt 1", "prompt 7"] and {row["winner"] for row in kept} == {"Image 1", "Image 2"}
    for row in kept:                                 # the JSON alone, and of the images as they lie
        winner = data.WINNERS[row["winner"]]
        assert row["response"] == trace(winner) and Path(row["images"][winner - 1]).read_bytes() == (tmp_path / "images/pairs_000000_1.png").read_bytes()
    assert [t for prompt, t in asked if prompt == "prompt 2"] == [0, .9, .9] and [t for prompt, t in asked if prompt == "prompt 0"] == [0]


def test_a_teacher_that_never_answers_stops_the_run_and_a_later_one_goes_on(tmp_path, monkeypatch):
    pairs, out, up = write_pairs(tmp_path, *["Image 1"] * 4), str(tmp_path / "traces.jsonl"), [True, True]
    use_judges(monkeypatch, teacher=lambda q, t: trace(1 if red(q.media_1) else 2) if up and up.pop() else Failure("refused"))
    with pytest.raises(SystemExit, match="not one of 2 questions is answered: refused. Mend that, then go on with --resume"):
        data.main(["distill", pairs, "--teacher", "teacher", "--out", out, "--chunk", "2"])
    assert len(rows(out)) == 2
    up[:] = [True] * 9
    data.main(["distill", pairs, "--teacher", "teacher", "--out", out, "--chunk", "2", "--resume"])
    assert [row["prompt"] for row in rows(out)] == [f"prompt {i}" for i in range(4)]


def test_tries_that_fail_drop_their_pairs_only(tmp_path, monkeypatch, capsys):
    use_judges(monkeypatch, teacher=lambda q, t: Failure("too long") if t else "?")
    data.main(["distill", write_pairs(tmp_path, *["Image 1"] * 3), "--teacher", "teacher", "--out", str(tmp_path / "traces.jsonl")])
    assert counts(capsys.readouterr().out) == {"dropped: failure": 3}


def test_the_toy_teacher_refuses_other_pairs(tmp_path):
    with pytest.raises(SystemExit, match="pairs.jsonl:1: no 'toy' in it. The toy teacher knows the pairs of `data.py toy FILE --kind pair` alone"):
        data.main(["distill", write_pairs(tmp_path, "Image 1"), "--teacher", "toy", "--out", str(tmp_path / "out.jsonl")])


def test_samples_from_a_server_have_seeds_of_their_own(tmp_path):
    """Servers answer one seed with one text: K traces of a pair need K seeds, other tries other ones."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, value):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def do_GET(self):
            self.reply({"data": [{"id": "toy"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((body["seed"], body["temperature"], len(body["messages"][0]["content"])))
            self.reply({"choices": [{"message": {"content": trace(1 + body["seed"] % 2, reason=str(body["seed"]))}}]})

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url, pairs = f"http://127.0.0.1:{httpd.server_port}", write_pairs(tmp_path, *["Image 1"] * 5)
    try:
        data.main(["rank", pairs, "--policy", url, "--out", str(tmp_path / "rank.jsonl"), "--num-traces", "6", "--chunk", "3"])
        assert len({seed for seed, _, _ in seen}) == len(seen) == 30 and {s[1:] for s in seen} == {(.7, 3)}
        assert len(rows(tmp_path / "rank.jsonl")) == 5                          # so each pair has a right and a wrong trace
        first = sorted(seen)
        seen.clear()
        data.main(["rank", pairs, "--policy", url, "--out", str(tmp_path / "again.jsonl"), "--num-traces", "6", "--chunk", "3", "--concurrency", "1"])
        assert sorted(seen) == first and (tmp_path / "again.jsonl").read_text() == (tmp_path / "rank.jsonl").read_text()
        seen.clear()
        data.main(["distill", pairs, "--teacher", url, "--out", str(tmp_path / "traces.jsonl"), "--tries", "3"])
        assert [t for _, t, _ in seen[:5]] == [0] * 5 and len({seed for seed, t, _ in seen if t}) == len([t for _, t, _ in seen if t]) > 0
    finally:
        httpd.shutdown()
        httpd.server_close()


# ---------------------------------------------------------------- rank

CLEAN, FAULTY = trace(1), trace(1, categories=[{**c, "cat_winner": "?"} for c in answer()["categories"]])


def policy_of(texts):
    """Prompt "prompt i" gets texts[i], one after the other."""
    left = {f"prompt {i}": list(mine) for i, mine in enumerate(texts)}
    return lambda question, temperature: left[question.prompt].pop(0)


def test_the_three_cases_and_the_heuristic(tmp_path, monkeypatch, capsys):
    use_judges(monkeypatch, policy=policy_of([[trace(2), CLEAN, "?"], [FAULTY, CLEAN, FAULTY], [CLEAN] * 3, [trace(2), "?", Failure("x")], [Failure("x")] * 3, [CLEAN, Failure("x"), FAULTY]]))
    out = str(tmp_path / "prefer.jsonl")
    data.main(["rank", write_pairs(tmp_path, *["Image 1"] * 6, "Tie"), "--policy", "policy", "--num-traces", "3", "--out", out])
    printed = capsys.readouterr().out
    assert counts(printed) == {"mixed": 1, "all right": 2, "dropped: all right, alike": 1, "dropped: all wrong": 1, "dropped: failure": 1, "dropped: tie": 1,
                               "traces, and their accuracy": 13}
    assert "69.2%" in printed                        # 9 of 13 traces; failures are none
    assert [(r["prompt"], r["chosen"], r["rejected"], r["case"]) for r in rows(out)] == [
        ("prompt 0", CLEAN, "?", "mixed"), ("prompt 1", CLEAN, FAULTY, "all right"), ("prompt 5", CLEAN, FAULTY, "all right")]
    assert len(data.read_records(out, "preference")) == 3


@pytest.mark.parametrize("says, kept", [
    (lambda text: "Answer 1" if text.index("careful") < text.index("hasty") else "Answer 2", "careful"),
    (lambda text: "Answer 1" if text.index("hasty") < text.index("careful") else "Answer 2", "hasty"),
    (lambda text: "Answer 1", None),                 # the place decides
    (lambda text: "Tie", None)])
def test_a_judge_of_reasoning_is_asked_in_both_orders(says, kept, tmp_path, monkeypatch, capsys):
    asked = []

    def judge(question, temperature):
        asked.append(question)
        return json.dumps({"reason": "r", "winner": says(question.prompt)})

    traces = [trace(1, reason="hasty"), trace(1, reason="careful {task} {first}")]
    use_judges(monkeypatch, policy=policy_of([traces, [CLEAN] * 2, [trace(2), CLEAN]]), judge=judge)
    out = str(tmp_path / "prefer.jsonl")
    data.main(["rank", write_pairs(tmp_path, *["Image 1"] * 3), "--policy", "policy", "--judge", "judge", "--num-traces", "2", "--out", out])
    assert counts(capsys.readouterr().out) == {"mixed": 1, "dropped: all right, alike": 1, "traces, and their accuracy": 6,
                                               **({"all right": 1} if kept else {"dropped: all right, no agreement": 1})}
    assert [row["case"] for row in rows(out)] == ["all right"] * bool(kept) + ["mixed"]
    if kept:
        assert kept in rows(out)[0]["chosen"] and {rows(out)[0]["chosen"], rows(out)[0]["rejected"]} == {*traces}
    assert len(asked) == 2 and all(isinstance(q, Candidate) and len(q.media) == 2 for q in asked)
    for question, order in zip(asked, (traces, traces[::-1])):                  # both whole traces, the prompt, braces as they are
        assert "prompt 0" in question.prompt and question.prompt.index(order[0]) < question.prompt.index(order[1])


# ---------------------------------------------------------------- sift

def votes(*winners):
    return [parse_verdict(f"Image {w} is better than Image {3 - w}." if w else "It is a tie." if w == 0 else "?") for w in winners]


def test_best_and_worst_by_hand():
    pairs = [(0, 1), (3, 2)]
    pick = lambda *scores, winners=(1, 2): data.best_and_worst(pairs, votes(*winners), list(scores), 4)
    assert pick(5, 1, 4, 2) == (None, 0, 1)                                     # 0 and 2 won; 1 and 3 lost
    assert pick(3, 2, 4, 1) == (None, 2, 3)
    assert pick(3, 1, None, 2) == (None, 0, 1)
    assert pick(4, 4, 4, 4) == ("equal", None, None)
    assert pick(1, 3, 1, 2) == ("scores contradict", None, None)
    assert pick(5, 1, 4, 2, winners=(0, None)) == ("undecided", None, None)
    assert pick(None, 1, None, 2) == ("undecided", None, None)
    pairs = [(0, 1), (1, 2), (0, 2)]                                            # win rates
    assert data.best_and_worst(pairs, votes(1, 1, 1), None, 3) == (None, 0, 2)
    assert data.best_and_worst(pairs, votes(2, 2, 2), None, 3) == (None, 2, 0)
    assert data.best_and_worst(pairs, votes(1, 1, 2), None, 3) == ("equal", None, None)             # a circle
    assert data.best_and_worst(pairs, votes(None, None, None), None, 3) == ("undecided", None, None)
    assert data.best_and_worst(pairs, votes(None, 1, None), None, 3) == (None, 1, 2)                # 0 never met anyone


PIPE = "height=48 width=48 max_sequence_length=12 num_inference_steps=2".split()


def test_sift_finds_the_reddest(generator_folder, tmp_path, monkeypatch, capsys):
    """Candidate i of a prompt is a function of (seed, its number, i), whatever else is in the chunk."""
    import sft
    use_judges(monkeypatch, red=red_judge)
    (tmp_path / "p.txt").write_text("a red circle\n\na blue square\na blue square\n")
    pipe = sft.load_pipeline(generator_folder, torch.device("cpu"))
    made = [sorted((red(frames) for frames in sft.sample_media(pipe, [prompt] * 5, [(5, number, i) for i in range(5)], **dict(map(sft.pipe_arg, PIPE)))))
            for prompt, number in (("a red circle", 0), ("a blue square", 1), ("a blue square", 2))]
    for how, options in enumerate((["winrate"], ["winrate", "--pairs", "ring:2"], ["score"], ["score", "--chunk", "1"])):
        out = tmp_path / f"{how}/pairs.jsonl"
        data.main(["sift", str(tmp_path / "p.txt"), "--model", generator_folder, "--judge", "red", "--num-candidates", "5", "--seed", "5", "--out", str(out),
                   "--pipe-arg", *PIPE, "--rank-by", *options])
        assert counts(capsys.readouterr().out) == {"kept": 3}
        found = data.read_records(out, "pair")
        for record, reds in zip(found, made, strict=True):
            best, worst = [red(data.load_media(m)) for m in record["images"]][::1 if record["winner"] == "Image 1" else -1]
            assert min(abs(best - r) for r in reds) < .05 and min(abs(worst - r) for r in reds) < .05 and best > worst
            assert options != ["winrate"] or (abs(best - reds[-1]) < .05 and abs(worst - reds[0]) < .05)
        assert len({m.read_bytes() for record in found for m in record["images"]}) == 6             # the same prompt twice is two prompts
    assert (tmp_path / "2/pairs.jsonl").read_bytes() == (tmp_path / "3/pairs.jsonl").read_bytes()   # however they are grouped


def test_sifted_videos_are_lossless_folders_of_frames(tmp_path, monkeypatch):
    import sft
    frames = lambda seed: [Image.effect_noise((16, 16), 20 + 10 * i).convert("RGB").point(lambda v: (v + 60 * seed[2]) % 256) for i in range(12)]
    made = {}
    monkeypatch.setattr(sft, "load_pipeline", lambda *args: None)
    monkeypatch.setattr(sft, "sample_media", lambda pipe, prompts, seeds, *args, **options: [made.setdefault(seed, frames(seed)) for seed in seeds])
    use_judges(monkeypatch, red=red_judge)
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    data.main(["sift", str(tmp_path / "p.txt"), "--model", "m", "--judge", "red", "--num-candidates", "2", "--rank-by", "winrate", "--out", str(tmp_path / "pairs.jsonl")])
    found = data.read_records(tmp_path / "pairs.jsonl", "pair")
    assert len(found) == 3 and {r["winner"] for r in found} <= {"Video 1", "Video 2"}
    for number, record in enumerate(found):
        shown = [data.load_media(m, 12) for m in record["videos"]]
        assert sorted([[f.tobytes() for f in video] for video in shown]) == sorted([f.tobytes() for f in made[0, number, i]] for i in (0, 1))
        best, worst = shown[::1 if record["winner"] == "Video 1" else -1]
        assert red(best) > red(worst)


def test_sift_edits_the_source_of_each_prompt(tmp_path, monkeypatch):
    import sft
    monkeypatch.setattr(sft, "load_pipeline", lambda *args: None)
    monkeypatch.setattr(sft, "sample_media", lambda pipe, prompts, seeds, size, image: [[Image.new("RGB", (16, 16), (seed[2], source.getpixel((0, 0))[0], 0))]
                                                                                       for seed, source in zip(seeds, image, strict=True)])
    use_judges(monkeypatch, red=red_judge)
    for i in range(2):
        Image.new("RGB", (16, 16), (100 + i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": "p", "source": f"{i}.png"}) for i in range(2)))
    data.main(["sift", str(tmp_path / "p.jsonl"), "--model", "m", "--judge", "red", "--num-candidates", "2", "--rank-by", "winrate", "--out", str(tmp_path / "o.jsonl")])
    found = data.read_records(tmp_path / "o.jsonl", "pair")
    assert [record["source"] for record in found] == [tmp_path / f"{i}.png" for i in range(2)]
    assert [[Image.open(m).getpixel((0, 0))[1] for m in record["images"]] for record in found] == [[100] * 2, [101] * 2]


def test_sift_answers_of_a_vision_language_model(tmp_path, monkeypatch, capsys):
    """The longer answer is better; questions may be ours, ShareGPT's or TRL's."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    lines = [{"question": "What is it? 0", "images": ["a.png"]}, {"conversations": [{"from": "human", "value": "<image>\nWhat is it? 1"}], "images": ["a.png"]},
             {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it? 2"}]}], "images": ["a.png"]},
             {"instruction": "What is it? 3", "images": ["a.png"]}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = {"0": ["red", "a red image", "r"], "1": ["same", "also", "both"], "2": ["red", Failure("x"), "re"], "3": ["x", "yy", "zzz"]}

    def judge(question, temperature):
        first, _, second = question.prompt.partition("\n\nAnswer 2: ")
        assert "right" in question.prompt and len(question.media) == 1
        if not second:
            return f"Final Score: {len(question.prompt.partition('Answer: ')[2])}"
        first, second = first.partition("Answer 1: ")[2], second.partition("\n\nAnswer with")[0]
        return json.dumps({"winner": "Tie" if len(first) == len(second) else "Answer 1" if len(first) > len(second) else "Answer 2"})

    for how, best in (("winrate", 2), ("score", 1)):                            # by scores 0 and 1 meet, and 2 is left out
        use_judges(monkeypatch, vlm=lambda q, t: left[q.prompt[-1]].pop(0), judge=judge)
        left = {k: list(v) for k, v in texts.items()}
        out = tmp_path / f"{how}.jsonl"
        data.main(["sift", str(tmp_path / "q.jsonl"), "--model", "vlm", "--judge", "judge", "--num-candidates", "3", "--rank-by", how, "--out", str(out)])
        reason = {"winrate": "equal", "score": "undecided"}[how]
        assert counts(capsys.readouterr().out) == {"kept": 2, "dropped: failure": 1, f"dropped: {reason}": 1}
        found = data.read_records(out, "preference")
        assert [(r["instruction"], r["chosen"]) for r in found] == [("What is it? 0", "a red image"), ("What is it? 3", texts["3"][best])]
        assert [r["rejected"] for r in found] == [{"winrate": "r", "score": "red"}[how], "x"]


def test_an_answer_is_not_preferred_to_itself(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "What is it?", "images": ["a.png"]}))
    scores = iter((1, 5, 5, 1))                      # whoever won, one of two runs has it scored higher
    use_judges(monkeypatch, vlm=lambda q, t: "a dot", judge=lambda q, t: '{"winner": "Answer 1"}' if "Answer 2" in q.prompt else f"Final Score: {next(scores)}")
    for run in "ab":
        data.main(["sift", str(tmp_path / "q.jsonl"), "--model", "vlm", "--judge", "judge", "--num-candidates", "2", "--out", str(tmp_path / run)])
    assert sorted(line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line[0] == " ") == ["dropped: alike", "dropped: scores contradict"]


def test_sift_says_what_is_wrong_before_it_is_late(generator_folder, tmp_path, monkeypatch):
    use_judges(monkeypatch, judge=lambda q, t: trace(1))
    (tmp_path / "p.txt").write_text("a\n")
    argv = ["sift", str(tmp_path / "p.txt"), "--model", generator_folder, "--judge", "judge", "--out", str(tmp_path / "o.jsonl"), "--pipe-arg", *PIPE]
    with pytest.raises(SystemExit, match="no score in what the judge says, as .*With a judge that only compares: --rank-by winrate"):
        data.main([*argv, "--num-candidates", "2"])
    with pytest.raises(SystemExit, match="a comparison needs at least 2"):
        data.main([*argv, "--num-candidates", "1"])
    with pytest.raises(SystemExit, match="K goes from 1 to 2, or use 'all'"):
        data.main([*argv, "--num-candidates", "4", "--pairs", "ring:3"])


@pytest.mark.parametrize("argv, message", [(["distill", "p", "--out", "o"], "distill needs --teacher"), (["rank", "p"], "rank needs --out"),
                                           (["sift", "p", "--out", "o"], "sift needs --model"), (["rank", "p", "--out", "o", "--chunk", "0"], "--chunk is 0; expected at least 1"),
                                           (["distill", "p", "--out", "o", "--teacher", "t", "--tries", "-1"], "--tries is -1; expected at least 1")])
def test_missing_and_senseless_options_are_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        data.main(argv)
    assert message in capsys.readouterr().err


def test_a_missing_judge_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="data.py: no judge in out/judge-dpo/model or out/judge-sft/model"):
        data.main(["sift", "p.txt", "--model", "m", "--out", "o"])
