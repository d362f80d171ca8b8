"""Every mistake a person can make: one clear line that says what, where and what to do; an exit code; promptly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduling.errors import EXIT_INFRASTRUCTURE
from tests.launch import ROOT, Launcher, run_alone
from tests.system.runs import Gate, Run, check_one_clear_line, our_lines, prompts, until, write_lines

pytestmark = [pytest.mark.system, pytest.mark.slow]

PROMPT_S = 200.0
"""Bounds what hangs: nothing here waits for anybody, but under load three ranks take half a minute to start."""


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", prompts(4, max_tokens=4))


# ---------------------------------------------------------------- the model


def missing(model: Path, folder: Path) -> Path:
    return folder / "nothing.gguf"


def not_gguf(model: Path, folder: Path) -> Path:
    path = folder / "text.gguf"
    path.write_bytes(b"this is a text, not a model\n" * 100)
    return path


def truncated(model: Path, folder: Path) -> Path:
    path = folder / "cut.gguf"
    whole = model.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


BAD_MODELS = [(missing, "nothing.gguf"), (not_gguf, "text.gguf"), (truncated, "cut.gguf")]


@pytest.mark.parametrize(("damage", "word"), BAD_MODELS)
def test_bad_model_alone(
    tiny_model: Path, tmp_path: Path, given: Path, damage: Callable[[Path, Path], Path], word: str
) -> None:
    model = damage(tiny_model, tmp_path)
    done = run_alone("batch", "-m", model, "-i", given, "-o", tmp_path / "run", timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, word)
    assert not (tmp_path / "run").exists()


@pytest.mark.mpi
@pytest.mark.parametrize(("damage", "word"), [BAD_MODELS[0], BAD_MODELS[2]])
def test_bad_model_under_mpirun_is_told_once(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path, given: Path, damage: Callable[[Path, Path], Path], word: str
) -> None:
    model = damage(tiny_model, tmp_path)
    done = mpirun(3, "batch", "-m", model, "-i", given, "-o", tmp_path / "run", timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, word)


# ---------------------------------------------------------------- the input

GOOD = b'{"custom_id": "a", "prompt": "x"}\n'
BAD_INPUTS = {
    "empty": (b"", "empty"),
    "blank": (b"\n\n", "empty"),
    "malformed": (GOOD + b'{"custom_id": "b", "prompt": \n', "line 2"),
    "twice": (GOOD + b'{"custom_id": "b", "prompt": "y"}\n' + GOOD, "line 3"),
    "utf8": (GOOD + b'{"custom_id": "b", "prompt": "\xff\xfe"}\n', "line 2"),
    "unknown": (b'{"custom_id": "a", "prompt": "x", "temprature": 1}\n', "temprature"),
    "nan": (b'{"custom_id": "a", "prompt": "x", "temperature": NaN}\n', "line 1"),
    "negative": (b'{"custom_id": "a", "prompt": "x", "top_p": -1}\n', "top_p"),
    "huge": (b'{"custom_id": "a", "prompt": "x", "max_tokens": 99999999999}\n', "max_tokens"),
    "zero": (b'{"custom_id": "a", "prompt": "x", "max_tokens": 0}\n', "max_tokens"),
    "array": (b'["x"]\n', "line 1"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_alone(tiny_model: Path, tmp_path: Path, name: str) -> None:
    content, word = BAD_INPUTS[name]
    given = tmp_path / "in.jsonl"
    given.write_bytes(content)
    done = run_alone("batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, word)
    assert not (tmp_path / "run").exists()


def test_missing_input(tiny_model: Path, tmp_path: Path) -> None:
    done = run_alone("batch", "-m", tiny_model, "-i", tmp_path / "no.jsonl", "-o", tmp_path / "run", timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, "no.jsonl")


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["empty", "malformed"])
def test_bad_input_under_mpirun_is_told_once(mpirun: Launcher, tiny_model: Path, tmp_path: Path, name: str) -> None:
    content, word = BAD_INPUTS[name]
    given = tmp_path / "in.jsonl"
    given.write_bytes(content)
    done = mpirun(3, "batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, word)


def test_without_precheck_a_bad_line_fails_alone(tiny_model: Path, tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    bad = b'{"custom_id": "bad", "prompt": "x", "top_p": 7}\n'
    last = b'{"custom_id": "last", "prompt": "z", "max_tokens": 3}\n'
    given.write_bytes(b'{"custom_id": "a", "prompt": "x", "max_tokens": 3}\n' + bad + b"no json\n" + last)
    run = Run(tmp_path / "run")
    done = run_alone(
        "batch", "-m", tiny_model, "-i", given, "-o", run.path, "--no-precheck", "--ctx", 128, "--slots", 2
    )
    assert done.rc == 1, done.output
    found = run.by_id()
    assert len(found) == 4
    assert "top_p" in found["bad"]["error"]["message"]
    assert found["last"]["error"] is None


@pytest.mark.mpi
def test_prompt_longer_than_the_context_fails_alone(mpirun: Launcher, tiny_model: Path, tmp_path: Path) -> None:
    lines = prompts(8, max_tokens=4)
    lines[3]["prompt"] = "many words " * 400
    given = write_lines(tmp_path / "in.jsonl", lines)
    run = Run(tmp_path / "run")
    done = mpirun(3, "batch", "-m", tiny_model, "-i", given, "-o", run.path, "--ctx", 256, "--slots", 2)
    assert done.rc == 1, done.output
    run.check_whole([f"r{k}" for k in range(8)], failed=1)
    assert "256" in run.by_id()["r3"]["error"]["message"]


# ---------------------------------------------------------------- the run directory


@pytest.mark.parametrize("place", ["below a file", "in /proc"])
def test_run_directory_that_cannot_be_written(tiny_model: Path, tmp_path: Path, given: Path, place: str) -> None:
    # Permission bits do not bind root, who often runs tests: these places bind everybody.
    output = given / "run" if place == "below a file" else Path("/proc/llmpi-run")
    done = run_alone("batch", "-m", tiny_model, "-i", given, "-o", output, timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, str(output))


def test_run_directory_that_holds_something_else(tiny_model: Path, tmp_path: Path, given: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    done = run_alone("batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "full", timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, "thesis.tex")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("command", ["status", "stop", "report", "export"])
def test_commands_on_what_is_no_run_directory(tmp_path: Path, command: str) -> None:
    done = run_alone(command, tmp_path, timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, str(tmp_path))


# ---------------------------------------------------------------- launchers and devices


def test_tasks_of_srun_that_do_not_see_each_other_are_refused(tiny_model: Path, tmp_path: Path, given: Path) -> None:
    command = ("batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run")
    for rank in range(3):
        step = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_JOB_ID": "7"}
        done = run_alone(*command, env=step, timeout_s=PROMPT_S)
        if rank == 0:
            check_one_clear_line(done, 2, "3 tasks", "--mpi=")
        else:
            assert done.rc == 0, "the first task carries the status: srun gives the highest"
            assert not our_lines(done), "one rank says it for all"
    assert not (tmp_path / "run").exists()


@pytest.mark.mpi
def test_gpu_asked_for_and_not_there(mpirun: Launcher, tiny_model: Path, tmp_path: Path, given: Path) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
    command = ("batch", "-m", tiny_model, "-i", given, "--device", "gpu")
    alone = run_alone(*command, "-o", tmp_path / "a", env=hidden, timeout_s=PROMPT_S)
    check_one_clear_line(alone, 2, "GPU")
    done = mpirun(3, *command, "-o", tmp_path / "b", env=hidden, timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, "GPU")


# ---------------------------------------------------------------- engines that cannot start


def lacks_tensors(path: Path) -> Path:
    """A GGUF that is whole and says 'llama', but has one tensor only."""
    gguf = pytest.importorskip("gguf", reason="the gguf package (extra: test) writes it")
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_scores([0.0, 0.0, 0.0, -1.0])
    writer.add_token_types([2, 3, 3, 1])
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.mpi
def test_model_that_llama_refuses_ends_all_ranks(mpirun: Launcher, tmp_path: Path, given: Path) -> None:
    model = lacks_tensors(tmp_path / "hollow.gguf")
    done = mpirun(3, "batch", "-m", model, "-i", given, "-o", tmp_path / "run", timeout_s=PROMPT_S)
    line = check_one_clear_line(done, 2, "hollow.gguf")
    assert "rank 1" in line or "rank 2" in line


@pytest.mark.mpi
def test_engine_that_cannot_start_on_one_rank_leaves_the_others_at_work(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path, given: Path
) -> None:
    """As on a host whose llama.cpp build lacks a library: the engine process of rank 2 cannot import it."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "llama_cpp.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    program = tmp_path / "start.py"
    program.write_text(
        "import os, runpy, sys\n"
        "rank = os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ.get('PMI_RANK')\n"
        "if rank == '2':\n"
        f"    os.environ['PYTHONPATH'] = {str(broken)!r} + os.pathsep + os.environ['PYTHONPATH']\n"
        "sys.argv[0] = 'llmpi'\n"
        "runpy.run_module('llmpi', run_name='__main__')\n"
    )
    # The other engine must not be done with everything before that.
    gate, run = Gate.closed(tmp_path / "gate"), Run(tmp_path / "run")
    lines = [line | {"max_tokens": 20 + k % 2} for k, line in enumerate(prompts(20, ignore_eos=True))]
    given = write_lines(tmp_path / "many.jsonl", lines)
    command = ("batch", "-m", tiny_model, "-i", given, "-o", run.path, "--ctx", 128, "--slots", 2, "-q")
    with mpirun.start(3, *command, program=[program], env=gate.env) as job:
        until(lambda: "this worker takes no more work" in job.stderr, "a worker that leaves")
        gate.open()
        done = job.wait(PROMPT_S)
    assert done.rc == 0, done.output
    assert "libcudart.so.12" in done.stderr
    run.check_whole(line["custom_id"] for line in lines)
    report = run_alone("report", run.path, "--no-html")
    assert "left before the end: rank 2 on " in report.stdout, report.output
    assert "libcudart.so.12" in report.stdout


@pytest.mark.mpi
def test_chat_template_that_cannot_be_compiled_ends_all_ranks(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path, given: Path
) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{% if %}")
    done = mpirun(
        3, "batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", "--chat-template", template,
        timeout_s=PROMPT_S,
    )  # fmt: skip
    check_one_clear_line(done, 2, "chat template")


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--slotz", "4"), "--slotz"),
        (("--schedule", "fastest"), "fastest"),
        (("--slots", "0"), "--slots"),
        (("--slots", "many"), "--slots"),
        (("--max-tokens", "-5"), "--max-tokens"),
        (("--temperature", "nan"), "temperature"),
        (("--top-p", "1.5"), "--top-p"),
        (("--lease", "0"), "--lease"),
        (("--lease", "nan"), "--lease"),
        (("--engine-lease", "0"), "--engine-lease"),
        (("--request-timeout", "-1"), "--request-timeout"),
        (("--max-deaths", "1"), "--max-deaths"),
        (("--format", "yaml"), "yaml"),
        (("--ranks", "0"), "--ranks"),
        (("--ranks", "-3"), "--ranks"),
        (("--show", "-1"), "--show"),
        (("--chat-template", "no-such-file"), "no-such-file"),
    ],
)
def test_flag_that_cannot_be(tiny_model: Path, tmp_path: Path, given: Path, flags: tuple[str, ...], word: str) -> None:
    done = run_alone("batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", *flags, timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, word)
    assert not (tmp_path / "run").exists()


@pytest.mark.mpi
def test_mistyped_flag_is_said_once_under_mpirun(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path, given: Path
) -> None:
    done = mpirun(3, "batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", "--slotz", 4, timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, "--slotz")


def test_unknown_command_and_missing_option() -> None:
    check_one_clear_line(run_alone("bacth", timeout_s=PROMPT_S), 2, "bacth")
    check_one_clear_line(run_alone("batch", "-m", "x.gguf", timeout_s=PROMPT_S), 2, "-i")


def test_infer_with_a_prompt_longer_than_the_context(tiny_model: Path) -> None:
    done = run_alone("infer", "-m", tiny_model, "-p", "long words " * 300, "--ctx", 128, timeout_s=PROMPT_S)
    check_one_clear_line(done, 2, "128")
    told = run_alone("infer", "-m", tiny_model, "-p", "long words " * 300, "--ctx", 128, "--json", timeout_s=PROMPT_S)
    assert told.rc == 2
    assert "128" in json.loads(told.stdout)["error"]


def test_infer_prints_the_answer_alone(tiny_model: Path) -> None:
    options = ("infer", "-m", tiny_model, "-p", "hello", "--max-tokens", 5, "--ctx", 128)
    plain = run_alone(*options)
    streamed = run_alone(*options, "--stream")
    data = run_alone(*options, "--json")
    assert (plain.rc, streamed.rc, data.rc) == (0, 0, 0), plain.output + streamed.output + data.output
    assert plain.stdout == streamed.stdout
    told = json.loads(data.stdout)
    assert told["output_tokens"] == 5
    assert told["text"] + "\n" == plain.stdout


@pytest.mark.mpi
def test_infer_under_mpirun_answers_once(mpirun: Launcher, tiny_model: Path) -> None:
    done = mpirun(3, "infer", "-m", tiny_model, "-p", "hello", "--max-tokens", 5, "--ctx", 128, "--json")
    assert done.rc == 0, done.output
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [answer["output_tokens"] for answer in answers] == [5]


def test_help_is_no_error() -> None:
    done = run_alone("--help", timeout_s=PROMPT_S)
    assert done.rc == 0, done.output
    assert "batch" in done.stdout


def test_an_engine_that_aborts_while_loading_is_one_line(tiny_model: Path, tmp_path: Path, given: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "llama_cpp.py").write_text("import os\nos.abort()\n")
    path = {"PYTHONPATH": f"{broken}:{ROOT}"}
    done = run_alone("batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", "-q", env=path)
    assert done.rc == EXIT_INFRASTRUCTURE
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("llmpi: rank 0")
    assert "SIGABRT" in last


def test_caches_larger_than_all_memory_are_refused_before_loading(
    tiny_model: Path, tmp_path: Path, given: Path
) -> None:
    done = run_alone("batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", "-q", "--ctx", 10**9)
    check_one_clear_line(done, 2, "--ctx", "GB")


@pytest.mark.mpi
def test_ranks_that_are_there_already_cannot_be_asked_for(
    mpirun: Launcher, tiny_model: Path, tmp_path: Path, given: Path
) -> None:
    done = mpirun(2, "batch", "-m", tiny_model, "-i", given, "-o", tmp_path / "run", "--ranks", "5")
    check_one_clear_line(done, 2, "--ranks")
