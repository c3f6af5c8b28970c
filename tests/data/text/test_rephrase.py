"""Rephrasing against a server on loopback: what it is asked, what passes, what is kept, and what stops it."""

import contextlib
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endpoint_server import between, rewrite, serve, slow, usual

from k2jax.cli.main import main
from k2jax.data.text import endpoint, faithfulness
from k2jax.data.text.rephrase import STYLES, Style, chunks_of, read_styles, rephrase
from k2jax.errors import RunFailed, UserError


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(endpoint.time, "sleep", pauses.append)
    return pauses


def text_of(number):
    facts = (f"In {1800 + number} the city of Name{number} had {1000 + 7 * number} people and the river was low."
             f" The mayor was called Person{number} and kept the {number + 11} bridges in order.")  # fmt: skip
    return " ".join(facts.replace("city", place) for place in ("city", "town", "port", "county"))


@pytest.fixture
def source(tmp_path):
    texts = [text_of(number) for number in range(12)]
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def run(tmp_path, url, **options):
    return rephrase([f"wiki={tmp_path}/wiki.jsonl"], str(tmp_path / "out"), url, "m", parallel=3, **options)


def variants(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out/variants.jsonl").read_text().splitlines()]


def test_variants_carry_their_source_and_rotate_styles(source, tmp_path):
    with serve() as (url, asked):
        report = run(tmp_path, url, key="secret", variants=2)
    found = variants(tmp_path)
    assert report["documents"] == 12 and report["variants"] == len(found) == 24 and report["rejected"] == {}
    assert [v["text"] for v in found] == [rewrite(text) for text in source for _ in range(2)]
    assert [v["origin"] for v in found] == [
        {"source": "wiki", "name": f"wiki.jsonl:{i}", "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for i, text in enumerate(source, 1) for _ in range(2)
    ]  # fmt: skip
    assert {v["model"] for v in found} == {"m"}
    names = [style.name for style in STYLES]
    chosen = [names.index(v["style"]) for v in found]
    steps = [(b - a) % 5 for a, b in zip(chosen[::2], chosen[1::2], strict=True)]
    assert steps == [1] * 12 and {v["style"] for v in found} == set(names)
    assert {(a["key"], a["path"], a["model"]) for a in asked} == {("Bearer secret", "/v1/chat/completions", "m")}
    assert len(asked) == 36 and report["requests"] == 36  # 24 rewrites, and 12 verdicts: both styles say the same here
    prompts = {style.prompt for style in STYLES}
    assert {p for p in prompts for a in asked if a["messages"][0]["content"].startswith(p)} == prompts


def test_a_second_run_asks_nothing_and_another_model_all(source, tmp_path):
    with serve() as (url, asked):
        run(tmp_path, url, variants=1)
        before, files = len(asked), (tmp_path / "out/variants.jsonl").read_bytes()
        report = run(tmp_path, url, variants=1)
        assert len(asked) == before == 24 and report["cached"] == 24 and report["requests"] == 0
        assert (tmp_path / "out/variants.jsonl").read_bytes() == files
        rephrase([f"wiki={tmp_path}/wiki.jsonl"], str(tmp_path / "out"), url, "other", variants=1)
        assert len(asked) == 48


def test_chunks_have_the_rewritten_ones_before_as_context(tmp_path):
    paragraphs = [f"Part {i} of the story tells that {100 + i} birds flew over the lake. " * 5 for i in range(4)]
    text = "\n\n".join(paragraphs)
    assert "".join(chunks_of(text, 400)) == text and len(chunks_of(text, 400)) == 4
    (tmp_path / "wiki.jsonl").write_text(json.dumps({"text": text}) + "\n")
    with serve() as (url, asked):
        run(tmp_path, url, variants=1, chunk_chars=400)
    contents = [a["messages"][1]["content"] for a in asked if between("text", a["messages"][1]["content"])]
    chunks = chunks_of(text, 400)
    assert [between("text", c) for c in contents] == chunks
    done = [rewrite(chunk) for chunk in chunks]
    expected = [None, done[0], f"{done[0]}\n\n{done[1]}", f"{done[1]}\n\n{done[2]}"]
    assert [between("before", c) for c in contents] == expected
    assert [v["text"] for v in variants(tmp_path)] == ["\n\n".join(done)]


def test_long_words_and_short_ends_are_cut_too():
    for text in ("x" * 1000, "a b " * 300, "One. Two! " * 70 + "\n\n\n", "語。" * 300):
        assert "".join(chunks_of(text, 200)) == text.rstrip("\n") or text.endswith("\n")
        assert max(map(len, chunks_of(text, 200))) <= 200


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (lambda text: "Yes.", "length: too short"),
        (lambda text: text * 3, "length: too long"),
        (lambda text: text, "a copy of the source"),
        (lambda text: rewrite(text).replace("18", "19"), "numbers: some are lost"),
        (lambda text: rewrite(text) + " From 1999 to 2004 and 55 or 66 or 77 more, 88 of them, 99 in all.",
         "numbers: some are new"),
        (lambda text: " ".join(f"z{word}" if word.isalpha() else word for word in text[::-1].split()),
         "numbers: some are lost"),
        (lambda text: rewrite(text) + " A dragon came.", "meaning: the endpoint finds it unfaithful"),
    ],
)  # fmt: skip
def test_what_is_not_faithful_is_left_out(source, tmp_path, wrong, reason):
    """Document 3 goes wrong, always; the others are not touched by it."""

    def reply(number, body):
        user = body["messages"][-1]["content"]
        return wrong(between("text", user)) if between("rewrite", user) is None and "Name3 " in user else usual(0, body)

    with serve(reply) as (url, asked):
        report = run(tmp_path, url, variants=2)
    assert report["rejected"] == {reason: {"count": 2, "examples": report["rejected"][reason]["examples"]}}
    assert all(name.startswith("wiki.jsonl:4 (") for name in report["rejected"][reason]["examples"])
    assert report["variants"] == 22
    assert sum("Name3 " in a["messages"][-1]["content"] and a["seed"] == 1 for a in asked) == 2  # one more attempt each


def test_words_must_be_the_sources_unless_it_is_a_translation():
    source, other = (
        "the quick brown fox jumps over a lazy dog " * 3,
        "der flinke Fuchs springt hoch und weit davon " * 3,
    )
    assert faithfulness.quick_check(source, other) == "words: too few of the source's"
    assert faithfulness.quick_check(source, other, same_language=False) is None
    assert (
        faithfulness.quick_check("It cost 1,200 and 3.5 of 12.000.", "The price: 1200 or 3.5 of 12000, it cost.")
        is None
    )


@pytest.mark.parametrize("answer", ["yes", '{"faithful": "no"}', "{", "[]", ""])
def test_no_verdict_is_not_faithful(answer):
    deep = '{"a":' * 100_000 + "}"
    assert faithfulness.verdict(answer) == faithfulness.verdict(deep) == "meaning: the endpoint gave no verdict"
    assert faithfulness.verdict('```json\n{"faithful": true}\n```') is None
    assert faithfulness.verdict('{"faithful": true, "tokens": %s}' % ("9" * 9000)) is None


def test_failures_that_may_pass_are_tried_again(source, tmp_path, no_pauses):
    failures = [
        (503, "busy", {}),
        (429, "slow down", {"Retry-After": "7"}),
        (200, "{", {}),
        (200, '{"choices": []}', {}),
    ]

    def reply(number, body):
        return failures[number - 1] if number <= len(failures) else usual(number, body)

    with serve(reply) as (url, asked):
        report = rephrase([f"{tmp_path}/wiki.jsonl"], str(tmp_path / "out"), url, "m", variants=1, parallel=1)
    assert report["variants"] == 12 and len(asked) == 28 and no_pauses == [0.5, 7.0, 2.0, 4.0]


def test_an_endpoint_that_never_answers_ends_the_run_and_the_next_goes_on(source, tmp_path, no_pauses):
    def dead(number, body):
        return usual(number, body) if number <= 4 else (500, "down", {})

    with serve(dead) as (url, asked), pytest.raises(RunFailed) as error:
        rephrase([f"{tmp_path}/wiki.jsonl"], str(tmp_path / "out"), url, "m", variants=1, parallel=1, retries=1)
    assert "8 documents in a row: no answer: " in str(error.value) and "500 Internal" in str(error.value)
    assert not (tmp_path / "out/variants.jsonl").exists()
    with serve() as (url, asked):
        report = rephrase([f"{tmp_path}/wiki.jsonl"], str(tmp_path / "out"), url, "m", variants=1)
    assert report["variants"] == 12 and report["cached"] == 4 and len(asked) == 20


@pytest.mark.parametrize("status", [301, 401, 404])
def test_a_refusal_stops_at_once_and_the_key_goes_nowhere_else(source, tmp_path, status):
    with serve() as (other, elsewhere):
        reply = (status, "not you", {"Location": f"{other}/chat/completions"})
        with serve(lambda number, body: reply) as (url, asked), pytest.raises(UserError) as error:
            run(tmp_path, url, key="secret")
    assert f"answers {status} " in str(error.value) and "not you" in str(error.value)
    assert "secret" not in str(error.value) and elsewhere == [] and len(asked) <= 6


def test_one_text_that_is_refused_does_not_stop_the_others(source, tmp_path):
    def reply(number, body):
        return (400, "too long", {}) if "Name5 " in body["messages"][-1]["content"] else usual(number, body)

    with serve(reply) as (url, _):
        report = run(tmp_path, url, variants=1)
    assert report["variants"] == 11 and report["rejected"]["no answer"]["count"] == 1


def test_a_slow_answer_is_given_up(source, tmp_path):
    with serve(slow(1.0)) as (url, asked), pytest.raises(endpoint.NoAnswer, match="2 requests.*timed out"):
        (tmp_path / "out").mkdir()
        asking = endpoint.Endpoint(url, "m", None, tmp_path / "out/answers.sqlite", timeout=0.1, retries=1)
        try:
            asking.ask([{"role": "user", "content": "<text>\nx\n</text>"}], 0.0)
        finally:
            asking.close()


def test_what_is_left_out_and_what_is_bad(source, tmp_path):
    extra = [
        {"text": "short"},
        {"text": source[0]},
        {"text": text_of(99), "origin": {"source": "a", "name": "b", "sha256": "0" * 64}},
        {"text": "\ud800" * 300},
    ]
    with open(tmp_path / "wiki.jsonl", "a") as file:
        file.writelines(json.dumps(value) + "\n" for value in extra)
    with serve() as (url, _):
        report = run(tmp_path, url, variants=1)
        assert {reason: entry["examples"] for reason, entry in report["left_out"].items()} == {
            "below 200 characters": ["wiki.jsonl:13"],
            "duplicate": ["wiki.jsonl:14"],
            "a variant already": ["wiki.jsonl:15"],
            "not UTF-8": ["wiki.jsonl:16"],
        }
        (tmp_path / "wiki.jsonl").write_text("{\n[]\n")
        with pytest.raises(UserError) as error:
            run(tmp_path, url, variants=1)
        assert error.value.problems == (
            f"{tmp_path}/wiki.jsonl:1: is not JSON (Expecting property name enclosed in double quotes: "
            "line 2 column 1 (char 2)); fix or remove the line",
            f"{tmp_path}/wiki.jsonl:2: is not a JSON object; fix or remove the line",
            "2 bad lines; or leave them out by --skip-bad-lines N",
        )
        (tmp_path / "wiki.jsonl").write_text("{\n[]\n" + json.dumps({"text": source[0]}))
        report = run(tmp_path, url, variants=1, skip_bad_lines=2)
    assert report["variants"] == 1 and report["left_out"]["bad line"]["count"] == 2


def test_wrong_arguments_are_all_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        rephrase(["wiki=~/dump"], "~/out", "http://localhost:1", "m", skip_bad_lines=-1)
    assert error.value.problems == (
        f"source = '~/dump': no such file or folder; ~ is not expanded here, give '{Path.home()}/dump'",
        f"--out '~/out': ~ is not expanded here; nearest: '{Path.home()}/out'",
        "--skip-bad-lines -1: must be at least 0",
    )
    with pytest.raises(UserError, match="text_field = 'note': none of the 1 files is JSON lines or Parquet"):
        rephrase([str(tmp_path / "file")], str(tmp_path / "out"), "http://localhost:1", "m", text_field="note")
    arguments = [
        "rephrase",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "file"),
        "--model",
        "m",
        "--url",
        "ftp://x",
    ]
    arguments += ["--variants", "6", "--chunk-chars", "9", "--parallel", "0", "--timeout", "0", "--retries", "-1"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "k2jax rephrase: 8 problems\n"
        f"  source = '{tmp_path}/none': no such file or folder\n"
        f"  --out '{tmp_path}/file': exists and is not a folder of an earlier rephrase; name a new one\n"
        "  --url 'ftp://x': must be like http://localhost:8000/v1\n"
        "  --variants 6: must be at least 1 and at most the 5 styles\n"
        "  --chunk-chars 9: must be at least 200\n"
        "  --parallel 0: must be at least 1\n"
        "  --retries -1: must be at least 0\n"
        "  --timeout 0.0: must be above 0 seconds\n"
    )


def test_a_url_to_write_to_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["rephrase", str(tmp_path), "--out", "s3://bucket/x", "--model", "m", "--url", "http://localhost:1"]) == 2
    )
    assert "must be a folder, not a URL" in capsys.readouterr().err and not [*tmp_path.glob("s3*")]


def test_styles_of_a_file(tmp_path):
    path = tmp_path / "styles.json"
    path.write_text('[{"name": "a", "prompt": "b"}, {"name": "en", "prompt": "Translate.", "same_language": false}]')
    assert read_styles(str(path)) == (Style("a", "b"), Style("en", "Translate.", False))
    linked = tmp_path / "linked.json"
    linked.symlink_to(path)
    assert len(read_styles(str(linked))) == 2
    for text in (b"[]", b"{", b"[1]", b'[{"name": "a"}]', b'[{"name": "a", "prompt": 1}]', b"", b"null", b"5", b"{}",
                 b'{"name": "a", "prompt": "b"}', b"\xff", b"[" * 100_000,
                 b'[{"name": "a", "prompt": %s}]' % (b"9" * 9000),
                 b'[{"name": "a", "prompt": "b"}, {"name": "a", "prompt": "c"}]'):  # fmt: skip
        path.write_bytes(text)
        with pytest.raises(UserError, match=f"--styles {path}: .*must be .*each name once"):
            read_styles(str(path))
    path.unlink()
    with pytest.raises(UserError, match=f"--styles {path}: is missing"):
        read_styles(str(path))
    with pytest.raises(UserError, match=f"--styles {tmp_path}: "):
        read_styles(str(tmp_path))


def test_damaged_answers_are_named_and_never_taken_for_others(source, tmp_path):
    path = tmp_path / "out/answers.sqlite"
    with serve() as (url, asked):
        run(tmp_path, url, variants=1)
        count, whole = len(asked), path.read_bytes()
        for answer in ("null", "[]", '["a", 1]', "[5, true]", "[" * 100_000, "", '["a", true, false]', "{}"):
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
                database.execute("UPDATE answers SET answer = ?", (answer,))
            with pytest.raises(UserError, match=f"{path}: is not a file of answers as it was written .*; remove it"):
                run(tmp_path, url, variants=1)
        for content in (b"garbage" * 99, whole[:100] + b"x" * (len(whole) - 100)):
            for leftover in (tmp_path / "out").glob("answers.sqlite*"):
                leftover.unlink()
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"{path}: is not a file of answers as it was written"):
                run(tmp_path, url, variants=1)
        assert len(asked) == count
        for leftover in (tmp_path / "out").glob("answers.sqlite*"):
            leftover.unlink()
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE answers (asked TEXT)")
        with pytest.raises(RunFailed, match=f"{path}: no such column: answer; the same command continues"):
            run(tmp_path, url, variants=1)


def test_answers_with_long_integers_and_deep_ones(source, tmp_path, no_pauses):
    answer = '{"n": %s, "choices": [{"message": {"content": "so"}}]}' % ("9" * 9000)
    replies = [(200, "[" * 100_000, {}), (200, answer, {})]
    (tmp_path / "out").mkdir()
    with serve(lambda number, body: replies[number - 1]) as (url, asked):
        asking = endpoint.Endpoint(url, "m", None, tmp_path / "out/answers.sqlite", timeout=9, retries=1)
        with contextlib.closing(asking):
            assert asking.ask([{"role": "user", "content": "x"}], 0.0) == ("so", True)
    assert len(asked) == 2


def test_killed_and_run_again_it_goes_on(source, tmp_path):
    """Through the command line, with the key from the environment; nothing answered before the kill is asked again."""
    command = [sys.executable, "-m", "k2jax", "rephrase", f"{tmp_path}/wiki.jsonl", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "MY_KEY": "secret", "PYTHONPATH": str(Path(endpoint.__file__).parents[3])}
    with serve() as (url, asked):
        command += ["--url", url, "--model", "m", "--key-from", "MY_KEY", "--parallel", "1"]
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(asked) < 9 and time.monotonic() < deadline and child.poll() is None:
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        killed_at = len(asked)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    keys = [json.dumps({**a, "key": 0}, sort_keys=True) for a in asked]
    assert 9 <= killed_at < 36 and len(set(keys)) == 36 and len(keys) <= 37  # at most the one under way is asked twice
    assert "24 variants of 12 documents" in done.stdout and {a["key"] for a in asked} == {"Bearer secret"}
    assert len(variants(tmp_path)) == 24
