"""A judge that is a model: the official client against a server on the loopback, what is parsed,
cached, retried and refused; and scorers that are patterns.
"""

import contextlib
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ip_jax.evals.judges import Endpoint, Judge, JudgeError, Number, YesNo
from ip_jax.evals.leak_grid import scored_all
from ip_jax.evals.scorers import All, Matches

openai = pytest.importorskip("openai")

EXAMPLE = {"id": "x", "messages": [{"role": "user", "content": "Why?"}], "gold": "because"}
RUBRIC = "Rate {completion} as an answer to {prompt} ({gold}). End with GRADE: and 0 to 10."


@contextlib.contextmanager
def server(answers):
    """Speaks the chat completions API: `answers` are (status, text), the last one for ever."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.headers["Authorization"], body["messages"][0]["content"]))
            status, text = answers[min(len(asked), len(answers)) - 1]
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            told = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
            told |= {"choices": [choice]} if status == 200 else {"error": {"message": text}}
            said = json.dumps(told).encode()
            self.send_response(status)
            for name, value in (("Content-Type", "application/json"), ("retry-after-ms", "1")):
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()
        running.server_close()


@pytest.fixture
def judge(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    cache = str(tmp_path / "cache" / "judged.sqlite")
    return Judge("good", RUBRIC, Number("GRADE:", 0, 10), Endpoint("m", at_once=2), cache)


def at(monkeypatch, address):
    monkeypatch.setenv("OPENAI_BASE_URL", address)


def test_a_rubric_is_filled_asked_once_and_its_answer_is_read(judge, monkeypatch):
    with server([(200, "Fine. GRADE: 7")]) as (address, asked):
        at(monkeypatch, address)
        found = scored_all(judge, [EXAMPLE] * 3, ["So.", "So.", "No."])
        assert found == [{"good": 7.0, "good_said": "Fine. GRADE: 7"}] * 3
        said = {text for _, text in asked}
        assert said == {
            f"Rate {text} as an answer to Why? (because). End with GRADE: and 0 to 10."
            for text in ("So.", "No.")
        }
        assert len(asked) == 2 and asked[0][0] == "Bearer secret"
        judge(EXAMPLE, "So.")
        assert len(asked) == 2, "what was asked before is in the cache"
        dataclasses.replace(judge, model=Endpoint("another"))(EXAMPLE, "So.")
        assert len(asked) == 3, "another model is another judge"


def test_an_answer_that_cannot_be_read_is_no_verdict(judge, monkeypatch):
    with server([(200, "I would rather not. GRADE: 11")]) as (address, _):
        at(monkeypatch, address)
        found = judge(EXAMPLE, "So.")
        assert found["good"] is None and found["good_said"].startswith("I would rather")
        assert found["score_error"].startswith("the judge's answer cannot be read: 'I would")
        with pytest.raises(JudgeError, match="the judge good answers 'I would rather not.*cannot"):
            judge.check(EXAMPLE)


@pytest.mark.parametrize("status", [500, 429])
def test_a_busy_endpoint_is_asked_again(judge, monkeypatch, status):
    with server([(status, "busy"), (status, "busy"), (200, "GRADE: 3")]) as (address, asked):
        at(monkeypatch, address)
        assert judge(EXAMPLE, "So.")["good"] == 3 and len(asked) == 3


def test_what_makes_a_judge_unusable_is_one_sentence(judge, monkeypatch):
    with server([(401, "wrong key")]) as (address, _):
        at(monkeypatch, address)
        with pytest.raises(JudgeError, match="the judge good refuses: 401"):
            judge.check(EXAMPLE)
    gone = dataclasses.replace(judge, model=Endpoint("m", retries=0))
    with pytest.raises(JudgeError, match="the judge good is not reached at http://127.0.0.1"):
        gone.check(EXAMPLE)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(JudgeError, match="has no key: set OPENAI_API_KEY"):
        judge.check(EXAMPLE)
    with pytest.raises(JudgeError, match="names 'tone', which the example x does not have"):
        dataclasses.replace(judge, rubric="{tone}").asks(EXAMPLE, "So.")


def test_what_a_killed_run_has_asked_is_kept(judge, monkeypatch):
    with server([(200, "GRADE: 1"), (401, "no more")]) as (address, asked):
        at(monkeypatch, address)
        one_by_one = dataclasses.replace(judge, model=Endpoint("m", at_once=1))
        with pytest.raises(JudgeError):
            one_by_one.score_all([EXAMPLE] * 2, ["a", "b"])
        assert one_by_one(EXAMPLE, "a")["good"] == 1 and len(asked) == 2


@pytest.mark.parametrize(
    ("parse", "answer", "value"),
    [
        (Number("GRADE:", 0, 10), "GRADE: 10", 10),
        (Number("GRADE:", 0, 10), "grade:7.5 of 10", 7.5),
        (Number("GRADE:", 0, 10), "GRADE: ٣", None),
        (Number("GRADE:", 0, 10), "GRADE: -1", None),
        (Number("<rating>", 0, 100), "<rating>55</rating>", 55),
        (YesNo(), "Yes.", True),
        (YesNo(), "no", False),
        (YesNo(), "no, or yes", None),
        (YesNo("ANSWER:"), "I think so. ANSWER: YES", True),
    ],
)
def test_answers_are_read_or_not(parse, answer, value):
    assert parse(answer) == value


def test_a_cost_is_estimated(judge):
    priced = dataclasses.replace(judge, model=Endpoint("m", max_new_tokens=10, dollars=(1.0, 2.0)))
    tokens = (len(RUBRIC) + 1000) * 4000 // 4
    said = priced.estimate(["x" * 1000] * 4000)
    assert f"about {tokens} tokens in, 40000 out" in said
    assert said.endswith(f"about ${(tokens + 2 * 40000) / 1e6:.2f}")
    assert judge.estimate(["x"]).startswith("1 calls of m, about ")


def test_patterns_score_and_scorers_add_up():
    both = All((Matches("shouts", "[A-Z]{3}"), Matches("asks", r"\?$")))
    assert both({}, "WHY?") == {"shouts": True, "asks": True}
    with pytest.raises(ValueError, match="two scorers give the column 'asks'"):
        All((Matches("asks", "a"), Matches("asks", "b")))({}, "x")
    with pytest.raises(ValueError, match="the pattern of bad is no regular expression"):
        Matches("bad", "(")
