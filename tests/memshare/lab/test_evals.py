"""Questions from generated problems and from files in the formats of public benchmarks; grading."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from memshare.cli.main import main
from memshare.errors import UserError
from memshare.lab.evals.answers import EngineSettings, ModelAnswer
from memshare.lab.evals.grading import is_right
from memshare.lab.evals.questions import Question, load

GPQA = {
    "Question": "Which is a noble gas?", "Correct Answer": "Neon\n", "Incorrect Answer 1": "Iron",
    "Incorrect Answer 2": "Gold", "Incorrect Answer 3": "Lead", "Subdomain": "Chemistry",
}  # fmt: skip


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_math_is_read_from_a_file_in_the_hubs_format(tmp_path: Path) -> None:
    lines = [
        {"problem": f"What is {i}/2?", "answer": f"\\frac{{{i}}}{{2}}", "unique_id": str(i)}
        for i in (1, 3, 5)
    ]
    questions = load("math500", 2, write(tmp_path / "m.jsonl", *lines))
    assert [question.reference for question in questions] == ["\\frac{1}{2}", "\\frac{3}{2}"]
    assert "What is 1/2?" in questions[0].prompt
    assert "\\boxed{}" in questions[0].prompt
    assert is_right(questions[0], "It is one half, so \\boxed{0.5}.")
    assert not is_right(questions[0], "So \\boxed{2}.")


def test_numbers_as_answers_are_read_too(tmp_path: Path) -> None:
    (question,) = load("aime24", None, write(tmp_path / "a.jsonl", {"problem": "p", "answer": 204}))
    assert is_right(question, "\\boxed{204}")
    assert not is_right(question, "\\boxed{205}")


def test_choices_are_shuffled_the_same_way_every_time(tmp_path: Path) -> None:
    file = write(tmp_path / "g.jsonl", *[GPQA] * 12)
    questions = load("gpqa", None, file)
    assert questions == load("gpqa", None, file)
    assert len({question.reference for question in questions}) > 1, "not always the same letter"
    for question in questions:
        assert f"{question.reference}) Neon\n" in question.prompt + "\n"
        assert is_right(question, f"First \\boxed{{X}}, then \\boxed{{{question.reference}}}")
        other = "A" if question.reference != "A" else "B"
        assert not is_right(question, f"\\boxed{{{question.reference}}} or \\boxed{{{other}}}")
        for font in ("text", "textbf", "mathrm", "mathbf", "textit"):
            assert is_right(question, f"\\boxed{{\\{font}{{({question.reference})}}}}")
        assert is_right(question, f"\\boxed{{\\textbf{{({question.reference})}}\\ 12}}")
        assert not is_right(question, "I do not know.")


def test_a_line_without_a_field_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "b.jsonl", {"problem": "p", "answer": "1"}, {"problem": "q"})
    with pytest.raises(UserError, match=r"line 2: wants 'answer'"):
        load("math500", None, file)


def test_a_file_that_is_no_jsonl_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("no json")
    with pytest.raises(UserError, match=r"c\.jsonl"):
        load("math500", None, tmp_path / "c.jsonl")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        load("math500", None, tmp_path / "nowhere.jsonl")


def test_generated_problems_are_questions() -> None:
    questions = load("recall", 3, seed=7)
    assert [question.name for question in questions] == ["7", "8", "9"]
    right = f"Hm. The final answer is {questions[0].reference}."
    assert is_right(questions[0], right)
    assert not is_right(questions[0], right + " The final answer is 99.")
    assert len(load("chain", None)) == 200


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no suite 'mmlu'"):
        load("mmlu", None)
    with pytest.raises(UserError, match="leave --data away"):
        load("chain", None, tmp_path / "x.jsonl")


@pytest.mark.parametrize("text", ["", "\\boxed{", "$$$", "\\frac{1}{0}", "x" * 10000])
def test_odd_text_is_wrong_and_no_error(text: str) -> None:
    assert not is_right(Question("1", "math", "p", "17"), text)


class StandIn(BaseHTTPRequestHandler):
    """A server that answers as OpenAI's API does: 7 to requests that share, 8 to exact ones."""

    asked: list[dict[str, Any]]
    gives_up = 2  # blocks of a request that shares

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        exact = body["vllm_xargs"].get("memshare") == "off"
        number = 8 if exact else 7
        given_up = 0 if exact else self.gives_up
        answer = json.dumps(
            {
                "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [
                    {
                        "index": 0, "finish_reason": "stop",
                        "message": {"role": "assistant", "content": f"\\boxed{{{number}}}"},
                    }
                ],
                "kv_transfer_params": {"memshare": {"blocks_shared": given_up}},
                "usage": {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14},
            }
        ).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    StandIn.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as http:
        threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1", StandIn.asked
        http.shutdown()


def test_a_served_model_is_asked_with_sharing_and_exact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], server: tuple[str, list[dict[str, Any]]]
) -> None:
    url, asked = server
    data = write(
        tmp_path / "m.jsonl", {"problem": "p", "answer": "8"}, {"problem": "q", "answer": "7"}
    )
    words = ["eval", "--url", url, "--model", "m", "--suite", "math500", "--data", str(data)]
    record = tmp_path / "answers.json"
    words += ["--samples", "3", "--temperature", "0.6", "--json", str(record)]
    assert main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("6 answers of 1536 tokens at most to 2 questions (math500), 32 at")
    assert shown[4].startswith("| exact | 6 | 50.0% |")
    assert shown[5].startswith("| shared | 6 | 50.0% |")
    assert shown[4].endswith("| - | 9 | 0 | 0 |")
    assert shown[5].endswith("| +0.0 ± 196.0 | 9 | 0 | 6 |"), "as many right, and all others"
    assert len(shown) == 6
    exact = [body for body in asked if body["vllm_xargs"].get("memshare") == "off"]
    assert all(body["vllm_xargs"]["memshare_usage"] == "on" for body in asked)
    assert len(exact) == 6
    assert len(asked) == 12
    assert sorted(body["seed"] for body in exact) == [0, 0, 1, 1, 2, 2]
    assert [answer["right"] for answer in json.loads(record.read_text())][:3] == [True] * 3


def test_a_comparison_in_which_nothing_was_given_up_says_so(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    server: tuple[str, list[dict[str, Any]]],
) -> None:
    monkeypatch.setattr(StandIn, "gives_up", 0)
    assert (
        main(["eval", "--url", server[0], "--model", "m", "--suite", "chain", "--limit", "2"]) == 0
    )
    assert "sharing was not compared" in capsys.readouterr().out


def test_arms_that_cannot_share_are_compared_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(prompts: list[str], *_: object) -> list[list[ModelAnswer]]:
        return [[ModelAnswer("The final answer is 1.", 6)] for _ in prompts]

    monkeypatch.setattr("memshare.cli.eval.estimate", lambda work: 1200.0)
    monkeypatch.setattr("memshare.lab.bench.models.resolve", lambda name: name)
    monkeypatch.setattr("memshare.cli.eval.longest", lambda model, prompts: 100)
    monkeypatch.setattr("memshare.cli.eval.require_kv_types", lambda arms: None)
    monkeypatch.setattr("memshare.cli.eval.from_engine", answer)
    words = ["eval", "--suite", "chain", "--limit", "2", "--blocks", "101", "--arms"]
    assert main([*words, "dense,fp8"]) == 0
    shown = capsys.readouterr().out
    assert "100 usable KV blocks. fp8 has 200 usable blocks in the same bytes." in shown
    [first, *_] = shown.splitlines()
    assert first.startswith(
        "2 answers of 1536 tokens at most to 2 questions (chain), for each of 2"
    )
    assert "About 20 minutes" in first
    assert "a smaller --limit or --max-tokens makes it shorter" in first
    assert "not compared" not in shown
    assert main([*words, "dense,twins"]) == 0
    shown = capsys.readouterr().out
    assert "same bytes" not in shown
    assert "sharing was not compared" in shown


def test_answers_are_kept_when_a_later_arm_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(prompts: list[str], *rest: Any) -> list[list[ModelAnswer]]:
        if rest[2].name == "twins":
            raise UserError("the engine of twins failed")
        return [[ModelAnswer("The final answer is 1.", 6)] for _ in prompts]

    monkeypatch.setattr("memshare.cli.eval.estimate", lambda work: 1200.0)
    monkeypatch.setattr("memshare.lab.bench.models.resolve", lambda name: name)
    monkeypatch.setattr("memshare.cli.eval.longest", lambda model, prompts: 100)
    monkeypatch.setattr("memshare.cli.eval.from_engine", answer)
    record = tmp_path / "answers.json"
    assert main(["eval", "--suite", "chain", "--limit", "2", "--json", str(record)]) == 1
    assert [kept["arm"] for kept in json.loads(record.read_text())] == ["dense", "dense"]


def test_a_suite_without_questions_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("\n")
    with pytest.raises(UserError, match="empty"):
        load("math500", None, file)


def test_a_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--url", "http://127.0.0.1:9/v1", "--suite", "chain", "--limit", "1"]
    assert main(words) == 1
    assert "http://127.0.0.1:9/v1" in capsys.readouterr().err


def test_an_engine_has_room_for_the_longest_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths: list[int] = []

    def answer(prompts: list[str], _sampling: object, engine: EngineSettings, *_: object) -> Any:
        lengths.append(engine.max_model_len)
        return [[ModelAnswer("The final answer is 1.", 6)] for _ in prompts]

    monkeypatch.setattr("memshare.cli.eval.estimate", lambda work: 1200.0)
    monkeypatch.setattr("memshare.lab.bench.models.resolve", lambda name: name)
    monkeypatch.setattr("memshare.cli.eval.longest", lambda model, prompts: 100)
    monkeypatch.setattr("memshare.cli.eval.from_engine", answer)
    words = ["eval", "--suite", "chain", "--limit", "2", "--arms", "dense", "--max-tokens", "8192"]
    assert main(words) == 0
    assert main([*words, "--max-model-len", "9000"]) == 0
    assert lengths == [8292, 9000]
    assert main([*words, "--max-model-len", "8291"]) == 1
    assert "would cut answers off" in capsys.readouterr().err
    assert lengths == [8292, 9000], "nothing was started"


def test_an_expression_that_takes_for_ever_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memshare.lab.evals.grading._SECONDS", 1)
    question = Question("q", "math", "How much?", "1")
    began = time.monotonic()
    assert not is_right(question, "So it is \\boxed{9^{9^{9^{9^{9}}}}}.")
    assert time.monotonic() - began < 120
