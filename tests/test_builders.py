"""What data.py distill and dpo.py's sampling keep and drop and why, kill -9 at any moment of distill, and their errors."""
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
from reward import Failure, parse_verdict
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


def journal_of(out):
    """The one journal of a distill into this file, whatever its options."""
    journal, = Path(out).parent.glob(f"{Path(out).name}.*.progress")
    return journal


def counts(printed):
    """{case: number} of distill's closing table."""
    return {line[2:36].strip(): int(line[36:44]) for line in printed.splitlines() if line.startswith("  ")}


def use_judges(monkeypatch, **judges):
    """load_judge(name) gives judges[name], called with (question, temperature) for each question."""
    def load(name, **options):
        return lambda questions, temperature=0.0: [judges[name](question, temperature) for question in questions]
    monkeypatch.setattr(data, "load_judge", load)
    monkeypatch.setattr(dpo, "load_judge", load)
    monkeypatch.setattr(dpo, "swap_at_random", lambda record, rng: record)      # texts name a place


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
    pairs = write_pairs(folder, *["Image 1"] * num)
    args = data.parse_args(["distill", pairs, "--model", "http://a:1#m",
                            "--out", str(folder / name)])
    return args, asked


def test_a_run_cut_at_any_byte_ends_as_the_whole_one(tmp_path, monkeypatch, capsys):
    """Every state that a kill can leave: the journal cut anywhere, no file or a torn one aside or, at the end, the whole one."""
    args, asked = chunks(tmp_path, monkeypatch, "whole.jsonl")
    data.distill(args, None)
    assert counts(capsys.readouterr().out) == {"kept": 4, "dropped: contradicts": 3}
    whole = Path(args.out).read_bytes()
    journal = journal_of(args.out).read_bytes()
    assert [json.loads(line)["number"] for line in whole.splitlines()] == [1, 2, 4, 5]
    assert len(journal.splitlines()) == 4
    progress = tmp_path / journal_of(args.out).name.replace("whole", "cut")     # the same options
    args.out = str(tmp_path / "cut.jsonl")
    for cut in range(len(journal) + 1):
        Path(args.out).unlink(missing_ok=True)
        progress.write_bytes(journal[:cut])
        Path(args.out + ".tmp").write_bytes(whole[:cut % 40])
        asked.clear()
        data.distill(args, None)
        assert Path(args.out).read_bytes() == whole and progress.read_bytes() == journal
        done = journal[:cut].count(b"\n")
        assert asked == [f"0 {start}" for start in (0, 2, 4, 6)[done:]]          # what was done is not done again
        assert counts(capsys.readouterr().out) == {"kept": 4, "dropped: contradicts": 3}
    asked.clear()
    data.distill(args, None)                                                    # all is there
    assert Path(args.out).read_bytes() == whole and not asked


def test_what_cannot_be_continued_is_refused(tmp_path, monkeypatch):
    """Rows of another seed, of other pairs or of nobody knows what are never overwritten."""
    args, _ = chunks(tmp_path, monkeypatch)
    data.distill(args, None)
    message = "rows.jsonl is there, of other options: name another --out or remove it"
    args.seed = 1
    with pytest.raises(ValueError, match=message):
        data.distill(args, None)
    args.seed = 0
    write_pairs(tmp_path, *["Image 2"] * 7)
    with pytest.raises(ValueError, match=message):
        data.distill(args, None)
    write_pairs(tmp_path, *["Image 1"] * 7)
    data.distill(args, None)                                                    # the same again
    journal_of(args.out).unlink()
    with pytest.raises(ValueError, match=message):
        data.distill(args, None)
    assert len(rows(args.out)) == 4


def test_runs_of_other_options_do_not_mix(tmp_path, monkeypatch):
    """A journal that was begun under other options is left alone, and goes on under its own."""
    args, asked = chunks(tmp_path, monkeypatch)
    data.distill(args, None)
    whole = Path(args.out).read_bytes()
    begun = journal_of(args.out)
    begun.write_bytes(begun.read_bytes().splitlines(keepends=True)[0])          # killed after one
    Path(args.out).unlink()
    args.temperature = 0.9
    asked.clear()
    data.distill(args, None)
    assert asked == ["0 0", "0 2", "0 4", "0 6"] and begun.read_bytes().count(b"\n") == 1
    Path(args.out).unlink()
    args.temperature = 0.7
    asked.clear()
    data.distill(args, None)
    assert asked == ["0 2", "0 4", "0 6"] and Path(args.out).read_bytes() == whole


def test_a_source_that_changed_is_refused_and_a_server_that_moved_is_not(tmp_path, monkeypatch):
    use_judges(monkeypatch, **{"http://a:1#m": lambda q, t: trace(1), "http://b:2#m": lambda q, t: trace(1)})
    pairs, out = write_pairs(tmp_path, "Image 1", "Image 2"), str(tmp_path / "out.jsonl")
    data.main(["distill", pairs, "--model", "http://a:1#m", "--out", out])
    data.main(["distill", pairs, "--model", "http://b:2#m", "--out", out])
    write_pairs(tmp_path, "Image 2", "Image 2")
    with pytest.raises(SystemExit, match="out.jsonl is there, of other options"):
        data.main(["distill", pairs, "--model", "http://a:1#m", "--out", out])


def red_teacher(question, temperature):
    """Prefers the redder one, or at a later try a random one."""
    time.sleep(.001)
    return trace(1 + torch.randint(2, ()).item()) if temperature else trace(1 if red(question.media_1) > red(question.media_2) else 2)


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
        return sum(path.read_bytes().count(b"\n") for path in killed.parent.glob("*.progress"))

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
    with pytest.raises(SystemExit, match="none of 2 questions is answered: refused"):
        data.main(["distill", pairs, "--model", "teacher", "--out", out])
    assert len(journal_of(out).read_text().splitlines()) == 1 and not Path(out).exists()
    up[:] = [True] * 9
    data.main(["distill", pairs, "--model", "teacher", "--out", out])
    assert [row["prompt"] for row in rows(out)] == [f"prompt {i}" for i in range(4)]


def test_tries_that_fail_drop_their_pairs_only(tmp_path, monkeypatch, capsys):
    use_judges(monkeypatch, teacher=lambda q, t: Failure("too long") if t else "?")
    data.main(["distill", write_pairs(tmp_path, *["Image 1"] * 3), "--model", "teacher", "--out", str(tmp_path / "traces.jsonl")])
    assert counts(capsys.readouterr().out) == {"dropped: failure": 3}


def test_a_single_pair_in_the_last_chunk_may_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "CHUNK", 2)
    use_judges(monkeypatch, teacher=lambda q, t: Failure("too long") if q.prompt == "prompt 2" else
               trace(1 if red(q.media_1) else 2))
    pairs = write_pairs(tmp_path, *["Image 1"] * 3)
    data.main(["distill", pairs, "--model", "teacher", "--out", str(tmp_path / "traces.jsonl")])
    assert counts(capsys.readouterr().out) == {"right": 2, "dropped: failure": 1}


def test_traces_that_could_not_be_read_again_are_not_kept(tmp_path, monkeypatch, capsys):
    use_judges(monkeypatch, teacher=lambda q, t: trace(1 if red(q.media_1) else 2, reason=(
        "<|im_end|>" if q.prompt == "prompt 0" else "fine")))
    out = str(tmp_path / "traces.jsonl")
    data.main(["distill", write_pairs(tmp_path, "Image 1", "Image 1"), "--model", "teacher",
               "--out", out])
    assert counts(capsys.readouterr().out) == {"right": 1, "dropped: unparsed": 1}
    assert [row["prompt"] for row in data.read_records(out, "trace")] == ["prompt 1"]


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


def test_pairs_whose_better_image_always_comes_first_teach_no_position(tmp_path):
    """As in HPDv3's files. The function sees what is shown: a judge that says Image 1 is right for half of the pairs."""
    (tmp_path / "first.py").write_text(f"def judge(questions):\n    return [{CLEAN!r}, '?'] * (len(questions) // 2)\n")
    pairs = write_pairs(tmp_path, *["Image 1"] * 40)
    found = sample(tmp_path, pairs, "--sampler", f"{tmp_path}/first.py:judge", "--num-samples", "2")
    assert 10 < len(found) < 30 and {r["winner"] for r in found} == {"Image 1"}
    assert {Image.open(r["images"][0]).getpixel((0, 0)) for r in found} == {(255, 0, 0)}


def test_the_three_cases_and_the_heuristic(tmp_path, monkeypatch, capsys):
    use_judges(monkeypatch, policy=policy_of([[trace(2), CLEAN, "?"], [FAULTY, CLEAN, FAULTY], [CLEAN] * 3, [trace(2), "?", Failure("x")], [Failure("x")] * 3, [CLEAN, Failure("x"), FAULTY]]))
    found = sample(tmp_path, write_pairs(tmp_path, *["Image 1"] * 6, "Tie"), "--sampler", "policy", "--num-samples", "3")
    assert cases(capsys.readouterr().out) == {"mixed": 1, "all right": 2, "dropped: all right": 1, "dropped: all wrong": 1, "dropped: failure": 1,
                                               "dropped: a tie": 1}
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in found] == [                              # and nothing of the tie
        ("prompt 0", CLEAN, "?"), ("prompt 1", CLEAN, FAULTY), ("prompt 5", CLEAN, FAULTY)]
    assert len(data.read_records(tmp_path / "run/preferences.jsonl", "preference")) == 3


# ---------------------------------------------------------------- dpo.py: candidates

def test_verdicts_that_could_not_be_read_again_are_left_out(tmp_path, monkeypatch, capsys):
    """An empty one, or one with a control token, which a tokenizer may not call special."""
    use_judges(monkeypatch, policy=policy_of([
        [CLEAN, "", CLEAN], [CLEAN, "Image 2 <|end_of_box|>", CLEAN], [trace(2), CLEAN, " \n"],
        ["", " ", "<|im_end|>"]]))
    found = sample(tmp_path, write_pairs(tmp_path, *["Image 1"] * 4), "--sampler", "policy",
                   "--num-samples", "3")
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in found] == [
        ("prompt 2", CLEAN, trace(2))]
    assert cases(capsys.readouterr().out) == {
        "mixed": 1, "dropped: all right": 2, "dropped: failure": 1}


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
    """Pairs whose order is random, as the rng says."""
    pairs, verdicts = [(0, 1), (1, 2), (0, 2)], votes(1, 1, 1)
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    frames = [[image] for image in images]
    two_equal = [frames[0], frames[1], frames[0]]
    for candidates, said in ((frames, votes(1, 1, 2)), (two_equal, verdicts)):
        made = dpo.pair_of({}, candidates, pairs, said, None, random.Random(0))
        assert made == ("dropped: equal or undecided", None)
    for media, name, winner in (([[image] for image in images], "images", "Image"), ([[image] * 2 for image in images], "videos", "Video")):
        made = [dpo.pair_of({"prompt": "p"}, media, pairs, verdicts, None, random.Random(i))
                for i in range(20)]
        assert {case for case, _ in made} == {"kept"}
        made = [record for _, record in made]
        assert {record["winner"] for record in made} == {f"{winner} 1", f"{winner} 2"}
        best, worst = (images[0], images[2]) if name == "images" else (media[0], media[2])
        assert all(record == {"prompt": "p", name: [best, worst][::1 if record["winner"].endswith("1") else -1], "winner": record["winner"]} for record in made)


def test_who_never_answers_stops_the_sampling(tmp_path, monkeypatch):
    use_judges(monkeypatch, mute=lambda q, t: Failure("refused"))
    with pytest.raises(ValueError, match="none of 4 questions is answered: refused"):
        sample(tmp_path, write_pairs(tmp_path, "Image 1"), "--sampler", "mute")
    assert not (tmp_path / "run").exists()


def test_verdicts_that_prefer_nothing_stop_the_sampling(tmp_path, monkeypatch):
    use_judges(monkeypatch, same=lambda q, t: CLEAN)
    with pytest.raises(ValueError, match="of what was sampled nothing is preferred") as error:
        sample(tmp_path, write_pairs(tmp_path, "Image 1", "Image 2"), "--sampler", "same")
    assert cases(str(error.value)) == {"dropped: all right": 1, "dropped: all wrong": 1}


def test_dpo_stops_after_sampling_without_steps(judge_folder, tmp_path, capsys):
    """--max-steps 0 leaves preferences.jsonl; --sampler may be a function in a file."""
    pairs = write_pairs(tmp_path, "Image 1", "Image 2")
    (tmp_path / "mine.py").write_text(
        f"GOOD, BAD = {trace(1)!r}, {trace(2)!r}\n"
        "both = lambda questions: [(GOOD, BAD)[i % 2] for i in range(len(questions))]\n")
    out = tmp_path / "run"
    dpo.main(["--model", judge_folder, "--data", pairs, "--eval-data", pairs, "--out", str(out),
              "--sampler", f"{tmp_path}/mine.py:both", "--num-samples", "2", "--max-steps", "0"])
    kept = rows(out / "preferences.jsonl")
    winners = [int(row["winner"][-1]) for row in kept]          # of what was shown
    assert [(row["chosen"], row["rejected"]) for row in kept] == [(trace(w), trace(3 - w)) for w in winners]
    assert "2 preferences" in capsys.readouterr().out and not list(out.glob("step_*"))


@pytest.mark.parametrize("argv, message", [(["distill", "p", "--out", "o"], "distill needs --model"), (["distill", "p", "--model", "m"], "distill needs --out"),
                                           (["eval", "p"], "eval needs --model"), (["rank", "p", "--model", "m", "--out", "o"], "invalid choice: 'rank'")])
def test_missing_and_senseless_options_are_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        data.main(argv)
    assert message in capsys.readouterr().err


def test_a_missing_judge_and_wrong_data_are_named(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("f = lambda questions: ['x'] * len(questions)\n")
    sampler = ["--sampler", f"{tmp_path}/mine.py:f"]
    pairs = write_pairs(tmp_path, "Image 1")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no judge in out/none/model: train one"):
        sample(tmp_path, pairs, "--sampler", "out/none/model")
    with pytest.raises(ValueError, match="none.jsonl does not exist"):
        sample(tmp_path, "none.jsonl", *sampler)
    for record, missing in (({"prompt": "p", "image": "a.png"}, "winner"),
                            ({"question": "What is it?", "image": "a.png"}, "prompt")):
        (tmp_path / "wrong.jsonl").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=f"wrong.jsonl:1: '{missing}' is None"):
            sample(tmp_path, "wrong.jsonl", *sampler)
