from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scheduling.errors import ModelFileError
from tests.launch import ROOT
from tests.workers.test_supervisor import PATIENCE_S, listen
from workers.engine_main import check_model_file
from workers.protocol import EngineConfig, EngineFailed
from workers.supervisor import EngineProcess


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        check_model_file(str(tmp_path))


def test_what_begins_like_a_model_is_left_to_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and more")
    check_model_file(str(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("workers.supervisor, workers.engine_main", {"numpy"}),
        ("workers.engine, workers.stepper", {"llguidance", "numpy"}),
        ("workers.rendering, workers.chat", {"jinja2"}),
        ("workers.trial", {"llguidance"}),
    ],
)
def test_each_process_loads_what_it_needs_alone(modules: str, heavy: set[str]) -> None:
    """Whatever dies of a template or a grammar is started anew: it must not take long to be there."""
    code = f"import sys, {modules}; print(*{{'jinja2', 'llama_cpp', 'llguidance', 'numpy'}} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert set(result.stdout.split()) == heavy


@pytest.mark.slow
def test_an_engine_whose_parent_is_gone_leaves_at_once() -> None:
    command = [sys.executable, "-m", "workers.engine_main", "0", "1", str(os.getppid())]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE).returncode == 0


@pytest.mark.slow
def test_an_engine_that_is_never_started_leaves_with_its_pipe() -> None:
    command = [sys.executable, "-m", "workers.engine_main", "0", "1"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        process.communicate(b"", timeout=PATIENCE_S)
    assert process.returncode == 0


@pytest.mark.slow
def test_a_library_that_cannot_be_loaded_is_the_users_error(tmp_path: Path) -> None:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('libcudart.so.99 not found')")
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    # The project's own folder comes first, then this one, then what is installed.
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    engine = EngineProcess(EngineConfig(model=str(model), slots=1), environ=environ)
    (failed,) = listen(engine)
    engine.close(PATIENCE_S)
    assert isinstance(failed, EngineFailed)
    assert failed.user_error
    assert "libcudart.so.99 not found" in failed.reason
    assert engine.exit_reason() == "exit code 1"


@pytest.mark.slow
def test_signals_sent_while_the_engine_starts_do_not_end_it(tmp_path: Path) -> None:
    engine = EngineProcess(EngineConfig(model=str(tmp_path / "missing.gguf"), slots=1))
    assert engine.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        os.kill(engine.pid, number)
    (failed,) = listen(engine)
    engine.close(PATIENCE_S)
    assert isinstance(failed, EngineFailed)
    assert engine.exit_reason() == "exit code 1"
