"""What data.py distill and dpo.py's sampling keep and drop and why, kill -9 at any moment of distill, and their errors."""
import argparse
import ast
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
import dpo
import toy_teacher
import toy_world as W
from conftest import ROOT
from reward import Candidate, Failure, parse_verdict
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
    """{case: number} of distill's closing table."""
    return {line[2:36].strip(): int(line[36:44]) for line in printed.splitlines() if line.startswith("  ")}


def use_judges(monkeypatch, **judges):
    """load_judge(name) gives judges[name], called with (question, temperature) for each question."""
    def load(name, **options):
        return lambda questions, temperature=0.0: [judges[name](question, temperature) for question in questions]
    monkeypatch.setattr(data, "load_judge", load)
    monkeypatch.setattr(dpo, "load_judge", load)


def sample(folder, path, *options):
    """The rows of preferences.jsonl that dpo.py makes of what --data names, before it trains."""
    args = dpo.parse_args(["--data", str(path), "--out", str(folder / "run"), *options])
    dpo.load_or_sample(args, "preference", dpo.sample_preferences)
    return rows(folder / "run/preferences.jsonl")


def cases(printed):
    """{case: number} of what dpo.py prints, or of its error."""
    return ast.literal_eval(printed[printed.rindex("{"):printed.rindex("}") + 1])


def red(frames):
    return ImageStat.Stat(frames[0]).mean[0]


# ---------------------------------------------------------------- runs that are killed

def chunks(folder, monkeypatch, name="rows.jsonl", num=7):
    """The options of a distill whose chunks of 2 give rows of many lengths, some dropped, é among them; the seeds it was asked with."""
    asked = []
    made = [("kept", {"prompt": "é" * (7 * i % 5), "number": i}) if i % 3 else ("dropped: contradicts", None) for i in range(num)]

    def distill_pairs(teacher, pairs, args, seed):
        asked.append(seed)
        return [made[int(pair["prompt"].split()[1])] for pair in pairs]

    monkeypatch.setattr(data, "distill_pairs", distill_pairs)
    monkeypatch.setattr(data, "CHUNK", 2)
    args = argparse.Namespace(command="distill", file=write_pairs(folder, *["Image 1"] * num), seed=0, model="http://a:1#m", out=str(folder / name))
    return args, asked


def test_a_run_cut_at_any_byte_ends_as_the_whole_one(tmp_path, monkeypatch, capsys):
    """Every state that a kill can leave: the journal cut anywhere, no file or a torn one aside or, at the end, the whole one."""
    args, asked = chunks(tmp_path, monkeypatch, "whole.jsonl")
    data.distill(args, None)
    assert counts(capsys.readouterr().out) == {"kept": 4, "dropped: contradicts": 3}
    whole, journal = Path(args.out).read_bytes(), Path(args.out + ".progress").read_bytes()
    assert [json.loads(line)["number"] for line in whole.splitlines()] == [1, 2, 4, 5] and len(journal.splitlines()) == 5
    args.out = str(tmp_path / "cut.jsonl")
    for cut in range(len(journal) + 1):
        Path(args.out).unlink(missing_ok=True)
        Path(args.out + ".progress").write_bytes(journal[:cut])
        Path(args.out + ".tmp").write_bytes(whole[:cut % 40])
        asked.clear()
        data.distill(args, None)
        assert Path(args.out).read_bytes() == whole and Path(args.out + ".progress").read_bytes() == journal
        done = max(journal[:cut].count(b"\n") - 1, 0)
        assert asked == [f"0 {start}" for start in (0, 2, 4, 6)[done:]]          # what was done is not done again
        assert counts(capsys.readouterr().out) == {"kept": 4, "dropped: contradicts": 3}
    asked.clear()
    data.distill(args, None)                                                    # all is there
    assert Path(args.out).read_bytes() == whole and not asked


def test_what_cannot_be_continued_is_refused(tmp_path, monkeypatch):
    args, _ = chunks(tmp_path, monkeypatch)
    data.distill(args, None)
    args.seed = 1
    with pytest.raises(ValueError, match=r"rows.jsonl is there or was begun with other options: .*\"seed\": \"0\".*\. Give the same ones, name another --out"):
        data.distill(args, None)
    args.seed = 0
    write_pairs(tmp_path, *["Image 2"] * 7)
    with pytest.raises(ValueError, match=r"other options: .*\"digest\": \"\w{64}\""):
        data.distill(args, None)
    Path(args.out + ".progress").unlink()
    with pytest.raises(ValueError, match="rows.jsonl is there or .* or remove it and .*rows.jsonl.progress"):
        data.distill(args, None)
    assert len(rows(args.out)) == 4                                             # and not overwritten


def test_a_source_that_changed_is_refused_and_a_server_that_moved_is_not(tmp_path, monkeypatch):
    use_judges(monkeypatch, **{"http://a:1#m": lambda q, t: trace(1), "http://b:2#m": lambda q, t: trace(1)})
    pairs, out = write_pairs(tmp_path, "Image 1", "Image 2"), str(tmp_path / "out.jsonl")
    data.main(["distill", pairs, "--model", "http://a:1#m", "--out", out])
    data.main(["distill", pairs, "--model", "http://b:2#m", "--out", out])
    write_pairs(tmp_path, "Image 2", "Image 2")
    with pytest.raises(SystemExit, match="begun with other options: .*digest"):
        data.main(["distill", pairs, "--model", "http://a:1#m", "--out", out])


def red_teacher(question, temperature):
    """Prefers the redder one, or at a later try a random one."""
    time.sleep(.001)
    return trace(1 + torch.randint(2, ()).item()) if temperature else trace(1 if red(question.media_1) > red(question.media_2) else 2)


def long_judge(question, temperature):
    """The longer of two texts is better."""
    first, _, second = question.prompt.partition("\nAnswer 2: ")
    first, second = first.partition("Answer 1: ")[2], second.partition("\nAnswer with")[0]
    return json.dumps({"winner": "Tie" if len(first) == len(second) else "Answer 1" if len(first) > len(second) else "Answer 2"})


def kill_and_resume(argv, out, kills=4):
    """Run the command into out/whole and, killed so many times after some more chunks, into out/killed; the numbers of chunks then."""
    whole, killed, moments = out / "whole/rows.jsonl", out / "killed/rows.jsonl", []

    def start(path):
        if pid := os.fork():
            return pid
        try:
            sys.stdout = sys.stderr = open(out / "log.txt", "a")
            data.main([*argv, "--out", str(path)])
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


def main(folder):
    """Forked from one process, which has imported everything and computed nothing, so that a run takes no time to start."""
    torch.set_num_threads(1)                         # a pool of threads does not survive a fork
    pairs = write_pairs(Path(folder), *["Image 1", "Image 2"] * 30)
    data.load_judge = lambda name, **options: lambda questions, temperature: [red_teacher(question, temperature) for question in questions]
    data.CHUNK = 1
    print("killed after chunks", kill_and_resume(["distill", pairs, "--model", "red"], Path(folder)), flush=True)


def test_a_killed_distill_ends_in_the_same_bytes(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import test_builders; "
                           f"test_builders.main({str(tmp_path)!r})"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("killed after chunks") == 1, done.stdout + done.stderr[-3000:]


# ---------------------------------------------------------------- distill

def test_the_toy_teacher_sees_what_is_shown(tmp_path, capsys):
    """Traces fit the images in the order of the record; winners are people's; what a dazzled teacher says is dropped."""
    made, out = W.Records("train", "pair", 60), str(tmp_path / "traces.jsonl")
    data.write_jsonl(tmp_path / "pairs.jsonl", made)
    data.main(["distill", str(tmp_path / "pairs.jsonl"), "--model", f"{toy_teacher.__file__}:teacher", "--out", out, "--num-samples", "2"])
    cases, kept = counts(capsys.readouterr().out), data.read_records(out, "trace")
    assert sum(cases.values()) == 60 and cases["right"] == len(kept) > 40 and cases["dropped: contradicts"] > 0
    swaps = set()
    for record in kept:
        i = int(record["images"][0].name.split("_")[1])
        prompt, scenes, _, _ = made.scenes(i)
        verdict, swapped = parse_verdict(record["response"]), record["images"][0].name.endswith("_2.png")
        order = scenes[::-1] if swapped else scenes
        swaps.add(swapped)
        for path, scene in zip(record["images"], order):
            assert Image.open(path).tobytes() == W.render(prompt, scene).tobytes()
        for criterion in (criterion for category in verdict.categories for criterion in category.criteria):
            assert [criterion.reason_1, criterion.reason_2] == [W.facts(prompt, scene)[criterion.name][0] for scene in order]
        assert verdict.winner == data.WINNERS[record["winner"]] == W.judge_pair(prompt, *order)[1]
    assert swaps == {True, False}


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
    data.main(["distill", write_pairs(tmp_path, *["Image 1"] * 8), "--model", "teacher", "--out", out, "--num-samples", "3", "--temperature", ".9", "--seed", "2"])
    assert counts(capsys.readouterr().out) == {"right": 3, "dropped: contradicts": 1, "dropped: failure": 1, "dropped: unparsed": 3}
    kept = rows(out)
    assert [row["prompt"] for row in kept] == ["prompt 0", "prompt 1", "prompt 7"] and {row["winner"] for row in kept} == {"Image 1", "Image 2"}
    for row in kept:                                 # the JSON alone, and of the images as they lie
        winner = data.WINNERS[row["winner"]]
        assert row["response"] == trace(winner) and Path(row["images"][winner - 1]).read_bytes() == (tmp_path / "images/pairs_000000_1.png").read_bytes()
    assert [t for prompt, t in asked if prompt == "prompt 2"] == [0, .9, .9] and [t for prompt, t in asked if prompt == "prompt 0"] == [0]


def test_a_teacher_that_never_answers_stops_the_run_and_a_later_one_goes_on(tmp_path, monkeypatch):
    pairs, out, up = write_pairs(tmp_path, *["Image 1"] * 4), str(tmp_path / "traces.jsonl"), [True, True]
    monkeypatch.setattr(data, "CHUNK", 2)
    use_judges(monkeypatch, teacher=lambda q, t: trace(1 if red(q.media_1) else 2) if up and up.pop() else Failure("refused"))
    with pytest.raises(SystemExit, match="none of 2 questions is answered: refused. Mend that, then give the same command again"):
        data.main(["distill", pairs, "--model", "teacher", "--out", out])
    assert len(Path(out + ".progress").read_text().splitlines()) == 2 and not Path(out).exists()
    up[:] = [True] * 9
    data.main(["distill", pairs, "--model", "teacher", "--out", out])
    assert [row["prompt"] for row in rows(out)] == [f"prompt {i}" for i in range(4)]


def test_tries_that_fail_drop_their_pairs_only(tmp_path, monkeypatch, capsys):
    use_judges(monkeypatch, teacher=lambda q, t: Failure("too long") if t else "?")
    data.main(["distill", write_pairs(tmp_path, *["Image 1"] * 3), "--model", "teacher", "--out", str(tmp_path / "traces.jsonl")])
    assert counts(capsys.readouterr().out) == {"dropped: failure": 3}


def test_the_toy_teacher_refuses_other_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_teacher, "PAIRS", W.Records("train", "pair", 20))
    monkeypatch.setattr(data, "load_judge", lambda name, **options: lambda questions, temperature: toy_teacher.teacher(questions))
    with pytest.raises(SystemExit, match="is not in out/toy/pairs.jsonl as .*the toy teacher knows no other: pass another"):
        data.main(["distill", write_pairs(tmp_path, "Image 1"), "--model", "toy", "--out", str(tmp_path / "out.jsonl")])


def test_samples_from_a_server_have_seeds_of_their_own(tmp_path, monkeypatch):
    """Servers answer one seed with one text: K traces of a pair need K seeds, other tries other ones."""
    seen = []
    monkeypatch.setattr(data, "CHUNK", 3)

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
        found = sample(tmp_path, pairs, "--sampler", url, "--num-samples", "6")
        assert len({seed for seed, _, _ in seen}) == len(seen) == 30 and {s[1:] for s in seen} == {(.7, 3)}
        assert len(found) == 5                                                  # so each pair has a right and a wrong trace
        first = sorted(seen)
        seen.clear()
        assert sample(tmp_path, pairs, "--sampler", url, "--num-samples", "6") == found and sorted(seen) == first
        seen.clear()
        data.main(["distill", pairs, "--model", url, "--out", str(tmp_path / "traces.jsonl"), "--num-samples", "3"])
        assert [t for _, t, _ in seen[:3]] == [0] * 3 and len({seed for seed, t, _ in seen if t}) == len([t for _, t, _ in seen if t]) > 0
    finally:
        httpd.shutdown()
        httpd.server_close()


# ---------------------------------------------------------------- dpo.py: verdicts on pairs

CLEAN, FAULTY = trace(1), trace(1, categories=[{**c, "cat_winner": "?"} for c in answer()["categories"]])


def policy_of(texts):
    """Prompt "prompt i" gets texts[i], one after the other."""
    left = {f"prompt {i}": list(mine) for i, mine in enumerate(texts)}
    return lambda question, temperature: left[question.prompt].pop(0)


def test_the_three_cases_and_the_heuristic(tmp_path, monkeypatch, capsys):
    use_judges(monkeypatch, policy=policy_of([[trace(2), CLEAN, "?"], [FAULTY, CLEAN, FAULTY], [CLEAN] * 3, [trace(2), "?", Failure("x")], [Failure("x")] * 3, [CLEAN, Failure("x"), FAULTY]]))
    found = sample(tmp_path, write_pairs(tmp_path, *["Image 1"] * 6, "Tie"), "--sampler", "policy", "--num-samples", "3")
    assert cases(capsys.readouterr().out) == {"mixed": 1, "all right": 2, "dropped: all right": 1, "dropped: all wrong": 1, "dropped: failure": 1}
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in found] == [                              # and nothing of the tie
        ("prompt 0", CLEAN, "?"), ("prompt 1", CLEAN, FAULTY), ("prompt 5", CLEAN, FAULTY)]
    assert len(data.read_records(tmp_path / "run/preferences.jsonl", "preference")) == 3


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
    found = sample(tmp_path, write_pairs(tmp_path, *["Image 1"] * 3), "--sampler", "policy", "--judge", "judge", "--num-samples", "2")
    assert cases(capsys.readouterr().out) == {"mixed": 1, **({"all right": 1, "dropped: all right": 1} if kept else {"dropped: all right": 2})}
    assert [row["prompt"] for row in found] == ["prompt 0"] * bool(kept) + ["prompt 2"]
    if kept:
        assert kept in found[0]["chosen"] and {found[0]["chosen"], found[0]["rejected"]} == {*traces}
    assert len(asked) == 2 and all(isinstance(q, Candidate) and len(q.media) == 2 for q in asked)
    for question, order in zip(asked, (traces, traces[::-1])):                  # both whole traces, the prompt, braces as they are
        assert "prompt 0" in question.prompt and question.prompt.index(order[0]) < question.prompt.index(order[1])


# ---------------------------------------------------------------- dpo.py: answers to questions, candidates

def votes(*winners):
    return [parse_verdict(f"Image {w} is better than Image {3 - w}." if w else "It is a tie." if w == 0 else "?") for w in winners]


def test_best_and_worst_by_hand():
    pairs = [(0, 1), (3, 2)]
    pick = lambda *scores, winners=(1, 2): dpo.best_of_n(pairs, votes(*winners), list(scores), 4)
    assert pick(5, 1, 4, 2) == (0, 1)                                           # 0 and 2 won; 1 and 3 lost
    assert pick(3, 2, 4, 1) == (2, 3)
    assert pick(3, 1, None, 2) == (0, 1)
    assert pick(4, 4, 4, 4) is None
    assert pick(1, 3, 1, 2) is None
    assert pick(5, 1, 4, 2, winners=(0, None)) is None
    assert pick(None, 1, None, 2) is None
    pairs = [(0, 1), (1, 2), (0, 2)]                                            # win rates
    assert dpo.best_of_n(pairs, votes(1, 1, 1), None, 3) == (0, 2)
    assert dpo.best_of_n(pairs, votes(2, 2, 2), None, 3) == (2, 0)
    assert dpo.best_of_n(pairs, votes(1, 1, 2), None, 3) is None             # a circle
    assert dpo.best_of_n(pairs, votes(None, None, None), None, 3) is None
    assert dpo.best_of_n(pairs, votes(None, 1, None), None, 3) == (1, 2)                      # 0 never met anyone


def test_best_and_worst_become_records():
    """Of texts a preference, of frames a pair whose order is random, as the rng says."""
    pairs, verdicts = [(0, 1), (1, 2), (0, 2)], votes(1, 1, 1)
    assert dpo.pair_of({"instruction": "?"}, ["a", "b", "c"], pairs, verdicts) == ("kept", {"instruction": "?", "chosen": "a", "rejected": "c"})
    assert dpo.pair_of({}, ["a", "b", "a"], pairs, verdicts) == ("dropped: equal or undecided", None)
    assert dpo.pair_of({}, ["a", Failure("b"), "c"], pairs, verdicts) == ("dropped: failure", None)
    assert dpo.pair_of({}, ["a", "b", "c"], pairs, votes(1, 1, 2)) == ("dropped: equal or undecided", None)
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    for media, name, winner in (([[image] for image in images], "images", "Image"), ([[image] * 2 for image in images], "videos", "Video")):
        made = [dpo.pair_of({"prompt": "p"}, media, pairs, verdicts, None, random.Random(i))[1] for i in range(20)]
        assert {record["winner"] for record in made} == {f"{winner} 1", f"{winner} 2"}
        best, worst = (images[0], images[2]) if name == "images" else (media[0], media[2])
        assert all(record == {"prompt": "p", name: [best, worst][::1 if record["winner"].endswith("1") else -1], "winner": record["winner"]} for record in made)


def test_answers_of_a_vision_language_model_are_ranked(tmp_path, monkeypatch, capsys):
    """The longer answer is better; questions may be ours, ShareGPT's or TRL's. Every two are compared in both orders."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    lines = [{"question": "What is it? 0", "images": ["a.png"]}, {"conversations": [{"from": "human", "value": "<image>\nWhat is it? 1"}], "images": ["a.png"]},
             {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it? 2"}]}], "images": ["a.png"]},
             {"instruction": "What is it? 3", "images": ["a.png"]}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = {"0": ["red", "a {task} image", "r"], "1": ["same", "also", "both"], "2": ["red", Failure("x"), "re"], "3": ["x", "yy", "zzz"]}
    left, compared = {k: list(v) for k, v in texts.items()}, []

    def judge(question, temperature):
        compared.append(question.prompt)
        assert "right" in question.prompt and len(question.media) == 1 and temperature == 0
        return long_judge(question, temperature)

    use_judges(monkeypatch, vlm=lambda q, t: left[q.prompt[-1]].pop(0), judge=judge)
    sample(tmp_path, tmp_path / "q.jsonl", "--sampler", "vlm", "--judge", "judge", "--num-samples", "3")
    assert cases(capsys.readouterr().out) == {"kept": 2, "dropped: failure": 1, "dropped: equal or undecided": 1}
    assert len(compared) == len(set(compared)) == 4 * 6
    assert [(r["instruction"], r["chosen"], r["rejected"]) for r in data.read_records(tmp_path / "run/preferences.jsonl", "preference")] == [
        ("What is it? 0", "a {task} image", "r"), ("What is it? 3", "zzz", "x")]


def write_question(folder):
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    (folder / "q.jsonl").write_text(json.dumps({"question": "What is it?", "images": ["a.png"]}))
    return folder / "q.jsonl"


@pytest.mark.parametrize("says", ["Answer 1", "Answer 2", "?"])
def test_a_judge_that_goes_by_the_place_prefers_nothing(says, tmp_path, monkeypatch):
    answers = iter(["a", "b", "c"])
    use_judges(monkeypatch, vlm=lambda q, t: next(answers), judge=lambda q, t: json.dumps({"winner": says}))
    with pytest.raises(ValueError, match="of what was sampled nothing is preferred") as error:
        sample(tmp_path, write_question(tmp_path), "--sampler", "vlm", "--judge", "judge", "--num-samples", "3")
    assert cases(str(error.value)) == {"dropped: equal or undecided": 1}


def test_who_never_answers_stops_the_sampling(tmp_path, monkeypatch):
    use_judges(monkeypatch, mute=lambda q, t: Failure("refused"), policy=lambda q, t: trace(1, reason=str(random.random())))
    pairs = write_pairs(tmp_path, "Image 1")
    for options in (["--sampler", "mute"], ["--sampler", "policy", "--judge", "mute", "--num-samples", "2"]):
        with pytest.raises(ValueError, match="none of [24] questions is answered: refused"):
            sample(tmp_path, pairs, *options)
    with pytest.raises(ValueError, match="none of 6 questions is answered: refused"):
        sample(tmp_path, write_question(tmp_path), "--sampler", "policy", "--judge", "mute", "--num-samples", "3")
    assert not (tmp_path / "run").exists()


def test_dpo_stops_after_sampling_without_steps(judge_folder, tmp_path, monkeypatch, capsys):
    """--max-steps 0 leaves preferences.jsonl; --data may be pairs or questions, --sampler and --judge functions in a file."""
    pairs = write_pairs(tmp_path, "Image 1", "Image 2")
    (tmp_path / "mine.py").write_text(f"GOOD, BAD = {trace(1)!r}, {trace(2)!r}\n"
                                      "both = lambda questions: [(GOOD, BAD)[i % 2] for i in range(len(questions))]\n"
                                      "short = lambda questions: ['x' * (i % 2 + 1) for i in range(len(questions))]\n"
                                      "longer = lambda questions: ['{\"winner\": \"Answer %d\"}' % (1 + ('Answer 2: xx' in q.prompt)) for q in questions]\n")
    for path, options, kept in ((pairs, ["--sampler", f"{tmp_path}/mine.py:both"], [(trace(1), trace(2)), (trace(2), trace(1))]),
                                (write_question(tmp_path), ["--sampler", f"{tmp_path}/mine.py:short", "--judge", f"{tmp_path}/mine.py:longer"], [("xx", "x")])):
        out = tmp_path / f"run{len(kept)}"
        dpo.main(["--model", judge_folder, "--data", str(path), "--eval-data", pairs, "--out", str(out), *options, "--num-samples", "2", "--max-steps", "0"])
        assert [(row["chosen"], row["rejected"]) for row in rows(out / "preferences.jsonl")] == kept
        assert f"{len(kept)} preferences" in capsys.readouterr().out and not list(out.glob("step_*"))


@pytest.mark.parametrize("argv, message", [(["distill", "p", "--out", "o"], "distill needs --model"), (["distill", "p", "--model", "m"], "distill needs --out"),
                                           (["eval", "p"], "eval needs --model"), (["rank", "p", "--model", "m", "--out", "o"], "invalid choice: 'rank'")])
def test_missing_and_senseless_options_are_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        data.main(argv)
    assert message in capsys.readouterr().err


def test_a_missing_judge_and_wrong_data_are_named(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("f = lambda questions: ['x'] * len(questions)\n")
    sampler = ["--sampler", f"{tmp_path}/mine.py:f"]
    question = write_question(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no judge in out/judge-dpo/model: train one .* or pass --judge"):
        sample(tmp_path, question, *sampler)
    with pytest.raises(ValueError, match="none.jsonl does not exist"):
        sample(tmp_path, "none.jsonl", *sampler)
    (tmp_path / "images.jsonl").write_text(json.dumps({"prompt": "p", "image": "a.png"}))
    with pytest.raises(ValueError, match="images.jsonl:1: 'winner' is None"):
        sample(tmp_path, "images.jsonl", *sampler)
