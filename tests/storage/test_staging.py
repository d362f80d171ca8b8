"""Staging with ranks as threads and nodes as folders: what is copied, what is not, and what all ranks say."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from scheduling.errors import StagingError, StoppedError
from storage.digest import Digest
from storage.relay import CHUNK_BYTES
from storage.stagedir import StageDir, candidates
from storage.stagemodel import Model, model_of, told_as_line
from storage.stagesource import SourceFiles
from storage.staging import EXCHANGE_S, Node, Staged, stage
from tests.storage.stage_fakes import FakeGroup, Ranks


@pytest.fixture(autouse=True)
def other_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is on another file system than the copies."""
    monkeypatch.setattr(StageDir, "device", property(lambda self: -1))


class Nodes:
    """Hosts 'a', 'b', … with a scratch folder each; `hosts` says on which one every rank runs."""

    def __init__(self, top: Path, hosts: str) -> None:
        self.top, self.hosts = top, hosts
        for host in set(hosts):
            self.scratch(host).mkdir(parents=True, exist_ok=True)
        self.ranks = Ranks(len(hosts))

    def scratch(self, host: str) -> Path:
        return self.top / f"node-{host}"

    def blobs(self, host: str) -> dict[str, bytes]:
        folder = self.scratch(host) / f"llmpi-{os.getuid()}" / "blobs"
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}

    def partial(self, host: str) -> list[Path]:
        return list((self.scratch(host) / f"llmpi-{os.getuid()}" / "partial").glob("*"))

    def stage(
        self, models: list[Model], mode: str = "always", mounts: str = "", stage_dir: str | None = None,
        stopped: Callable[[], None] = lambda: None,
    ) -> list[Any]:  # fmt: skip
        def body(group: FakeGroup) -> Staged:
            host = self.hosts[group.rank]
            node = Node(host, {"TMPDIR": str(self.scratch(host))}, lambda: mounts)
            return stage(group, mode, stage_dir, lambda: models, node, stopped=stopped)

        return self.ranks.run(body)

    def staged(self, models: list[Model], **more: Any) -> list[Staged]:
        came = self.stage(models, **more)
        for one in came:
            assert isinstance(one, Staged), one
        return came


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def model(paths: Sequence[Path], *, known: bool = True, role: str = "model") -> Model:
    digests = [Digest(hashlib.sha256(path.read_bytes()).hexdigest()) if known else None for path in paths]
    return model_of(role, "m", list(zip(paths, digests, strict=True)), "sha256:x" if known else None)


DATA = hashlib.sha256(b"model").digest() * 1000


@pytest.mark.parametrize("known", [True, False])
def test_every_node_gets_a_copy_and_the_source_is_read_once(tmp_path: Path, known: bool) -> None:
    nodes = Nodes(tmp_path, "aabbc")
    came = nodes.staged([model([written(tmp_path / "far" / "m.gguf", DATA)], known=known)])
    name = f"sha256-{hashlib.sha256(DATA).hexdigest()}"
    for rank, one in enumerate(came):
        path = one.models["model"].path
        assert path.read_bytes() == DATA
        assert path.is_relative_to(nodes.scratch(nodes.hosts[rank]))
    for host in "abc":
        assert nodes.blobs(host) == {name: DATA}
        assert nodes.partial(host) == []
    assert came[0].facts[0]["source_bytes_read"] == len(DATA)
    assert (came[0].facts[0]["nodes_staged"], came[0].facts[0]["reads_saved"]) == (3, 2)
    assert nodes.ranks.sent == {(0, 2): len(DATA), (2, 4): len(DATA)}  # leaders alone


@pytest.mark.parametrize("known", [True, False])
def test_nodes_that_have_it_take_no_part(tmp_path: Path, known: bool) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)], known=known)
    Nodes(tmp_path, "ab").staged([one])
    nodes = Nodes(tmp_path, "abc")
    came = nodes.staged([one])
    assert nodes.ranks.sent == {(0, 2): len(DATA)}
    assert came[0].facts[0]["nodes_staged"] == 1
    assert came[0].notes[0].endswith("; 2 nodes had it")
    again = Nodes(tmp_path, "abc")
    came = again.staged([one])
    assert again.ranks.sent == {}
    assert came[0].facts[0]["source_bytes_read"] == 0
    assert "on 3 nodes already: nothing was read" in came[2].notes[0]
    assert came[1].models["model"].path.read_bytes() == DATA


def test_a_file_that_was_changed_is_staged_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "far" / "m.gguf", DATA)
    Nodes(tmp_path, "ab").staged([model([path], known=False)])
    other = DATA[::-1]
    path.write_bytes(other)
    os.utime(path, ns=(1, 1))
    came = Nodes(tmp_path, "ab").staged([model([path], known=False)])
    assert [one.models["model"].path.read_bytes() for one in came] == [other, other]


def test_split_and_draft_models_are_staged_whole(tmp_path: Path) -> None:
    parts = [written(tmp_path / "far" / f"m-{k:05d}-of-00003.gguf", DATA + bytes([k])) for k in (1, 2, 3)]
    draft = written(tmp_path / "far" / "small.gguf", b"GGUF small")
    came = Nodes(tmp_path, "ab").staged([model(parts), model([draft], known=False, role="draft")])
    for one in came:
        first = one.models["model"].path
        assert first.name == "model-00001-of-00003.gguf"
        assert [(first.parent / f"model-{k:05d}-of-00003.gguf").read_bytes() for k in (1, 2, 3)] == [
            part.read_bytes() for part in parts
        ]
        assert one.models["draft"].path.read_bytes() == b"GGUF small"
        assert len(one.facts) == 2


def test_auto_stages_from_network_file_systems_alone(tmp_path: Path) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)])
    root = "1 0 0:1 / / rw - ext4 x rw\n"
    assert Nodes(tmp_path, "ab").staged([one], mode="auto", mounts=root)[1] == Staged()
    nfs = root + f"2 1 0:2 / {(tmp_path / 'far').resolve()} rw - nfs4 x rw\n"
    assert Nodes(tmp_path, "ab").staged([one], mode="never", mounts=nfs)[1] == Staged()
    came = Nodes(tmp_path, "ab").staged([one], mode="auto", mounts=nfs)
    assert "model" in came[0].models
    assert "model" in came[1].models


def test_auto_sees_what_an_automounter_mounts_when_the_model_is_looked_at(tmp_path: Path) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)])
    nodes, tables = Nodes(tmp_path, "a"), ["1 0 0:1 / / rw - ext4 x rw\n"]

    def look() -> list[Model]:
        tables.append(tables[0] + f"2 1 0:2 / {(tmp_path / 'far').resolve()} rw - nfs4 x rw\n")
        return [one]

    def body(group: FakeGroup) -> Staged:
        node = Node("a", {"TMPDIR": str(nodes.scratch("a"))}, lambda: tables[-1])
        return stage(group, "auto", None, look, node)

    assert "model" in nodes.ranks.run(body)[0].models


def test_auto_without_room_reads_it_where_it_is_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)])
    whole = StageDir.room_bytes
    full = Nodes(tmp_path, "abc")

    def room(self: StageDir, table: str, free: int) -> int:
        return 10 if self.folder != full.scratch("a") and self.folder != full.scratch("c") else whole(self, table, free)

    monkeypatch.setattr(StageDir, "room_bytes", room)
    monkeypatch.setattr("storage.stagedir.MEMORY_FOLDER", "")
    nfs = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {(tmp_path / 'far').resolve()} rw - nfs x rw\n"
    came = full.staged([one], mode="auto", mounts=nfs)
    assert all(not one.models for one in came)
    assert "on b: " in came[0].notes[0]
    assert "has room for 0.0 GB" in came[0].notes[0]
    assert full.ranks.sent == {}
    said = {str(error) for error in Nodes(tmp_path, "abc").stage([one]) if isinstance(error, StagingError)}
    assert len(said) == 1
    assert "cannot be staged on b: " in said.pop()


def unwritable(folder: Path) -> Path:
    """A folder for copies in which nothing can be written, not by root either: what a read-only mount is."""
    root = folder / f"llmpi-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True)
    (root / "partial").write_bytes(b"")
    return folder


def test_a_folder_that_cannot_be_written_is_passed_over_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)])
    nodes = Nodes(tmp_path, "ab")
    unwritable(nodes.scratch("b"))
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr("storage.stagedir.MEMORY_FOLDER", str(tmp_path / "memory"))
    came = nodes.staged([one])
    assert came[1].models["model"].path.is_relative_to(tmp_path / "memory")
    assert came[1].models["model"].path.read_bytes() == DATA


def test_auto_with_nowhere_to_write_reads_it_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)])
    nodes = Nodes(tmp_path, "a")
    unwritable(nodes.scratch("a"))
    monkeypatch.setattr("storage.stagedir.MEMORY_FOLDER", "")
    nfs = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {(tmp_path / 'far').resolve()} rw - nfs x rw\n"
    [came] = nodes.staged([one], mode="auto", mounts=nfs)
    assert not came.models
    assert "cannot be written: File exists; name another folder with --stage-dir" in came.notes[0]
    assert "LLMPI_HOME" not in came.notes[0]  # which is not where copies lie


def test_a_copy_in_a_folder_that_cannot_be_written_any_more_is_used(tmp_path: Path) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)])
    Nodes(tmp_path, "a").staged([one])
    partial = tmp_path / "node-a" / f"llmpi-{os.getuid()}" / "partial"
    partial.rmdir()
    partial.write_bytes(b"")
    again = Nodes(tmp_path, "a")
    [came] = again.staged([one])
    assert came.models["model"].path.read_bytes() == DATA
    assert came.facts[0]["source_bytes_read"] == 0


def test_a_folder_that_becomes_read_only_meanwhile_ends_all_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)])
    nodes, unlink = Nodes(tmp_path, "ab"), Path.unlink

    def refused(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def pwrite(fd: int, data: Any, place: int) -> int:
        monkeypatch.setattr(Path, "unlink", refused)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "pwrite", pwrite)
    came = nodes.stage([one])
    monkeypatch.setattr(Path, "unlink", unlink)
    text = all_say(came, "Read-only file system; name another folder with --stage-dir")
    assert "make room" not in text


def all_say(came: list[Any], *words: str) -> str:
    """Every rank ended with the same StagingError."""
    assert all(isinstance(one, StagingError) for one in came), came
    [text] = {str(one) for one in came}
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize("known", [True, False])
def test_wrong_bytes_on_one_node_end_all_and_name_it(tmp_path: Path, known: bool) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)], known=known)
    nodes = Nodes(tmp_path, "aabbcc")
    nodes.ranks.corrupt = lambda rank, piece: piece[:-1] + b"?" if rank == 4 and len(piece) > 1 else piece
    all_say(nodes.stage([one]), "on c (rank 4): other bytes arrived")
    assert nodes.blobs("c") == {}
    assert list(nodes.blobs("b").values()) == [DATA]  # what is right is kept
    assert nodes.partial("b") == nodes.partial("c") == []
    again = Nodes(tmp_path, "aabbcc")
    again.staged([one])
    assert again.ranks.sent == {(0, 4): len(DATA)}


def test_a_source_that_is_not_what_its_manifest_says_ends_all(tmp_path: Path) -> None:
    path = written(tmp_path / "far" / "m.gguf", DATA)
    one = model([path])
    path.write_bytes(DATA[::-1])
    nodes = Nodes(tmp_path, "abc")
    all_say(nodes.stage([one]), "on a (rank 0)", str(path), "llmpi models verify")
    assert nodes.blobs("a") == nodes.blobs("b") == nodes.blobs("c") == {}


@pytest.mark.slow
def test_a_node_that_fills_up_in_the_middle_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", bytes(2 * CHUNK_BYTES + 5))])
    nodes, real = Nodes(tmp_path, "abc"), os.pwrite

    def pwrite(fd: int, data: Any, place: int) -> int:
        if str(nodes.scratch("b")) in os.readlink(f"/proc/self/fd/{fd}") and place >= CHUNK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    all_say(nodes.stage([one]), "on b (rank 1)", "No space left on device", "--stage-dir")
    assert list(nodes.blobs("b")) == []
    assert nodes.partial("b") == []


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_a_source_that_cannot_be_read_any_more_ends_all(tmp_path: Path, harm: str) -> None:
    path = written(tmp_path / "far" / "m.gguf", DATA)
    one = model([path])
    path.unlink() if harm == "gone" else path.write_bytes(DATA[:100])
    nodes = Nodes(tmp_path, "abc")
    words = "cannot be read: No such file" if harm == "gone" else "ends at byte 100 now"
    all_say(nodes.stage([one]), "on a (rank 0)", str(path), words)
    assert all(nodes.blobs(host) == {} and nodes.partial(host) == [] for host in "abc")


def test_a_source_that_is_changed_while_it_is_read_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "far" / "m.gguf", DATA)
    one = model([path], known=False)
    read = SourceFiles.read

    def changed(self: SourceFiles, file: int, place: int, into: memoryview) -> None:
        read(self, file, place, into)
        path.write_bytes(DATA[::-1])
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(SourceFiles, "read", changed)
    nodes = Nodes(tmp_path, "abc")
    all_say(nodes.stage([one]), "on a (rank 0)", str(path), "was changed while it was read")
    assert all(nodes.blobs(host) == {} and nodes.partial(host) == [] for host in "abc")


def test_stopping_ends_all(tmp_path: Path) -> None:
    def stopped() -> None:
        raise StoppedError("SIGUSR2 received")

    came = Nodes(tmp_path, "abc").stage([model([written(tmp_path / "far" / "m.gguf", DATA)])], stopped=stopped)
    assert [type(one) for one in came] == [StoppedError] * 3


@pytest.mark.slow
def test_two_jobs_at_once_on_one_node_both_work(tmp_path: Path) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", bytes(3 * CHUNK_BYTES))])
    nodes = [Nodes(tmp_path, "ab"), Nodes(tmp_path, "ba")]
    came = Ranks(2).run(lambda group: nodes[group.rank].staged([one]))
    paths = [staged.models["model"].path for job in came for staged in job]
    assert {path.read_bytes() for path in paths} == {Path(one.files[0].path).read_bytes()}
    assert nodes[0].partial("a") == nodes[0].partial("b") == []


def test_a_copy_of_another_size_is_made_anew(tmp_path: Path) -> None:
    one = model([written(tmp_path / "far" / "m.gguf", DATA)])
    came = Nodes(tmp_path, "ab").staged([one])
    came[1].models["model"].path.write_bytes(DATA[:7])
    assert Nodes(tmp_path, "ab").staged([one])[1].models["model"].path.read_bytes() == DATA


def test_where_the_model_lies_on_the_nodes_own_disk_rank_0_needs_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "far" / "m.gguf", DATA)
    monkeypatch.setattr(StageDir, "device", property(lambda self: path.stat().st_dev))
    nodes = Nodes(tmp_path, "aab")
    came = nodes.staged([model([path])])
    assert [one.models["model"].path == path for one in came] == [True, True, False]
    assert nodes.blobs("a") == {}
    assert list(nodes.blobs("b").values()) == [DATA]
    assert came[0].facts[0]["reads_saved"] == 1
    alone = Nodes(tmp_path, "aa").staged([model([path])])
    assert (alone[0].facts[0]["nodes_direct"], alone[0].facts[0]["reads_saved"]) == (1, 0)


def test_what_cannot_be_found_is_left_to_who_opens_it(tmp_path: Path) -> None:
    def find() -> list[Model]:
        raise OSError("planted")

    def body(group: FakeGroup) -> Staged:
        return stage(group, "always", None, find, Node("a", {}))

    assert Ranks(2).run(body) == [Staged(), Staged()]


def test_ranks_with_other_options_are_left_to_the_handshake(tmp_path: Path) -> None:
    def body(group: FakeGroup) -> Staged:
        return stage(group, "always" if group.rank else "never", None, list, Node("a", {}))

    assert Ranks(3).run(body) == [Staged()] * 3


def test_folders_for_copies_in_their_order() -> None:
    named = {"SLURM_TMPDIR": "/slurm", "TMPDIR": "/tmp/x"}
    assert [str(one) for one in candidates(None, named)] == ["/slurm", "/tmp/x", "/dev/shm"]
    assert [str(one) for one in candidates(None, {"TMPDIR": "not/whole"})] == ["/dev/shm"]
    assert [str(one) for one in candidates("/given", named)] == ["/given"]


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    StageDir(tmp_path)
    (tmp_path / f"llmpi-{os.getuid()}").chmod(0o777)
    with pytest.raises(StagingError, match="only you may write"):
        StageDir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f"llmpi-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(StagingError, match="only you may write"):
        StageDir(tmp_path / "other")
    with pytest.raises(StagingError, match="is no folder"):
        StageDir(tmp_path / "gone")


def test_memory_is_not_filled_with_copies(tmp_path: Path) -> None:
    table = f"1 0 0:1 / {tmp_path.resolve()} rw - tmpfs tmpfs rw"
    assert StageDir(tmp_path).room_bytes(table, 1000) == 500
    assert StageDir(tmp_path).room_bytes("", 1000) > 500


def test_line_for_people() -> None:
    told = {
        "model": "m", "bytes": 4_200_000_000, "nodes": 5, "nodes_staged": 4, "nodes_direct": 1, "seconds": 11.2,
        "bytes_per_s": 380_000_000, "reads_saved": 3, "saved_s": 30.0,
    }  # fmt: skip
    line = "staged 4.2 GB to 4 nodes in 11.2 s (0.38 GB/s; read once, 3 reads saved, about 30.0 s)"
    assert told_as_line(told) == line
    alone = told | {"nodes": 1, "nodes_staged": 1, "nodes_direct": 0, "reads_saved": 0, "saved_s": 0.0}
    assert told_as_line(alone) == "staged 4.2 GB to 1 node in 11.2 s (0.38 GB/s; read once)"


def test_rank_0_waits_as_long_for_a_lost_rank_however_large_the_model_is(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, "aabb")
    nodes.staged([model([written(tmp_path / "shared" / "m.gguf", DATA)])])
    assert nodes.ranks.patience_s[0] == EXCHANGE_S
    # The others wait for as long as it may be sent; rank 0 ends the job if somebody does not come.
    assert all(nodes.ranks.patience_s[rank] > EXCHANGE_S for rank in (1, 2, 3))
