"""The command line in this process: what is parsed, what is printed on a mistake, and which code it ends with."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import batch as batch_module
from coordinator import cli
from coordinator import infer as infer_module
from coordinator.batchoptions import BatchOptions
from coordinator.config import JobConfig
from coordinator.pool import Pool, Result
from coordinator.values import print_json, write_text
from scheduling.constraints import Constraint
from scheduling.errors import (
    BugError,
    ConfigError,
    EngineError,
    HandshakeError,
    InputError,
    LlmpiError,
    ModelFileError,
    ProtocolError,
    RankLostError,
    RecordError,
    RequestError,
    RunDirError,
)
from scheduling.requests import Sampling

Run = Callable[..., int]
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_RANKID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`llmpi WORDS…`, returning the exit code."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run_words(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["llmpi", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run_words


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[JobConfig, BatchOptions, list[str]]]:
    """Batches that were started, instead of starting them."""
    calls: list[tuple[JobConfig, BatchOptions, list[str]]] = []

    def run_batch(config: JobConfig, options: BatchOptions, argv: list[str]) -> int:
        calls.append((config, options, argv))
        return 0

    monkeypatch.setattr(batch_module, "run_batch", run_batch)
    return calls


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> int:
        raise error

    return fail


BATCH = ("batch", "-m", "m.gguf", "-i", "in.jsonl", "-o", "out")


def test_a_plain_batch_has_the_documented_defaults(run: Run, started: list[Any]) -> None:
    assert run(*BATCH) == 0
    [(config, options, argv)] = started
    assert config == JobConfig(model="m.gguf", sampling=config.sampling)
    assert config.sampling == Sampling(temperature=1.0)
    assert options == BatchOptions(input=Path("in.jsonl"), output=Path("out"))
    assert argv == list(BATCH)


def test_a_word_that_is_none_of_the_few_is_told_with_those(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("batch", "-m", "m.gguf", "-i", "in.jsonl", "-o", "out", "--split", "fifths") == 2
    said = capsys.readouterr().err
    assert "Invalid value for '--split': 'fifths' is not one of 'layer', 'row', 'tensor'" in said


def test_every_flag_reaches_its_option(run: Run, started: list[Any]) -> None:
    flags = (
        "--schedule", "round-robin", "--ranks", "3", "--slots", "4", "--contexts", "2", "--ctx", "128", "--batch", "64",
        "--ubatch", "32", "--threads", "5", "--gpu-layers", "7", "--no-flash-attention", "--device", "cpu",
        "--gpus-per-rank", "2", "--ranks-per-gpu", "3", "--coordinator-works", "--max-tokens", "9", "--temperature",
        "0.5", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.1", "--seed", "11", "--format", "text",
        "--stop", "\n", "--stop", "END",
        "--no-precheck", "--no-copies", "--prefetch", "6", "--lease", "12.5", "--commit-interval", "0.2",
        "--commit-bytes", "1000", "--metrics-interval", "3",
        "--pooling", "cls", "--show", "2", "--quiet", "--json", "--cache-type-k", "q4_0", "--lora", "a.gguf", "--lora",
        "b.gguf:0.5", "--rope-scaling", "yarn", "--rope-scale", "2", "--rope-freq-base", "50000", "--split", "row",
    )  # fmt: skip
    assert run(*BATCH, *flags) == 0
    [(config, options, _)] = started
    assert config == JobConfig(
        model="m.gguf", schedule="round-robin", slots=4, contexts=2, ctx=128, batch=64, ubatch=32, threads=5,
        gpu_layers=7, flash_attention=False, device="cpu", gpus_per_rank=2, ranks_per_gpu=3, coordinator_works=True,
        max_tokens=9, sampling=Sampling(temperature=0.5, top_k=40, top_p=0.9, min_p=0.1, stop=("\n", "END")), seed=11,
        precheck=False,
        copies=False, prefetch=6, lease_s=12.5, commit_interval_s=0.2, commit_bytes=1000, metrics_interval_s=3.0,
        pooling="cls", cache_type_k="q4_0",
        loras=("a.gguf", "b.gguf:0.5"), rope_scaling="yarn", rope_scale=2.0, rope_freq_base=50_000.0, split="row",
    )  # fmt: skip
    assert options == BatchOptions(
        input=Path("in.jsonl"), output=Path("out"), format="text", ranks=3, show=2, quiet=True, as_json=True
    )


def test_auto_is_a_word_as_good_as_none(run: Run, started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*BATCH, "--slots", "auto", "--ctx", "auto", "--gpu-layers", "auto") == 0
    config = started[0][0]
    assert (config.slots, config.ctx, config.gpu_layers) == ("auto", "auto", "auto")
    assert run(*BATCH, "--slots", "many") == 2
    said = capsys.readouterr().err
    assert "--slots" in said
    assert "'auto'" in said


def test_one_cache_type_sets_both_and_gives_way_to_each(run: Run, started: list[Any]) -> None:
    assert run(*BATCH, "--cache-type", "q8_0") == 0
    assert run(*BATCH, "--cache-type", "q8_0", "--cache-type-v", "f16") == 0
    kinds = [(config.cache_type_k, config.cache_type_v) for config, _, _ in started]
    assert kinds == [("q8_0", "q8_0"), ("q8_0", "f16")]


def test_chat_template_is_read_from_its_file(run: Run, started: list[Any], tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }} ü", encoding="utf-8")
    assert run(*BATCH, "--chat-template", str(template)) == 0
    assert started[0][0].chat_template == "{{ messages }} ü"


def test_a_schema_is_a_file_or_the_text_itself(run: Run, started: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object"}', encoding="utf-8")
    assert run(*BATCH, "--json-schema", str(file)) == 0
    assert run(*BATCH, "--json-schema", ' {"type": "object"}') == 0
    expected = Constraint("schema", '{"type":"object"}')
    assert [config.sampling.constraint for config, *_ in started] == [expected, expected]


def test_a_grammar_is_read_from_its_file(run: Run, started: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "g.gbnf"
    file.write_text('root ::= "ü"', encoding="utf-8")
    assert run(*BATCH, "--grammar-file", str(file)) == 0
    assert started[0][0].sampling.constraint == Constraint("grammar", 'root ::= "ü"')


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json-schema", "no-such-file"], "--json-schema no-such-file: No such file"),
        (["--json-schema", '{"type":'], "--json-schema: this is not JSON"),
        (["--json-schema", "{}", "--grammar-file", "GRAMMAR"], "grammar and json_schema are both given"),
        (["--grammar-file", "GRAMMAR", "--json-schema", "GRAMMAR"], "this is not JSON"),
    ],
)
def test_a_schema_or_grammar_that_cannot_be_used_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "a"', encoding="utf-8")
    given = [str(tmp_path / "g.gbnf") if flag == "GRAMMAR" else flag for flag in flags]
    assert run(*BATCH, *given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2), (InputError("x"), 2), (RequestError("x"), 2), (ModelFileError("x"), 2),
        (RunDirError("x"), 2), (HandshakeError("x"), 2), (RecordError("x"), 3), (ProtocolError("x"), 4),
        (EngineError("x"), 4), (RankLostError("x"), 4), (BugError("x"), 4),
    ],
)  # fmt: skip
def test_every_error_is_one_line_and_its_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: LlmpiError, code: int
) -> None:
    monkeypatch.setattr(batch_module, "run_batch", raising(error))
    assert run(*BATCH) == code
    said = capsys.readouterr()
    assert said.err == "llmpi: x\n"
    assert said.out == ""


def test_an_error_has_nothing_that_a_terminal_obeys(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_module, "run_batch", raising(LlmpiError("a\x1b[31m\x9b2J\u202eb\n  c é")))
    run(*BATCH)
    assert capsys.readouterr().err == "llmpi: a\ufffd[31m\ufffd2J\ufffdb\n  c é\n"


def test_an_error_of_our_own_shows_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_module, "run_batch", raising(ZeroDivisionError("planted")))
    assert run(*BATCH) == 4
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "planted" in said
    assert "report" in said


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 2), (errno.ENAMETOOLONG, 2), (errno.EISDIR, 2), (errno.ENOTCONN, 4), (errno.ESTALE, 4)],
)
def test_what_the_system_says_of_a_path_is_no_error_of_our_own(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    monkeypatch.setattr(batch_module, "run_batch", raising(OSError(number, os.strerror(number), "runs/a")))
    assert run(*BATCH) == code
    assert capsys.readouterr().err == f"llmpi: runs/a: {os.strerror(number)}. Mend that, then try again.\n"


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "x", "runs/a"), OSError(errno.EIO, "x")])
def test_an_error_of_the_system_that_no_path_explains_shows_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError
) -> None:
    monkeypatch.setattr(batch_module, "run_batch", raising(error))
    assert run(*BATCH) == 4
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_that_is_gone_is_told_as_that(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    monkeypatch.setattr(batch_module, "run_batch", lambda *_: os.path.abspath("runs"))
    assert run(*BATCH) == 2
    assert capsys.readouterr().err == "llmpi: the folder that this was started in is gone: start from another\n"


def test_what_an_encoding_lacks_is_written_as_its_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(batch_module, "run_batch", lambda *_: print("a é \U0001f600 \udcff") or 0)
    assert run(*BATCH) == 0
    sys.stdout.flush()
    assert written.getvalue() == rb"a \xe9 \U0001f600 \udcff" + b"\n"


def test_data_for_programs_is_whole_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors="backslashreplace"))
    print_json({"run_dir": "é"})
    write_text("cd 'é\udcff'\n")
    assert written.getvalue() == b'{"run_dir": "\\u00e9"}\n' + "cd 'é".encode() + b"\xff'\n"


def test_only_rank_0_speaks_and_carries_the_status(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_module, "run_batch", raising(ConfigError("x")))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    # Status 0: mpirun would end the job at another one, before rank 0's line is out.
    assert run(*BATCH) == 0
    assert run("batch", "--slotz") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert run(*BATCH) == 2
    assert run("batch", "--slotz") == 2
    assert capsys.readouterr().err.count("llmpi: ") == 2


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("bacth",), "bacth"),
        ((*BATCH, "--slotz", "4"), "--slotz"),
        (("batch", "-m", "m.gguf"), "--input"),
        ((*BATCH, "--slots", "many"), "--slots"),
        ((*BATCH, "--slots", "0"), "--slots"),
        ((*BATCH, "--schedule", "fastest"), "fastest"),
        ((*BATCH, "--device", "tpu"), "tpu"),
        ((*BATCH, "--format", "xml"), "xml"),
        ((*BATCH, "--prompt-column", "a", "--template", "{b}"), "--template"),
        ((*BATCH, "--template", "{a"), "character 1"),
        (("batch", "--replay", "run"), "--output"),
        ((*BATCH, "--ranks", "0"), "--ranks"),
        ((*BATCH, "--show", "-1"), "--show"),
        ((*BATCH, "--temperature", "nan"), "temperature"),
        ((*BATCH, "--top-p", "2"), "--top-p"),
        ((*BATCH, "--stop", ""), "--stop"),
        ((*BATCH, "--chat-template", "no-such-file"), "no-such-file"),
        ((*BATCH, "extra"), "extra"),
        (("infer", "-m", "m.gguf"), "missing -p/--prompt"),
        (("submit", "-N2", "--", "infer", "-p", "x"), "not infer"),
        (("infer", "-m", "m.gguf", "-p", "x", "--stream", "--json"), "--stream"),
        (("infer", "-m", "m.gguf", "-p", "x", "--logprobs", "2"), "--logprobs"),
        (("infer", "-m", "m.gguf", "-p", "x", "--logprobs", "21", "--json"), "top_logprobs is 21"),
        (("infer", "-m", "m.gguf", "-p", "x", "--continuation", ""), "continuations"),
        (("infer", "-m", "m.gguf", "-p", "x", "--continuation", "y", "--echo"), "--echo"),
        (("infer", "-m", "m.gguf", "-p", "x", "--echo"), "--raw"),
        (("infer", "-m", "m.gguf", "-p", "x", "--echo", "--raw", "--stream"), "--stream"),
        (("infer", "-m", "m.gguf", "-p", "x", "--echo", "--raw", "--max-tokens", "0"), "max_tokens is 0"),
        (("infer", "-m", "m.gguf", "-p", "x", "--raw", "--system", "y"), "--system"),
        (("export", "run", "--order", "random"), "random"),
    ],
)
def test_mistake_is_one_line_that_names_it(
    run: Run, started: list[Any], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], word: str
) -> None:
    assert run(*words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("llmpi: "), said.err
    assert said.err.count("\n") == 1, said.err
    assert word in said.err
    assert "Traceback" not in said.err
    assert not started


def test_help_and_version_are_no_errors(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "batch" in capsys.readouterr().out
    assert run("batch", "--help") == 0
    assert "--schedule" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "report", "stop", "export"])
def test_commands_on_what_is_no_run(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    assert run(command, str(tmp_path / "nothing")) == 2
    said = capsys.readouterr().err
    assert said.startswith("llmpi: ")
    assert "nothing" in said


def test_no_path_is_looked_at_before_its_command_runs(
    run: Run, started: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a network file system that is gone all of this says no, though the user's words are right."""
    asked: list[object] = []

    def access(path: object, mode: int, **_how: object) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr("os.access", access)
    assert run("batch", "-m", "m.gguf", "-i", str(tmp_path), "-o", str(tmp_path)) == 0
    assert len(started) == 1
    for words in (["status"], ["stop"], ["report"], ["study", "show"], ["models", "add"], ["slurm-job", "begin"]):
        assert run(*words, str(tmp_path)) != 0
    assert run("export", str(tmp_path), "--to", "csv", "-o", str(tmp_path)) != 0
    assert str(tmp_path) not in map(str, asked)


def test_infer_tells_notes_beside_the_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NotingPool(Pool):
        def __enter__(self) -> Pool:
            self._note("the model is a copy on this node")
            return self

        def generate(self, *_: object, **__: object) -> Iterator[Result]:
            return iter(())

    monkeypatch.setattr(infer_module, "Pool", NotingPool)
    assert run("infer", "-m", "m.gguf", "-p", "Hello") == 0
    assert capsys.readouterr() == ("", "the model is a copy on this node\n")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none.jsonl", "-i none.jsonl: there is no such file"),
        ("-", "-i -: a job has no standard input"),
        ("in.jsonl", "there is no sinfo here"),
    ],
)
def test_submit_looks_at_the_input_before_it_asks_slurm(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, said: str
) -> None:
    (tmp_path / "in.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("submit", "-N2", "--", "batch", "-m", "x", "-i", given, "-o", "run") == 2
    assert said in capsys.readouterr().err


def test_submit_takes_the_command_as_it_is_typed_elsewhere(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("submit", "-N2", "--", "llmpi", "batch", "-m", "x", "-i", "in.jsonl", "-o", "run") == 2
    assert "there is no sinfo here" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["mistyped.gguf", "mistyped:q4", "m.gguf"])
def test_submit_says_of_a_model_that_it_is_not_here(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    for name in ("in.jsonl", "m.gguf"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LLMPI_HOME", str(tmp_path / "home"))
    assert run("submit", "-N2", "--", "batch", "-m", model, "-i", "in.jsonl", "-o", "run") == 2
    said = capsys.readouterr().err
    assert "there is no sinfo here" in said, "the nodes may have it"
    assert (f"note: -m {model}: there is no " in said) == (model != "m.gguf")
