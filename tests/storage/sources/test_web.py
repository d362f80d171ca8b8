"""Files from web servers that refuse, redirect and never end: as promised and within their limits, or refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from scheduling.errors import ModelSourceError
from storage.files import OsDisk
from storage.sources import discard, pull
from storage.sources.job import Job
from storage.sources.partial import Partial
from tests.launch import ROOT
from tests.storage.sources.pulls import MODEL, content_of, kept_bytes, pull_from
from tests.storage.sources.site import STALL_S, Answer, Site, Waits, gguf, patience, redirect, sha256


def test_a_file_comes_with_its_name_and_digest_and_progress_reaches_its_size(site: Site, scratch: Path) -> None:
    site.files["/a/Some%20Model.Q4_0.gguf"] = MODEL
    said: list[tuple[int, int | None]] = []
    pulled = pull_from(
        site, scratch, "/a/Some%20Model.Q4_0.gguf", progress=lambda done, total: said.append((done, total))
    )
    (file,) = pulled.files
    assert file.path.read_bytes() == MODEL
    assert (file.name, file.adopt, file.sha256, file.digest) == ("Some Model.Q4_0.gguf", False, None, sha256(MODEL))
    assert (pulled.suggested_name, pulled.licence) == ("Some Model.Q4_0", None)
    assert said[0] == (0, len(MODEL))
    assert said[-1] == (len(MODEL), len(MODEL))
    assert said == sorted(said)


def test_a_file_is_pinned_by_its_digest(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    pulled = pull_from(site, scratch)
    assert pulled.source == site.url(f"/model.gguf#sha256={sha256(MODEL)}")
    site.files["/model.gguf"] = gguf(seed=2)
    with pytest.raises(ModelSourceError, match="as promised"):
        pull(pulled.source, scratch, patience=patience())


def test_what_is_read_again_of_an_earlier_pull_counts_as_progress(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    pull_from(site, scratch)
    said: list[tuple[int, int | None]] = []
    pull_from(site, scratch, progress=lambda done, total: said.append((done, total)))
    assert said[0] == (len(MODEL), None)


def test_discarding_leaves_nothing_of_this_source_and_all_of_others(site: Site, scratch: Path) -> None:
    site.files |= {"/model.gguf": MODEL, "/other.gguf": MODEL}
    pull_from(site, scratch)
    other = pull_from(site, scratch, "/other.gguf")
    discard(site.url(), scratch)
    assert other.files[0].path.exists()
    discard(site.url("/other.gguf"), scratch)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "LLMPI_HTTP_TOKEN"), (403, "netrc"), (404, "is not there"), (410, "is not there"), (418, "answers 418")],
)
def test_a_refusal_is_not_tried_again(site: Site, scratch: Path, status: int, words: str) -> None:
    site.always = Answer(status=status, body=b"no")
    with pytest.raises(ModelSourceError, match=words):
        pull_from(site, scratch)
    assert len(site.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_an_overloaded_server_is_tried_again_after_the_time_it_asks_for(site: Site, scratch: Path, status: int) -> None:
    site.files["/model.gguf"] = MODEL
    later = formatdate(time.time() + 60, usegmt=True)
    site.script = [
        Answer(status=status, body=b"", headers=(("Retry-After", "7"),)),
        Answer(status=status, body=b"", headers=(("Retry-After", later),)),
        Answer(status=status, body=b"", headers=(("Retry-After", "soon"),)),
    ]
    waits = Waits()
    assert content_of(pull(site.url(), scratch, patience=patience(waits))) == MODEL
    assert waits.seconds[0] == 7
    assert 50 < waits.seconds[1] <= 60
    assert waits.seconds[2] == 4


def test_a_server_that_asks_for_an_hour_is_not_waited_for(site: Site, scratch: Path) -> None:
    site.always = Answer(status=429, body=b"", headers=(("Retry-After", "3600"),))
    with pytest.raises(ModelSourceError, match="left alone for 3600 s"):
        pull_from(site, scratch)


def test_a_file_over_the_limit_is_refused_before_it_comes(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    with pytest.raises(ModelSourceError, match=r"300,000 bytes, over the limit of 299,999"):
        pull_from(site, scratch, max_bytes=len(MODEL) - 1)
    assert kept_bytes(scratch) == 0
    assert content_of(pull_from(site, scratch, max_bytes=len(MODEL))) == MODEL


def test_an_unannounced_file_over_the_limit_is_broken_off_and_thrown_away(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.always = Answer(chunked=True)
    with pytest.raises(ModelSourceError, match="more than 100,000 bytes"):
        pull_from(site, scratch, max_bytes=100_000)
    assert kept_bytes(scratch) == 0


def test_an_endless_body_ends_at_the_limit(site: Site, scratch: Path) -> None:
    site.always = Answer(status=200, body=MODEL, endless=True)
    with pytest.raises(ModelSourceError, match="more than 1,000,000 bytes"):
        pull_from(site, scratch, max_bytes=1_000_000)
    assert kept_bytes(scratch) == 0


def test_an_endless_body_leaves_room_on_the_disk(site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Partial, "space_bytes", lambda self: 1_000_000)
    site.always = Answer(status=200, body=MODEL, endless=True)
    with pytest.raises(ModelSourceError, match="more than 900,000 bytes"):
        pull_from(site, scratch)


def test_what_does_not_fit_on_the_disk_is_refused_before_it_comes(
    site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["/model.gguf"] = MODEL
    monkeypatch.setattr(Partial, "space_bytes", lambda self: 1000)
    with pytest.raises(ModelSourceError, match="needs 300,000 bytes more"):
        pull_from(site, scratch)


def test_a_full_disk_is_one_clear_line(site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Partial, block: bytes, what: str) -> None:
        raise OSError(28, "No space left on device")

    site.files["/model.gguf"] = MODEL
    monkeypatch.setattr(Partial, "write", full)
    with pytest.raises(ModelSourceError, match="no space is left"):
        pull_from(site, scratch)


def test_a_login_page_is_refused(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = b"<!doctype html><title>Sign in</title>" + bytes(100_000)
    with pytest.raises(ModelSourceError, match="looks like a web page"):
        pull_from(site, scratch)
    assert kept_bytes(scratch) == 0


@pytest.mark.parametrize("content", [b"", b"GG"])
def test_a_file_too_short_to_be_a_model_is_refused(site: Site, scratch: Path, content: bytes) -> None:
    site.files["/model.gguf"] = content
    with pytest.raises(ModelSourceError, match="is no GGUF file"):
        pull_from(site, scratch)


def test_a_compressed_answer_is_refused(site: Site, scratch: Path) -> None:
    site.always = Answer(status=200, body=MODEL, headers=(("Content-Encoding", "gzip"),))
    with pytest.raises(ModelSourceError, match="sent compressed"):
        pull_from(site, scratch)


def test_offline_asks_for_nothing(site: Site, scratch: Path) -> None:
    with pytest.raises(ModelSourceError, match="this pull is offline"):
        pull_from(site, scratch, offline=True)
    assert site.asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(site: Site, other_site: Site, scratch: Path, status: int) -> None:
    other_site.files["/there.gguf"] = MODEL
    site.script = [redirect("/moved.gguf", status), redirect(other_site.url("/there.gguf"), status)]
    pulled = pull_from(site, scratch)
    assert content_of(pulled) == MODEL
    assert pulled.files[0].name == "model.gguf"


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://localhost/m", "data:,x", "", "http://h:x/"])
def test_redirects_to_what_is_no_web_address_are_refused(site: Site, scratch: Path, where: str) -> None:
    site.always = redirect(where)
    with pytest.raises(ModelSourceError, match="which is not followed"):
        pull_from(site, scratch)
    assert len(site.asked) == 1


def test_a_loop_of_redirects_ends(site: Site, scratch: Path) -> None:
    site.always = redirect("/model.gguf")
    with pytest.raises(ModelSourceError, match="more than 5 times"):
        pull_from(site, scratch)
    assert len(site.asked) == 6


def test_each_attempt_begins_at_the_source(site: Site, other_site: Site, scratch: Path) -> None:
    # Where it leads may be valid for minutes only.
    site.always = redirect(other_site.url("/x"))
    other_site.files["/x"] = MODEL
    other_site.script = [Answer(cut_after=100_000)]
    assert content_of(pull_from(site, scratch)) == MODEL
    assert (len(site.asked), len(other_site.asked)) == (2, 2)


def _parts(site: Site) -> list[bytes]:
    parts = [gguf(40_000 + number, number) for number in range(1, 4)]
    site.files |= {f"/m-{number:05d}-of-00003.gguf": part for number, part in enumerate(parts, 1)}
    return parts


def test_all_parts_of_a_split_model_come_in_order(site: Site, scratch: Path) -> None:
    parts = _parts(site)
    pulled = pull_from(site, scratch, "/m-00002-of-00003.gguf")
    assert [file.path.read_bytes() for file in pulled.files] == parts
    assert [file.name for file in pulled.files] == [f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    assert pulled.suggested_name == "m"


def test_parts_that_are_there_are_not_sent_again(site: Site, scratch: Path) -> None:
    parts = _parts(site)
    site.script = [Answer(), Answer(cut_after=10_000), Answer(status=404, body=b"")]
    with pytest.raises(ModelSourceError, match="00002-of-00003"):
        pull_from(site, scratch, "/m-00001-of-00003.gguf")
    site.asked.clear()
    pulled = pull_from(site, scratch, "/m-00001-of-00003.gguf")
    assert [file.path.read_bytes() for file in pulled.files] == parts
    starts = [int((ranges or "bytes=0-").removeprefix("bytes=").split("-")[0]) for ranges in site.ranges()]
    assert starts == [len(parts[0]) - 1, 10_000, 0]


def test_the_limit_is_for_all_parts_together(site: Site, scratch: Path) -> None:
    _parts(site)
    with pytest.raises(ModelSourceError, match="over the limit"):
        pull_from(site, scratch, "/m-00001-of-00003.gguf", max_bytes=100_000)


def test_ctrl_c_leaves_what_came_and_no_lock(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL

    def interrupt(done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_from(site, scratch, progress=interrupt)
    kept = kept_bytes(scratch)
    assert kept > 0
    assert content_of(pull_from(site, scratch)) == MODEL
    assert (site.ranges()[1] or "").startswith(f"bytes={kept}-")


def test_two_pulls_of_one_source_at_once_are_refused(site: Site, scratch: Path) -> None:
    scratch.mkdir()
    lock = OsDisk().try_lock(Job(site.url(), scratch).lock_path)
    assert lock is not None
    with pytest.raises(ModelSourceError, match="being pulled by another process"):
        pull_from(site, scratch)
    discard(site.url(), scratch)
    assert len(list(scratch.iterdir())) == 1
    lock.release()


@pytest.mark.parametrize(
    "source", ["https://", "https:///x.gguf", "https://host", "https://host/", "http://host:port/x", "http://[::1/x"]
)
def test_addresses_without_host_or_file_are_refused(scratch: Path, source: str) -> None:
    with pytest.raises(ModelSourceError, match=r"names no file|is no web address"):
        pull(source, scratch, patience=patience())


def test_a_login_in_the_address_is_refused_without_being_repeated(scratch: Path) -> None:
    with pytest.raises(ModelSourceError, match="netrc") as caught:
        pull("https://me:hunter2@host/x.gguf", scratch, patience=patience())
    assert "hunter2" not in str(caught.value)


def test_signatures_are_neither_recorded_nor_printed(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    pulled = pull_from(site, scratch, "/model.gguf?X-Amz-Signature=abcd&download=true&token=efgh")
    pinned = site.url(f"/model.gguf?X-Amz-Signature=…&download=true&token=…#sha256={sha256(MODEL)}")
    assert pulled.source == pinned
    site.always = Answer(status=403, body=b"")
    with pytest.raises(ModelSourceError) as caught:
        pull_from(site, scratch, "/model.gguf?X-Amz-Signature=abcd")
    assert "abcd" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.system
def test_an_interrupted_process_ends_at_once_and_the_next_one_goes_on(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(stall_after=120_000)]
    program = (
        "import signal, sys; from pathlib import Path; from storage.sources import pull\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever started the tests may ignore it
        "try: pull(sys.argv[1], Path(sys.argv[2]), progress=lambda done, total: print(done, flush=True))\n"
        "except KeyboardInterrupt: sys.exit(7)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, site.url(), str(scratch)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        assert any(line.strip() == "120000" for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(STALL_S / 2) == 7
    finally:
        process.kill()
        process.wait()
        process.stdout and process.stdout.close()
    assert content_of(pull_from(site, scratch)) == MODEL
    assert (site.ranges()[1] or "").startswith("bytes=120000-")
