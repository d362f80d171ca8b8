"""Grammars and schemas as a person uses them: in a file of requests, as a run's default, for one prompt, in Python."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import llmpi
from storage.rundir import holds_answers
from tests.launch import Launcher, run_alone
from tests.system.runs import Run, check_one_clear_line, prompts, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow]

SMALL = ("--max-tokens", 80, "--ctx", 256, "--slots", 4)
YES_NO = 'root ::= "yes" | "no"'
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def test_requests_of_a_file_follow_their_own_and_the_rest_the_runs_grammar(real_model: Path, tmp_path: Path) -> None:
    (tmp_path / "yes-no.gbnf").write_text(YES_NO, encoding="utf-8")
    lines = prompts(9, temperature=1)
    for line in lines[3:6]:
        line["response_format"] = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    lines[6]["response_format"] = {"type": "text"}
    lines[7] |= {"json_schema": {"not": {}}}
    lines[8] |= {"grammar": 'root ::= "- " [a-z]{1,8} "\\n"', "n": 3}
    given = write_lines(tmp_path / "in.jsonl", lines)
    run = Run(tmp_path / "run")
    command = ("batch", "-m", real_model, "-i", given, "-o", run.path, "--grammar-file", tmp_path / "yes-no.gbnf")
    done = run_alone(*command, *SMALL)
    assert done.rc == 1, done.output
    run.check_whole((line["custom_id"] for line in lines), failed=1)
    found = run.by_id()
    assert "keywords that are not supported" in found["r7"]["error"]["message"]
    texts = {
        name: [choice["text"] for choice in line["response"]["body"]["choices"]]
        for name, line in found.items()
        if name != "r7"
    }
    assert all(texts[f"r{k}"][0] in ("yes", "no") for k in range(3))
    for k in range(3, 6):
        jsonschema.validate(json.loads(texts[f"r{k}"][0]), SCHEMA)
    assert texts["r6"][0] not in ("yes", "no")
    assert all(re.fullmatch(r"- [a-z]{1,8}\n", text) for text in texts["r8"])


def test_a_bad_grammar_in_a_file_is_told_before_anything_starts(tiny_model: Path, tmp_path: Path) -> None:
    lines = prompts(3)
    lines[1]["grammar"] = 'root ::= "a" item'
    given = write_lines(tmp_path / "in.jsonl", lines)
    done = run_alone("batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", *SMALL)
    assert done.rc == 2
    assert "line 2: grammar, line 1, column 14: there is no rule named item" in done.output
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_infer_answers_one_prompt_in_a_schema(real_model: Path) -> None:
    command = ("infer", "-m", real_model, "-p", "Describe a lamp as JSON.", "--json-schema", json.dumps(SCHEMA))
    plain = run_alone(*command)
    streamed = run_alone(*command, "--stream")
    assert plain.rc == streamed.rc == 0, plain.output
    jsonschema.validate(json.loads(plain.stdout), SCHEMA)
    assert plain.stdout.strip() == streamed.stdout.strip()


def test_infer_says_what_is_wrong_with_a_schema(tiny_model: Path) -> None:
    done = run_alone("infer", "-m", tiny_model, "-p", "x", "--json-schema", '{"type": "strin"}')
    check_one_clear_line(done, 2, "the JSON schema cannot be used", "strin")


@pytest.mark.parametrize("ranks", [0, 3])
def test_a_run_whose_schema_cannot_be_used_does_not_start(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path, ranks: int
) -> None:
    given, output = tmp_path / "in.jsonl", tmp_path / "run"
    given.write_text('{"prompt": "a"}\n' * 50)
    command = ("batch", "-m", tiny_model, "-i", given, "-o", output, "--json-schema", '{"type": "strin"}')
    done = mpirun(ranks, *command) if ranks else run_alone(*command)
    check_one_clear_line(done, 2, "the JSON schema cannot be used", "strin")
    assert not holds_answers(output)


def test_a_pool_takes_them_as_arguments_and_in_requests(real_model: Path) -> None:
    with llmpi.Pool(str(real_model), slots=4, ctx=256, max_tokens=80) as pool:
        asked: list[str | dict[str, Any]] = [{"prompt": "Is snow cold?", "grammar": YES_NO}, "Describe a lamp as JSON:"]
        answers = {result.index: result for result in pool.generate(asked, json_schema=SCHEMA)}
        assert answers[0].text in ("yes", "no")
        jsonschema.validate(json.loads(answers[1].text), SCHEMA)
        (one,) = pool.generate(["An object:"], response_format={"type": "json_object"}, max_tokens=40)
        assert one.text.startswith("{")
        assert "".join(pool.stream("Is snow warm?", grammar=YES_NO)) in ("yes", "no")
