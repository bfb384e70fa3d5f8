"""reward.py's judges behind a server, other rewards, media and commands. CPU; the only network is the loopback."""
import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import reward
import sft
from reward import (Candidate, Comparison, Failure, LocalJudge, ServerJudge, format_verdict, group_advantages, load_media, normalize,
                    parse_verdict, sample_pairs, win_rates)
from data import load_rewards, reward_values
from test_reward import GOOD, NAMES, OTHER, answer, category, rates_of, verdict

ROOT = Path(__file__).resolve().parent.parent


def picture(color="red", size=(16, 16)):
    return Image.new("RGB", size, color)


def question(text):
    return Comparison(text, [picture("red")], [picture("blue")])


# ------------------------------------------------------------------------------------------------ a server that misbehaves

@contextlib.contextmanager
def server(behave):
    """The URL and the list of requested prompts of a server whose POSTs go to behave(handler, text, number of requests so far)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, status, data, length=None, kind="application/json", headers=()):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

        def say(self, text):
            self.reply(200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def do_GET(self):
            self.reply(200, json.dumps({"data": [{"id": "toy"}]}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            parts = body["messages"][0]["content"]
            assert [part["type"] for part in parts[:-1]] == ["image_url"] * (len(parts) - 1) and body["temperature"] == 0 and body["seed"] == 0
            seen.append(parts[-1]["text"])
            behave(self, parts[-1]["text"], len(seen))

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", seen
    finally:
        httpd.shutdown()
        httpd.server_close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_servers_must_serve_one_model(monkeypatch):
    names = iter(["/a/judge", "/b/judge", "one", "one"])
    monkeypatch.setattr(ServerJudge, "request", lambda self, *args: next(names))
    with pytest.raises(ValueError, match=r"name their models \['/a/judge', '/b/judge'\]: append #MODEL"):
        reward.load_judge("http://a:1,http://b:1")
    assert reward.load_judge("http://a:1,http://b:1").body["model"] == "one"
    assert reward.load_judge("http://a:1,http://b:1#mine").body["model"] == "mine"                   # nobody is asked


@pytest.mark.parametrize("answers", ["[GOOD] * (len(questions) - 1)", "[GOOD] * (len(questions) + 1)", "(GOOD for _ in questions)"])
def test_a_function_must_answer_each_question(answers, tmp_path):
    (tmp_path / "judge.py").write_text(f"GOOD = {GOOD!r}\ndef judge(questions):\n    return {answers}\n")
    judge = reward.load_judge(f"{tmp_path}/judge.py:judge")
    if "for" in answers:                             # a generator is as good as a list
        assert reward.ask(judge, [question("a")] * 3) == [GOOD] * 3
        return
    with pytest.raises(ValueError, match=r"judge.py:judge gave [24] texts for 3 questions"):
        judge([question("a")] * 3)


def judge_of(*urls, **options):
    return ServerJudge(urls, **{"template": "{prompt}", "timeout": 1.0, "retries": 1, "model": "toy", **options})


def hang(handler, text, n):
    time.sleep(3)


def drip(handler, text, n):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(30):
            handler.wfile.write(b" ")
            time.sleep(.1)


def drip_headers(handler, text, n):
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(30):
            handler.wfile.write(f"X-{i}: 1\r\n".encode())
            time.sleep(.1)


def replies(status, body, length=None):
    return lambda handler, text, n: handler.reply(status, body, length)


MISCHIEF = [    # (what the server does, words of the failure, requests per question)
    (replies(500, b"out of memory"), "HTTP 500: out of memory", 2),
    (replies(429, b""), "HTTP 429", 2),
    (replies(400, b"too long"), "HTTP 400: too long", 1),
    (hang, "within 1 s (TimeoutError", 2),
    (drip, "within 1 s (TimeoutError", 2),
    (drip_headers, "within 1 s (TimeoutError", 2),
    (replies(200, b'{"choices": [{"mess'), "no whole answer with a text within 1 s (JSONDecode", 2),
    (replies(200, b"[" * 100_000), "RecursionError", 2),
    (replies(200, b'{"choices": [', 4000), "", 2),
    (replies(200, b'{"choices": []}'), "IndexError", 2),
    (replies(200, b'{"choices": [{"message": {"content": null}}]}'), "TypeError", 2),
    (replies(200, b"7"), "TypeError", 2),
    (replies(200, b"<html>sign in</html>"), "JSONDecodeError", 2),
    (lambda h, text, n: h.connection.close(), "", 2)]


@pytest.mark.parametrize("behave,words,tries", MISCHIEF)
def test_a_failure_is_marked_counted_and_no_answer(behave, words, tries):
    with server(behave) as (url, seen):
        start = time.perf_counter()
        texts = judge_of(url)([question("a"), question("b")])
        assert time.perf_counter() - start < 8 and len(seen) == 2 * tries
    assert all(isinstance(text, Failure) and words in text and url in text for text in texts), texts
    verdicts = [parse_verdict(text) for text in texts]
    rates = win_rates([(0, 1), (1, 0)], verdicts, 2)
    assert rates.counts["undecided"] == 2 and group_advantages(rates).tolist() == [0, 0]


def test_refused_connections_say_so_at_the_start_and_later():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match=f"no judge answers: {url}: .*refused.*vllm serve"):
        judge_of(url, model=None)
    text, = judge_of(url)([question("a")])
    assert isinstance(text, Failure) and "refused" in text and "after 2 tries" in text


def test_answers_keep_their_order_and_move_to_the_server_that_lives(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")                      # the loopback is not asked through it

    def behave(handler, text, n):
        time.sleep(random.random() * .05)
        if text in ("q3", "q5") and f"{text} again" not in handler.server.__dict__:
            handler.server.__dict__[f"{text} again"] = True
            handler.reply(503 if text == "q3" else 429, b"busy")
        else:
            handler.say(f"answer to {text}" if text != "q7" else "")
    with server(behave) as (url, seen):
        judge = judge_of(f"http://127.0.0.1:{free_port()}", url + "/v1/", model=None, batch_size=4, retries=3)
        assert judge.body["model"] == "toy"
        texts = judge([question(f"q{i}") for i in range(12)] + [Candidate("one", [picture()])])
        assert texts[:12] == [f"answer to q{i}" * (i != 7) for i in range(12)] and "Final Score" in seen[-1] + seen[-2] + seen[-3] + seen[-4]


def test_a_server_that_dies_in_the_middle_costs_only_what_it_had_not_answered():
    def behave(handler, text, n):
        if n > 4:
            handler.server.server_close()                                       # no further connection is taken
            handler.connection.close()
        else:
            handler.say(GOOD)
    with server(behave) as (url, seen):
        texts = judge_of(url, batch_size=1)([question(f"q{i}") for i in range(10)])
    assert texts[:4] == [GOOD] * 4 and all(isinstance(text, Failure) for text in texts[4:])
    pair = {"prompt": "p", "images": [picture("red"), picture("blue")], "winner": "Image 1"}
    result = data.evaluate_judge(lambda asked: texts, [pair] * 5)
    assert result["failures"] == 6 and result["parse_rate"] == .4


def test_ctrl_c_does_not_wait_for_a_server_that_hangs():
    script = ("from PIL import Image; from reward import Comparison, ServerJudge; import sys; image = Image.new('RGB', (8, 8)); print('asking', flush=True); "
              "ServerJudge([sys.argv[1]], model='toy', timeout=60)([Comparison('a', [image], [image])] * 50)")
    with server(lambda handler, text, n: time.sleep(20)) as (url, seen):
        process = subprocess.Popen([sys.executable, "-c", script, url], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))         # a shell's & has it ignored
        try:
            assert process.stdout.readline() == b"asking\n"
            while len(seen) < 32:                                               # all threads wait
                time.sleep(.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) != 0
        finally:
            process.kill()


def test_grpo_counts_a_flaky_judge_and_stops_at_a_dead_one(generator_folder, tmp_path, monkeypatch):
    import grpo
    from test_sft import rows
    monkeypatch.setattr(reward.time, "sleep", lambda seconds: None)             # the pauses between tries
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star above a green square\n")

    def run(url, out, *options):
        grpo.main(["--model", generator_folder, "--data", f"{tmp_path}/prompts.txt", "--eval-data", f"{tmp_path}/prompts.txt", "--watch", "none",
                   "--judge", url, "--eval-every", "0", "--group-size", "3", "--pairs", "all", "--num-prompts", "2", "--batch-size", "6", "--max-steps", "2",
                   "--warmup-steps", "1", "--kl", "0", "--lora-rank", "4", "--max-new-tokens", "8", "--out", f"{tmp_path}/{out}", *options])

    with server(lambda h, text, n: h.reply(400, b"no") if n % 3 == 0 else h.say(GOOD if n % 3 == 1 else OTHER)) as (url, seen):
        run(url, "flaky", "--max-parse-fail", ".5")
        log = rows(tmp_path / "flaky")
        assert [row["judge_failures"] for row in log] == pytest.approx([1 / 3] * 2, abs=.17) and log[0]["undecided"] == log[0]["judge_failures"]
        with pytest.raises(RuntimeError, match="(?s)more than --max-parse-fail.*HTTP 400: no"):
            run(url, "strict", "--max-parse-fail", ".1")
        (tmp_path / "mute.py").write_text("mute = lambda media, prompts: [float('nan')] * len(media)\n")
        with pytest.raises((SystemExit, RuntimeError), match="(?s)6 of 6 scores/.*mute are missing"):
            run(url, "mute", "--reward", f"{tmp_path}/mute.py:mute", "--max-parse-fail", ".5")
    with pytest.raises((SystemExit, ValueError), match="no judge answers: .*refused"):
        run(url, "dead")


def test_a_judge_stops_at_the_ends_of_its_generation_config_too(judge_folder):
    """Gemma ends a turn by another token than its tokenizer's eos."""
    judge = LocalJudge(judge_folder, max_new_tokens=12)
    asked = [Comparison("a red circle", [picture()], [picture("blue")])]
    tokenizer = judge.processor.tokenizer
    whole = tokenizer(judge(asked)[0])["input_ids"]
    assert len(whole) > 1
    for stops in (whole[0], [tokenizer.eos_token_id, whole[0]]):
        judge.model.generation_config.eos_token_id = stops
        assert tokenizer(judge(asked)[0])["input_ids"] == whole[:1]


def test_transformers_serve_answers_like_the_local_judge(judge_folder, tmp_path):
    """The toy judge behind the server that comes with transformers; hub access is switched off, as on cluster nodes."""
    port, log = free_port(), open(tmp_path / "log", "w")
    script = ("import sys; sys.path[:0] = [%r]; from reward import leave_out_video; from transformers.cli.transformers import main; leave_out_video(); "
              "sys.argv = ['transformers', 'serve', %r, '--host', '127.0.0.1', '--port', '%d', '--device', 'cpu', '--dtype', 'float32']; main()" % (str(ROOT), judge_folder, port))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        judge, end = None, time.time() + 120
        while judge is None:
            try:
                judge = reward.load_judge(f"http://127.0.0.1:{port}#{judge_folder}", max_new_tokens=12, template="{prompt}")
                urllib.request.urlopen(judge.urls[0] + "/health")
            except OSError:
                assert process.poll() is None and time.time() < end, (tmp_path / "log").read_text()[-3000:]
                judge = time.sleep(.5)
        asked = [Comparison(f"a {color} star", [picture(color, (48, 48))], [picture("blue", (48, 48))]) for color in ("red", "green")]
        local = LocalJudge(judge_folder, template="{prompt}", max_new_tokens=12)
        texts = judge(asked)
        assert [t.strip() for t in texts] == [t.strip() for t in local(asked)] and not any(isinstance(text, Failure) for text in texts), texts
    finally:
        process.terminate()
        process.wait(20)


# ------------------------------------------------------------------------------------------------ the arithmetic

def brute_force(num_items, pairs, winners, anchors, alpha):
    """Advantages by loops, straight from the definitions; anchors: [{anchor: winner}] per pair."""
    rate = {}
    for i in range(num_items):
        def share(votes):
            mine = [(.5 if w == 0 else float((w == 1) == (a == i))) for (a, b), w in zip(pairs, votes) if i in (a, b) and w is not None]
            return sum(mine) / len(mine) if mine else None
        each = {d: share([v.get(d) for v in anchors]) for d in "ABC"}
        known = {d: r for d, r in each.items() if r is not None}
        category = sum(known.values()) / len(known) if known else None
        rate[i] = category, share(winners)

    def z(values):
        known = [v for v in values if v is not None]
        if len(known) < 2 or max(known) - min(known) < 1e-9:
            return [0.0] * len(values)
        return [0.0 if v is None else (v - np.mean(known)) / np.std(known, ddof=1) for v in values]
    return [alpha * c + (1 - alpha) * o for c, o in zip(z([c for c, _ in rate.values()]), z([o for _, o in rate.values()]))]


@pytest.mark.parametrize("alpha", [.7, 0, 1])
def test_advantages_of_several_prompts_against_brute_force(alpha):
    rng = random.Random(1)
    for num_items in (4, 5):
        for pairs in (sample_pairs(num_items, "all", rng), [p[::d] for p in sample_pairs(num_items, "ring:2", rng) for d in (1, -1)]):
            winners = [rng.choice([1, 2, 1, 2, 0]) for _ in pairs]
            anchors = [{d: rng.choice([1, 2, 0]) for d in "ABC"} for _ in pairs]
            verdicts = [verdict(w, **a) for w, a in zip(winners, anchors)]
            ours = group_advantages(win_rates(pairs, verdicts, num_items), alpha)
            assert ours.tolist() == pytest.approx(brute_force(num_items, pairs, winners, anchors, alpha), abs=1e-4)
        assert len(pairs) == num_items * (num_items - 1) and sorted(pairs) == sorted(p[::-1] for p in pairs)


def test_items_with_one_side_only():
    nan = math.nan
    advantages = group_advantages(rates_of([1., .5, 0.], [1., 0., nan]), .7)    # the third has no category rate
    assert advantages.tolist() == pytest.approx([.7 * .5 ** .5 + .3, -.7 * .5 ** .5, -1])
    assert normalize(torch.tensor([.3, .1])).tolist() == pytest.approx([.5 ** .5, -.5 ** .5])
    assert normalize(torch.tensor([.25, .25])).tolist() == [0, 0]
    assert normalize(torch.tensor([.3, nan, .1]), std_floor=1.).tolist() == pytest.approx([.1, 0, -.1])


# ------------------------------------------------------------------------------------------------ other rewards, media

def test_rewards_by_name(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("def red(media, prompts):\n    return [frames[0].getpixel((0, 0))[0] / 255 for frames in media]\nbad = lambda m, p: [1.0]\n")
    flex, mine = load_rewards(f"flex:0.7, {path}:red:0.3", redder)
    assert load_rewards("none") == []
    assert (flex.weight, flex.name, flex.function) == (.7, "flex", None) and (mine.weight, mine.name) == (.3, f"{path}:red")
    assert {name: values.tolist() for name, values in reward_values(mine, [[picture("red")], [picture("blue")]], ["p"] * 2).items()} == {mine.name: [1, 0]}
    path.write_text(path.read_text() + "none = lambda m, p: None\nholes = lambda m, p: [None, 1.0]\n")
    for name in ("bad", "none", "holes"):
        with pytest.raises(ValueError, match="returned .* for 2 items"):
            reward_values(load_rewards(f"{path}:{name}")[0], [[picture()]] * 2, ["p"] * 2)
    for text, words in [("flex:nan", "'flex:nan': pass FILE.py:function"),
                        (f"{path}:nowhere", "has no function nowhere"),
                        ("clip:1", "'clip': pass FILE.py:function"), ("flex", "'flex': pass FILE.py:function"),
                        (f"{tmp_path}/other.py:f", "other.py:f': pass FILE")]:
        with pytest.raises(ValueError, match=words):
            load_rewards(text)
    said = {"a": "Final Score: 4", "b": "no idea"}
    scored, = load_rewards("score", judge=lambda questions: [said[q.prompt] for q in questions])
    (tmp_path / "once.py").write_text("import random\nweight = random.random()\ndef f(media, prompts):\n"
                                      "    media[0][0].thumbnail((1, 1))\n    return [weight] * len(media)\n")
    media = [[picture()]]
    first, second = [reward_values(load_rewards(f"{tmp_path}/once.py:f")[0], media, ["p"]) for _ in range(2)]
    assert first == second and media[0][0].size == picture().size       # a file runs once, and what it does to images is its own
    assert reward_values(scored, [[picture()]] * 2, ["a", "b"])["score"].tolist() == pytest.approx([4, math.nan], nan_ok=True)


def test_measures_of_a_watch_are_means_without_missing_values(tmp_path, monkeypatch):
    path = tmp_path / "watch.py"
    path.write_text("def two(media, prompts):\n    return {'long': [len(p) for p in prompts], 'odd': [float('nan'), 1.0, 0.0]}\n"
                    "def one(media, prompts):\n    return [2.0, float('nan'), 4.0]\n")
    (tmp_path / "prompts.txt").write_text("a\nbb\nccc\nbeyond\n")
    monkeypatch.setattr(sft, "sample_media", lambda pipe, records, seeds, batch_size, call: [[picture()] for _ in records])

    def measure(watch):
        args = argparse.Namespace(eval_data=f"{tmp_path}/prompts.txt", batch_size=2, bf16=False, out=str(tmp_path), watch=watch)
        media, numbers = sft.evaluate_samples(types.SimpleNamespace(device=torch.device("cpu")), args, {}, num=3)
        assert len(media) == 3 and (tmp_path / "samples.html").read_text().count("<figure") == 3
        return numbers

    assert measure(f"{path}:two,{path}:one") == {"long": 2, "odd": .5, f"{path}:one": 3} and measure("none") == {}
    with pytest.raises(ValueError, match="'nowhere.py:f': pass FILE.py:function"):
        measure("nowhere.py:f")
    path.write_text("def short(media, prompts):\n    return {'few': [1.0]}\n")
    with pytest.raises(ValueError, match=r"reward few returned \[1.0\] for"):
        measure(f"{path}:short")


def test_media_of_all_kinds(tmp_path):
    import av
    frames = [picture((10 * i, 0, 0), (32, 32)) for i in range(20)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "f").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "f" / f"{i:03d}.png")
    with av.open(str(tmp_path / "a.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_image(frame)))
        video.mux(stream.encode())
    for name in ("a.gif", "f", "a.mp4"):
        reds = [np.asarray(image)[..., 0].mean() for image in load_media(tmp_path / name, 5)]
        assert np.allclose(reds, [0, 40, 90, 140, 190], atol=8), (name, reds)   # 0, 4, 9, 14, 19
    assert len(load_media(tmp_path / "f", 1)) == 1 and len(load_media(frames[0])) == 1
    (tmp_path / "empty").mkdir(), (tmp_path / "x.mp4").write_text("no video"), (tmp_path / "x.png").write_text("no image")
    for name, words in [("empty", "no frames"), ("x.mp4", "not a readable image or video"), ("x.png", "not a readable image or video"), ("none.png", "none.png"), ("none.mp4", "none.mp4")]:
        with pytest.raises(ValueError, match=words):
            load_media(tmp_path / name)


def test_a_missing_av_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="pip install av"):
        load_media(tmp_path / "a.mp4")


# ------------------------------------------------------------------------------------------------ the commands

def redder(questions, **_):
    """A judge that prefers more red and gives its reasons."""
    winners = ["Image 1" if q.media_1[0].getpixel((0, 0)) > q.media_2[0].getpixel((0, 0)) else "Image 2" for q in questions]
    return [json.dumps(answer(w, categories=[category(name, w) for name in NAMES])) for w in winners]


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reward, "load_judge", lambda *args, **kwargs: redder)
    for name, red in zip("abcd", (10, 250, 90, 170)):
        picture((red, 0, 0)).save(f"{name}.png")

    reward.main(["a.png", "b.png", "--prompt", "<b>red</b> & round", "--html", "one.html"])
    page, said = Path("one.html").read_text(), capsys.readouterr().out
    assert "overall: 2 wins" in said and "advantage" not in said and "&lt;b&gt;red" in page and "<b>red" not in page
    assert page.count("data:image/png;base64,") == 2 and not re.search(r"(src|href)=\"(?!data:)", page)
    assert re.findall('<figure class="won"><figcaption>(.*?)<', page) == ["b.png"] and "overall: 2 wins" in page and "7 : 3  ███████░░░" in page

    evil = answer(categories=[{"name": "<script>A", "dims": [{"name": '<div class="bar">', "reason_1": "<script>1", "score_1": 3, "score_2": 7}], "cat_reason": "<script>"}],
                  reason="<script>")
    page = reward.report_html("<script>", [("<script>", [picture()], True)], format_verdict(parse_verdict(json.dumps(evil)), "<script>"))
    assert "<script" not in page and "&lt;div class=" in page

    reward.main(["a.png", "b.png", "c.png", "d.png", "--prompt", "red", "--html", "all.html"])
    head, *table, counts, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["item", "win", "rate", "A", "B", "C", "advantage"]
    assert re.fullmatch(r"6 verdicts, \d first_wins, \d second_wins, 0 ties, 0 undecided", counts)
    assert [row.split()[:2] for row in table] == [["b.png", "1.000"], ["d.png", "0.667"], ["c.png", "0.333"], ["a.png", "0.000"]] and float(table[0].split()[-1]) > 0
    page = Path("all.html").read_text()
    assert len(re.findall(r"1 is [a-d]\.png, 2 is [a-d]\.png", page)) == page.count("overall: ") == 6 and head in page
    for items, num in ((["a.png", "b.png"], 1), (["a.png", "b.png", "c.png"], 3)):
        with pytest.raises(SystemExit, match=f"none of {num} questions is answered: HTTP 401"):
            monkeypatch.setattr(reward, "load_judge", lambda *args, **kwargs: lambda questions, **_: [Failure("HTTP 401")] * len(questions))
            reward.main([*items, "--prompt", "red"])
    monkeypatch.setattr(reward, "load_judge", lambda *args, **kwargs: redder)
    reward.main(["a.png", "b.png", "c.png", "d.png", "--prompt", "red", "--pairs", "ring:1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "b.png" and lines[-1].startswith("4 verdicts, ")

    rows = [{"prompt": "p", "images": ["a.png", "b.png"], "winner": "Image 2"}, {"prompt": "p", "images": ["b.png", "a.png"], "winner": "Image 1"},
            {"prompt": "p", "images": ["c.png", "d.png"], "winner": "Image 1"}, {"prompt": "p", "images": ["c.png", "d.png"], "winner": "Tie"}]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(data, "load_judge", lambda *args, **kwargs: redder)
    data.main(["eval", "pairs.jsonl", "--model", "redder"])
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (found["winner_accuracy"], found["tau_accuracy"], found["swap_consistency"], found["failures"]) == ("0.667", "0.500", "1.000", "0.000")

    monkeypatch.setattr(reward, "load_judge", lambda *args, **kwargs: lambda questions: ["Style Score (1-5): 3\nFinal Score: 4", "hm"][:len(questions)])
    reward.main(["a.png", "b.png", "--prompt", "red", "--score"])
    assert capsys.readouterr().out.splitlines() == ["a.png: 4.0", "Style Score (1-5): 3", "Final Score: 4", "", "b.png: None", "hm", ""]


@pytest.mark.parametrize("argv,words", [
    (["a.png", "--prompt", "x"], "1 items; expected 'all', of 2 or more"), (["a.png", "a.png"], "required: --prompt"), (["--prompt", "x"], "required: ITEM"),
    (["--prompt", "", "a.png", "a.png"], "the text '' is empty"),
    (["a.png", "none.png", "--prompt", "x"], "none.png"), (["eval", "none.jsonl"], "none.jsonl"),
    (["eval", "bad.jsonl"], "bad.jsonl:2.*Image 3"), (["eval", "null.jsonl"], "null.jsonl:1.*'winner' is None"), (["eval", "blank.jsonl"], "blank.jsonl:1.*'prompt' is ' '"),
    (["a.png", "a.png", "--prompt", "x", "--judge", "http://127.0.0.1:9,"], "unknown url type"), (["eval", "empty.jsonl"], "no pair records"),
    (["a.png", "a.png", "a.png", "--prompt", "x", "--pairs", "ring:7"], "K from 1 to 1")])
def test_command_errors(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("judge = lambda questions: ['?'] * len(questions)\n")
    picture().save("a.png")
    row = {"prompt": "p", "images": ["a.png", "a.png"], "winner": "Image 1"}
    Path("bad.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "winner": "Image 3"})), Path("empty.jsonl").write_text("\n")
    Path("null.jsonl").write_text(json.dumps({**row, "winner": None})), Path("blank.jsonl").write_text(json.dumps({**row, "prompt": " "}))
    with pytest.raises(SystemExit) as stop:
        if argv[0] == "eval":
            data.main([*argv, "--model", "mine.py:judge"])
        else:
            reward.main(["--judge", "mine.py:judge", *argv])
    assert re.search(words, str(stop.value) + capsys.readouterr().err)


def test_reward_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "reward.py").write_bytes((ROOT / "reward.py").read_bytes())
    script = ("from reward import group_advantages, parse_verdict, sample_pairs, win_rates; v = parse_verdict('Image 1 is better than Image 2.'); p = sample_pairs(3); "
              "print(group_advantages(win_rates(p, [v] * 3, 3)).shape, 'sft' in __import__('sys').modules)")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.stdout.split() == ["torch.Size([3])", "False"], done.stderr
