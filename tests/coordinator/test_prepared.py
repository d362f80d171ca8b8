"""An input is converted once a run: later sessions use what is there, and another input never takes its place."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.compressed import STDIN, stdin_for_ranks
from coordinator.convert import source_of
from coordinator.inputfile import ends_identity
from coordinator.prepared import Prepared, prepare_input, tell_files
from coordinator.rows import Columns
from coordinator.source import FileSource
from scheduling.errors import ConfigError, InputError, RunDirError
from storage.joblock import JobLock
from storage.recovery import RECORD_NAME
from storage.rundir import REQUESTS_NAME, RunDir, lock_run
from tests.storage.samples import ok_line


class Job:
    """What `llmpi batch` does with an input, without the batch."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.notes: list[str] = []

    def __call__(self, path: Path, columns: Columns | None = None) -> Prepared:
        source = source_of(path, None, columns or Columns())
        assert source is not None
        self.notes.clear()
        given = prepare_input(source, self.run_dir, strict=True, note=self.notes.append, check_stop=lambda: None)
        identity = {"input": {**ends_identity(given.path, "jsonl"), "source": given.source}}
        RunDir.create_or_resume(self.run_dir, identity, held=given.held).close()
        return given

    @property
    def requests(self) -> bytes:
        return (self.run_dir / REQUESTS_NAME).read_bytes()

    def answer_one(self) -> None:
        (self.run_dir / RECORD_NAME).write_bytes(ok_line(0))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "run")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    path.write_bytes(b"prompt,other\na,b\n")
    return path


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"a", b"c"))
    os.utime(path, ns=(1, 1))


def test_the_first_session_converts_and_says_so(job: Job, table: Path) -> None:
    job(table)
    assert job.requests == b'{"prompt":"a"}\n'
    (note,) = job.notes
    assert note.startswith(f"converted {table}: 1 request in 0.")


def test_a_later_session_uses_what_is_there(job: Job, table: Path) -> None:
    job(table)
    job.answer_one()
    written = (job.run_dir / REQUESTS_NAME).stat().st_mtime_ns
    job(table)
    assert job.notes == []
    assert (job.run_dir / REQUESTS_NAME).stat().st_mtime_ns == written


def test_another_input_is_refused_where_there_are_answers(job: Job, table: Path) -> None:
    job(table)
    job.answer_one()
    before = job.requests
    with pytest.raises(RunDirError, match=r"input\.source\.prompt_column is null there and \"other\" here"):
        job(table, Columns(prompt="other"))
    change(table)
    with pytest.raises(RunDirError, match=r"input\.source\.mtime_ns"):
        job(table)
    assert job.requests == before
    lock_run(job.run_dir).release()  # nothing stays locked


def test_another_input_takes_its_place_where_nothing_was_answered(job: Job, table: Path) -> None:
    job(table)
    change(table)
    job(table)
    assert job.requests == b'{"prompt":"c"}\n'


def test_a_file_left_by_a_session_that_died_early_is_made_anew(job: Job, table: Path) -> None:
    job.run_dir.mkdir()
    (job.run_dir / REQUESTS_NAME).write_bytes(b"of whom?\n")
    (job.run_dir / f".{REQUESTS_NAME}.tmp").write_bytes(b"half")
    job(table)
    assert job.requests == b'{"prompt":"a"}\n'


def test_a_converted_file_that_was_edited_is_refused(job: Job, table: Path) -> None:
    job(table)
    job.answer_one()
    (job.run_dir / REQUESTS_NAME).write_bytes(b'{"prompt":"z"}\n')
    with pytest.raises(RunDirError, match="ends_sha256"):
        job(table)


def test_a_converted_file_that_was_lost_is_made_again(job: Job, table: Path) -> None:
    job(table)
    job.answer_one()
    (job.run_dir / REQUESTS_NAME).unlink()
    job(table)
    assert job.requests == b'{"prompt":"a"}\n'


def test_two_jobs_do_not_convert_into_one_directory(job: Job, table: Path) -> None:
    held = lock_run(job.run_dir)
    assert isinstance(held, JobLock)
    with pytest.raises(RunDirError, match="in use by"):
        job(table)
    held.release()
    job(table)


def test_nothing_stays_locked_where_converting_fails(job: Job, table: Path) -> None:
    table.write_bytes(b"a\nb\n")
    with pytest.raises(InputError):
        job(table)
    with pytest.raises(ConfigError):
        job(table, Columns(prompt="a", template="{a}"))
    lock_run(job.run_dir).release()


# ---------------------------------------------------------------- standard input


@pytest.fixture
def stdin() -> Iterator[Stdin]:
    saved = os.dup(0)
    yield Stdin()
    os.dup2(saved, 0)
    os.close(saved)


class Stdin:
    def holds(self, content: bytes) -> None:
        read, write = os.pipe()
        os.write(write, content)
        os.close(write)
        os.dup2(read, 0)
        os.close(read)

    def is_null(self) -> None:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)


def test_standard_input_is_not_read_again(job: Job, stdin: Stdin) -> None:
    stdin.holds(b'{"prompt":"first"}\n')
    job(STDIN)
    job.answer_one()
    stdin.holds(b'{"prompt":"second"}\n')
    job(STDIN)
    assert job.requests == b'{"prompt":"first"}\n'
    assert "not read again" in job.notes[0]
    assert os.read(0, 99) == b'{"prompt":"second"}\n'


def test_where_nothing_was_answered_standard_input_is_read_if_it_has_anything(job: Job, stdin: Stdin) -> None:
    stdin.holds(b'{"prompt":"first"}\n')
    job(STDIN)
    for null in (False, True):
        if null:
            stdin.is_null()
        else:
            stdin.holds(b"")
        job(STDIN)
        assert job.requests == b'{"prompt":"first"}\n'
    stdin.holds(b'{"prompt":"second"}\n')
    job(STDIN)
    assert job.requests == b'{"prompt":"second"}\n'


def test_where_the_end_of_standard_input_is_never_told_it_is_not_read(job: Job, stdin: Stdin) -> None:
    source = source_of(STDIN, None, Columns())
    assert source is not None
    read, write = os.pipe()  # has nothing, and never ends
    os.dup2(read, 0)
    with pytest.raises(ConfigError, match="--ranks N -i -"):
        prepare_input(
            source, job.run_dir, strict=True, note=print, check_stop=lambda: None, stdin_ends=False
        )  # fmt: skip
    stdin.holds(b'{"prompt":"first"}\n')
    job(STDIN)
    os.dup2(read, 0)
    prepared = prepare_input(
        source, job.run_dir, strict=True, note=print, check_stop=lambda: None, stdin_ends=False
    )  # fmt: skip
    assert prepared.held is not None
    prepared.held.release()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("taken", [0, 3])
def test_ranks_read_the_standard_input_of_who_started_mpirun(
    job: Job, stdin: Stdin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    given = tmp_path / "given"
    given.write_bytes(b'{"prompt":"first"}\n'.rjust(19 + taken))
    number = os.open(given, os.O_RDONLY)
    os.dup2(number, 0)
    os.close(number)
    assert len(os.read(0, taken)) == taken
    ((name, value),) = stdin_for_ranks().items()
    monkeypatch.setenv(name, value)
    job(STDIN)
    assert job.requests == b'{"prompt":"first"}\n'
    stdin.holds(b'{"prompt":"second"}\n')
    monkeypatch.setenv(name, stdin_for_ranks()[name])
    job(STDIN)
    assert job.requests == b'{"prompt":"second"}\n'


def test_lost_standard_input_cannot_be_made_again(job: Job, stdin: Stdin) -> None:
    stdin.holds(b'{"prompt":"first"}\n')
    job(STDIN)
    job.answer_one()
    (job.run_dir / REQUESTS_NAME).unlink()
    with pytest.raises(RunDirError, match=r"lacks requests\.jsonl, which was made from standard input"):
        job(STDIN)


def test_an_error_in_a_converted_line_says_where_the_line_is_from(job: Job, tmp_path: Path) -> None:
    def refusal(path: Path, content: bytes, columns: Columns | None = None) -> str:
        if path != STDIN:
            path.write_bytes(content)
        given = job(path, columns)
        with pytest.raises(InputError) as refused:
            FileSource(given.path, format="jsonl", origin=given.origin)
        return str(tell_files(refused.value, given))

    table = b'custom_id,prompt\na,"x\ny"\n\nb,z\na,again\n'
    said = 'row 3: custom_id "a" is already on row 1; give each its own'
    assert refusal(tmp_path / "t.csv", table) == f"{tmp_path / 't.csv'}, {said}"
    assert refusal(tmp_path / "table", table, Columns(id="custom_id")) == f"{tmp_path / 'table'}, {said}"
    lines = gzip.compress(b'{"prompt":"a"}\n\n{"prompt":"b","nonsense":1}\n')
    assert f"{tmp_path / 'q.jsonl.gz'}, line 3: " in refusal(tmp_path / "q.jsonl.gz", lines)
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "t.csv").write_bytes(table)
    given = job(tmp_path / "several")
    with pytest.raises(InputError, match=r"requests\.jsonl, line 3: .* on line 1") as refused:
        FileSource(given.path, origin=given.origin)
    files = f"(it was made from the files in {tmp_path / 'several'}, one after another)"
    assert str(tell_files(refused.value, given)).endswith(files)


def test_an_error_on_standard_input_names_it(job: Job, stdin: Stdin) -> None:
    stdin.holds(b'{"prompt":"a"}\n{"prompt":1}\n')
    given = job(STDIN)
    with pytest.raises(InputError, match=r"^standard input, line 2: "):
        FileSource(given.path, origin=given.origin)
