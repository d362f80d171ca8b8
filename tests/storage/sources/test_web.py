"""Files from web servers that cut, stall, lie, change and redirect: whole and as promised, or refused and resumable."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.errors import ModelSourceError
from storage.files import OsDisk
from storage.sources import Pulled, discard, pull
from storage.sources.job import Job
from storage.sources.partial import Partial
from tests.launch import ROOT
from tests.storage.sources.site import Answer, Site, Waits, gguf, patience, redirect, sha256

MODEL = gguf()


def _pull(site: Site, scratch: Path, path: str = "/model.gguf", **options: object) -> Pulled:
    return pull(site.url(path), scratch, patience=patience(), **options)  # type: ignore[arg-type]


def _content(pulled: Pulled) -> bytes:
    (file,) = pulled.files
    return file.path.read_bytes()


def _kept(scratch: Path) -> int:
    """Bytes of the one partial file in scratch."""
    (path,) = scratch.glob("*.partial")
    return path.stat().st_size


def test_a_file_comes_with_its_name_and_digest_and_progress_reaches_its_size(site: Site, scratch: Path) -> None:
    site.files["/a/Some%20Model.Q4_0.gguf"] = MODEL
    said: list[tuple[int, int | None]] = []
    pulled = _pull(site, scratch, "/a/Some%20Model.Q4_0.gguf", progress=lambda done, total: said.append((done, total)))
    (file,) = pulled.files
    assert file.path.read_bytes() == MODEL
    assert (file.name, file.adopt, file.sha256, file.digest) == ("Some Model.Q4_0.gguf", False, None, sha256(MODEL))
    assert (pulled.suggested_name, pulled.licence) == ("Some Model.Q4_0", None)
    assert said[0] == (0, len(MODEL))
    assert said[-1] == (len(MODEL), len(MODEL))
    assert said == sorted(said)


def test_a_file_is_pinned_by_its_digest(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    pulled = _pull(site, scratch)
    assert pulled.source == site.url(f"/model.gguf#sha256={sha256(MODEL)}")
    site.files["/model.gguf"] = gguf(seed=2)
    with pytest.raises(ModelSourceError, match="as promised"):
        pull(pulled.source, scratch, patience=patience())


def test_what_is_read_again_of_an_earlier_pull_counts_as_progress(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    _pull(site, scratch)
    said: list[tuple[int, int | None]] = []
    _pull(site, scratch, progress=lambda done, total: said.append((done, total)))
    assert said[0] == (len(MODEL), None)


def test_discarding_leaves_nothing_of_this_source_and_all_of_others(site: Site, scratch: Path) -> None:
    site.files |= {"/model.gguf": MODEL, "/other.gguf": MODEL}
    _pull(site, scratch)
    other = _pull(site, scratch, "/other.gguf")
    discard(site.url(), scratch)
    assert other.files[0].path.exists()
    discard(site.url("/other.gguf"), scratch)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 3, 100_000, len(MODEL) - 1])
def test_a_cut_is_resumed_where_it_was(site: Site, scratch: Path, cut: int) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=cut)]
    assert _content(_pull(site, scratch)) == MODEL
    assert len(site.asked) == 2
    if cut:
        assert (site.ranges()[1] or "").startswith(f"bytes={cut}-")
        assert site.asked[1][1]["if-range"] == f'"{sha256(MODEL)[:16]}"'


def test_a_cut_in_a_body_of_unannounced_length_is_noticed_and_resumed(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(chunked=True, cut_after=4096 * 10)]
    assert _content(_pull(site, scratch)) == MODEL
    assert (site.ranges()[1] or "").startswith(f"bytes={4096 * 10}-")


@pytest.mark.slow
@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(0, 5000), max_size=4),
    kinds=st.lists(st.sampled_from(["plain", "no ranges", "no etag", "chunked", "changed"]), min_size=5, max_size=5),
    promised=st.booleans(),
)
def test_whatever_happens_on_the_way_the_file_is_the_servers_last_one(
    cuts: list[int], kinds: list[str], promised: bool
) -> None:
    with Site() as site, tempfile.TemporaryDirectory() as folder:
        versions = [gguf(5000, seed) for seed in range(len(cuts) + 1)]
        current = versions[0]
        script = [*cuts, None]
        step = itertools.count()

        def before(handler: object) -> bool:
            nonlocal current
            turn = next(step)
            kind = kinds[turn % len(kinds)]
            if kind == "changed" and not promised and turn < len(versions):
                current = versions[turn]
            site.files["/model.gguf"] = current
            site.always = Answer(
                cut_after=script[turn] if turn < len(script) else None,
                ranges=kind != "no ranges",
                etag=kind != "no etag",
                chunked=kind == "chunked",
            )
            return False

        site.answer = before
        source = site.url() + (f"#sha256={sha256(current)}" if promised else "")
        assert _content(pull(source, Path(folder), patience=patience())) == current


def test_a_server_that_always_cuts_is_given_up_and_the_next_pull_goes_on(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.always = Answer(cut_after=20_000)
    waits = Waits()
    with pytest.raises(ModelSourceError, match="What came is kept: pull again"):
        pull(site.url(), scratch, patience=patience(waits, attempts=4))
    assert waits.seconds == [1, 2, 4]
    assert len(site.asked) == 4
    assert _kept(scratch) == 80_000
    site.always = None
    assert _content(_pull(site, scratch)) == MODEL
    assert (site.ranges()[-1] or "").startswith("bytes=80000-")


def test_attempts_are_counted_anew_once_enough_has_come(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.always = Answer(cut_after=20_000)
    pulled = pull(site.url(), scratch, patience=patience(attempts=3, renew_bytes=20_000))
    assert _content(pulled) == MODEL


def test_a_server_without_ranges_that_always_cuts_does_not_go_on_for_ever(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.always = Answer(cut_after=20_000, ranges=False)
    with pytest.raises(ModelSourceError, match="the connection ended"):
        pull(site.url(), scratch, patience=patience(attempts=3, renew_bytes=20_000))
    assert len(site.asked) <= 6


@pytest.mark.slow
def test_a_stall_is_broken_off_and_resumed(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(stall_after=70_000)]
    assert _content(pull(site.url(), scratch, patience=patience(stall_s=0.3))) == MODEL
    assert (site.ranges()[1] or "").startswith("bytes=70000-")


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up(scratch: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ModelSourceError, match=r"nothing came for 0 s \(2 attempts\)"):
            pull(f"http://127.0.0.1:{port}/m.gguf", scratch, patience=patience(stall_s=0.15, attempts=2))


def test_a_body_that_drips_is_broken_off_like_a_stall(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    clock = itertools.count(0.0, 31.0)
    with pytest.raises(ModelSourceError, match="less than 1,000,000 bytes came in 30 s"):
        pull(
            site.url(),
            scratch,
            patience=patience(stall_s=30.0, slow_bytes=1_000_000, attempts=2, clock=lambda: next(clock)),
        )


def test_a_refused_connection_is_tried_a_few_times(scratch: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    waits = Waits()
    with pytest.raises(ModelSourceError, match=r"Connection refused.*3 attempts"):
        pull(f"http://127.0.0.1:{port}/m.gguf", scratch, patience=patience(waits, attempts=3))
    assert waits.seconds == [1, 2]


@pytest.mark.parametrize(
    ("code", "words", "waited"),
    [(socket.EAI_NONAME, "host is not known", []), (socket.EAI_AGAIN, "3 attempts", [1, 2])],
)
def test_an_unknown_host_is_refused_at_once_unless_the_name_service_is_down(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str, waited: list[float]
) -> None:
    def look_up(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(code, "no such luck")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    waits = Waits()
    with pytest.raises(ModelSourceError, match=words):
        pull("http://no-such-host.invalid/m.gguf", scratch, patience=patience(waits, attempts=3))
    assert waits.seconds == waited


def test_more_announced_than_sent_is_a_cut_and_never_a_whole_file(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.always = Answer(announce=len(MODEL) + 10, ranges=False)
    with pytest.raises(ModelSourceError, match="10 bytes too early"):
        pull(site.url(), scratch, patience=patience(attempts=2))


def test_less_announced_than_there_is_fails_the_promised_digest(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.always = Answer(announce=len(MODEL) - 10)
    with pytest.raises(ModelSourceError, match="as promised"):
        _pull(site, scratch, f"/model.gguf#sha256={sha256(MODEL)}")


def test_wrong_bytes_are_refused_and_thrown_away(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = gguf(seed=2)
    with pytest.raises(ModelSourceError, match=f"not {sha256(MODEL)} as promised"):
        _pull(site, scratch, f"/model.gguf#sha256={sha256(MODEL)}")
    assert _kept(scratch) == 0
    assert len(site.asked) == 1


def test_a_damaged_partial_file_is_fetched_again_from_its_start(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    source = f"/model.gguf#sha256={sha256(MODEL)}"
    site.script = [Answer(cut_after=50_000), Answer(status=404)]
    with pytest.raises(ModelSourceError):
        _pull(site, scratch, source)
    (path,) = scratch.glob("*.partial")
    path.write_bytes(b"GGUF" + bytes(49_996))
    assert _content(_pull(site, scratch, source)) == MODEL


def test_wrong_bytes_that_come_in_pieces_are_fetched_twice_at_most(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = gguf(seed=2)
    site.script = [Answer(cut_after=50_000), Answer(), Answer(cut_after=50_000), Answer()]
    with pytest.raises(ModelSourceError, match="as promised"):
        _pull(site, scratch, f"/model.gguf#sha256={sha256(MODEL)}")
    assert len(site.asked) == 4


@pytest.mark.parametrize("fragment", ["sha256=12", "md5=0", "sha256=" + "g" * 64])
def test_a_promise_that_is_no_sha256_is_refused(site: Site, scratch: Path, fragment: str) -> None:
    with pytest.raises(ModelSourceError, match="64 hexadecimal digits"):
        _pull(site, scratch, f"/model.gguf#{fragment}")


def test_a_server_that_ignores_range_starts_the_file_again(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=100_000), Answer(ranges=False)]
    assert _content(_pull(site, scratch)) == MODEL


def test_bytes_of_an_unnamed_version_are_not_continued(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=100_000, etag=False)]
    assert _content(_pull(site, scratch)) == MODEL
    assert site.ranges()[1] is None


def test_a_weak_etag_does_not_name_a_version(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=100_000, etag=False, headers=(("ETag", 'W/"1"'),))]
    assert _content(_pull(site, scratch)) == MODEL
    assert site.ranges()[1] is None


def test_a_date_names_a_version(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    dated = ("Last-Modified", "Sun, 29 Nov 2026 08:00:00 GMT")
    site.script = [Answer(cut_after=100_000, etag=False, headers=(dated,))]
    site.always = Answer(if_range=False, etag=False, headers=(dated,))
    assert _content(_pull(site, scratch)) == MODEL
    assert (site.ranges()[1] or "").startswith("bytes=100000-")
    assert site.asked[1][1]["if-range"] == dated[1]


def test_empty_answers_are_not_asked_for_ever(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    rest = (("ETag", f'"{sha256(MODEL)[:16]}"'), ("Content-Range", f"bytes 100000-{len(MODEL) - 1}/{len(MODEL)}"))
    site.script = [Answer(cut_after=100_000)]
    site.always = Answer(status=206, body=b"", headers=rest, chunked=True)
    with pytest.raises(ModelSourceError, match=r"sent nothing \(3 attempts\)"):
        pull(site.url(), scratch, patience=patience(attempts=3))


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changed_is_fetched_from_its_start(site: Site, scratch: Path, if_range: bool) -> None:
    newer = gguf(seed=2)
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=100_000), Answer(status=404, body=b"")]
    with pytest.raises(ModelSourceError):
        _pull(site, scratch)
    site.files["/model.gguf"] = newer
    site.always = Answer(if_range=if_range)
    assert _content(_pull(site, scratch)) == newer


def test_a_file_that_became_shorter_is_fetched_from_its_start(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=100_000), Answer(status=404, body=b"")]
    with pytest.raises(ModelSourceError):
        _pull(site, scratch)
    site.files["/model.gguf"] = MODEL[:1000]
    site.always = Answer(if_range=False)
    assert _content(_pull(site, scratch)) == MODEL[:1000]


def test_another_range_than_asked_for_is_not_appended(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    wrong = Answer(status=206, body=MODEL[:50], headers=(("Content-Range", f"bytes 0-49/{len(MODEL)}"),))
    site.script = [Answer(cut_after=100_000), wrong]
    assert _content(_pull(site, scratch)) == MODEL


def test_more_bytes_than_the_file_has_are_refused(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    etag = ("ETag", f'"{sha256(MODEL)[:16]}"')
    rest = (etag, ("Content-Range", f"bytes 100000-{len(MODEL) - 1}/{len(MODEL)}"))
    site.script = [Answer(cut_after=100_000), Answer(status=206, body=MODEL, headers=rest)]
    with pytest.raises(ModelSourceError, match="more bytes than it says"):
        _pull(site, scratch)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_whole_file_is_not_sent_twice(site: Site, scratch: Path, chunked: bool) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(chunked=chunked)]
    _pull(site, scratch)
    assert _content(_pull(site, scratch)) == MODEL
    assert (site.ranges()[1] or "").startswith(f"bytes={len(MODEL) - 1}-")


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "LLMPI_HTTP_TOKEN"), (403, "netrc"), (404, "is not there"), (410, "is not there"), (418, "answers 418")],
)
def test_a_refusal_is_not_tried_again(site: Site, scratch: Path, status: int, words: str) -> None:
    site.always = Answer(status=status, body=b"no")
    with pytest.raises(ModelSourceError, match=words):
        _pull(site, scratch)
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
    assert _content(pull(site.url(), scratch, patience=patience(waits))) == MODEL
    assert waits.seconds[0] == 7
    assert 50 < waits.seconds[1] <= 60
    assert waits.seconds[2] == 4


def test_a_server_that_asks_for_an_hour_is_not_waited_for(site: Site, scratch: Path) -> None:
    site.always = Answer(status=429, body=b"", headers=(("Retry-After", "3600"),))
    with pytest.raises(ModelSourceError, match="left alone for 3600 s"):
        _pull(site, scratch)


def test_a_file_over_the_limit_is_refused_before_it_comes(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    with pytest.raises(ModelSourceError, match=r"300,000 bytes, over the limit of 299,999"):
        _pull(site, scratch, max_bytes=len(MODEL) - 1)
    assert _kept(scratch) == 0
    assert _content(_pull(site, scratch, max_bytes=len(MODEL))) == MODEL


def test_an_unannounced_file_over_the_limit_is_broken_off_and_thrown_away(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.always = Answer(chunked=True)
    with pytest.raises(ModelSourceError, match="more than 100,000 bytes"):
        _pull(site, scratch, max_bytes=100_000)
    assert _kept(scratch) == 0


def test_an_endless_body_ends_at_the_limit(site: Site, scratch: Path) -> None:
    site.always = Answer(status=200, body=MODEL, endless=True)
    with pytest.raises(ModelSourceError, match="more than 1,000,000 bytes"):
        _pull(site, scratch, max_bytes=1_000_000)
    assert _kept(scratch) == 0


def test_an_endless_body_leaves_room_on_the_disk(site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Partial, "space_bytes", lambda self: 1_000_000)
    site.always = Answer(status=200, body=MODEL, endless=True)
    with pytest.raises(ModelSourceError, match="more than 900,000 bytes"):
        _pull(site, scratch)


def test_what_does_not_fit_on_the_disk_is_refused_before_it_comes(
    site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["/model.gguf"] = MODEL
    monkeypatch.setattr(Partial, "space_bytes", lambda self: 1000)
    with pytest.raises(ModelSourceError, match="needs 300,000 bytes more"):
        _pull(site, scratch)


def test_a_full_disk_is_one_clear_line(site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Partial, block: bytes, what: str) -> None:
        raise OSError(28, "No space left on device")

    site.files["/model.gguf"] = MODEL
    monkeypatch.setattr(Partial, "write", full)
    with pytest.raises(ModelSourceError, match="no space is left"):
        _pull(site, scratch)


def test_a_login_page_is_refused(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = b"<!doctype html><title>Sign in</title>" + bytes(100_000)
    with pytest.raises(ModelSourceError, match="looks like a web page"):
        _pull(site, scratch)
    assert _kept(scratch) == 0


@pytest.mark.parametrize("content", [b"", b"GG"])
def test_a_file_too_short_to_be_a_model_is_refused(site: Site, scratch: Path, content: bytes) -> None:
    site.files["/model.gguf"] = content
    with pytest.raises(ModelSourceError, match="is no GGUF file"):
        _pull(site, scratch)


def test_a_compressed_answer_is_refused(site: Site, scratch: Path) -> None:
    site.always = Answer(status=200, body=MODEL, headers=(("Content-Encoding", "gzip"),))
    with pytest.raises(ModelSourceError, match="sent compressed"):
        _pull(site, scratch)


def test_offline_asks_for_nothing(site: Site, scratch: Path) -> None:
    with pytest.raises(ModelSourceError, match="this pull is offline"):
        _pull(site, scratch, offline=True)
    assert site.asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(site: Site, other_site: Site, scratch: Path, status: int) -> None:
    other_site.files["/there.gguf"] = MODEL
    site.script = [redirect("/moved.gguf", status), redirect(other_site.url("/there.gguf"), status)]
    pulled = _pull(site, scratch)
    assert _content(pulled) == MODEL
    assert pulled.files[0].name == "model.gguf"


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://localhost/m", "data:,x", "", "http://h:x/"])
def test_redirects_to_what_is_no_web_address_are_refused(site: Site, scratch: Path, where: str) -> None:
    site.always = redirect(where)
    with pytest.raises(ModelSourceError, match="which is not followed"):
        _pull(site, scratch)
    assert len(site.asked) == 1


def test_a_loop_of_redirects_ends(site: Site, scratch: Path) -> None:
    site.always = redirect("/model.gguf")
    with pytest.raises(ModelSourceError, match="more than 5 times"):
        _pull(site, scratch)
    assert len(site.asked) == 6


def test_each_attempt_begins_at_the_source(site: Site, other_site: Site, scratch: Path) -> None:
    # Where it leads may be valid for minutes only.
    site.always = redirect(other_site.url("/x"))
    other_site.files["/x"] = MODEL
    other_site.script = [Answer(cut_after=100_000)]
    assert _content(_pull(site, scratch)) == MODEL
    assert (len(site.asked), len(other_site.asked)) == (2, 2)


def _parts(site: Site) -> list[bytes]:
    parts = [gguf(40_000 + number, number) for number in range(1, 4)]
    site.files |= {f"/m-{number:05d}-of-00003.gguf": part for number, part in enumerate(parts, 1)}
    return parts


def test_all_parts_of_a_split_model_come_in_order(site: Site, scratch: Path) -> None:
    parts = _parts(site)
    pulled = _pull(site, scratch, "/m-00002-of-00003.gguf")
    assert [file.path.read_bytes() for file in pulled.files] == parts
    assert [file.name for file in pulled.files] == [f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    assert pulled.suggested_name == "m"


def test_parts_that_are_there_are_not_sent_again(site: Site, scratch: Path) -> None:
    parts = _parts(site)
    site.script = [Answer(), Answer(cut_after=10_000), Answer(status=404, body=b"")]
    with pytest.raises(ModelSourceError, match="00002-of-00003"):
        _pull(site, scratch, "/m-00001-of-00003.gguf")
    site.asked.clear()
    pulled = _pull(site, scratch, "/m-00001-of-00003.gguf")
    assert [file.path.read_bytes() for file in pulled.files] == parts
    starts = [int((ranges or "bytes=0-").removeprefix("bytes=").split("-")[0]) for ranges in site.ranges()]
    assert starts == [len(parts[0]) - 1, 10_000, 0]


def test_the_limit_is_for_all_parts_together(site: Site, scratch: Path) -> None:
    _parts(site)
    with pytest.raises(ModelSourceError, match="over the limit"):
        _pull(site, scratch, "/m-00001-of-00003.gguf", max_bytes=100_000)


def test_ctrl_c_leaves_what_came_and_no_lock(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL

    def interrupt(done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _pull(site, scratch, progress=interrupt)
    kept = _kept(scratch)
    assert kept > 0
    assert _content(_pull(site, scratch)) == MODEL
    assert (site.ranges()[1] or "").startswith(f"bytes={kept}-")


def test_two_pulls_of_one_source_at_once_are_refused(site: Site, scratch: Path) -> None:
    scratch.mkdir()
    lock = OsDisk().try_lock(Job(site.url(), scratch).lock_path)
    assert lock is not None
    with pytest.raises(ModelSourceError, match="being pulled by another process"):
        _pull(site, scratch)
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
    pulled = _pull(site, scratch, "/model.gguf?X-Amz-Signature=abcd&download=true&token=efgh")
    pinned = site.url(f"/model.gguf?X-Amz-Signature=…&download=true&token=…#sha256={sha256(MODEL)}")
    assert pulled.source == pinned
    site.always = Answer(status=403, body=b"")
    with pytest.raises(ModelSourceError) as caught:
        _pull(site, scratch, "/model.gguf?X-Amz-Signature=abcd")
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
        assert process.wait(10) == 7
    finally:
        process.kill()
        process.wait()
        process.stdout and process.stdout.close()
    assert _content(_pull(site, scratch)) == MODEL
    assert (site.ranges()[1] or "").startswith("bytes=120000-")
