"""Files from web servers that cut, stall, lie and change: whole and of one version, or refused and resumable."""

from __future__ import annotations

import itertools
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.errors import ModelSourceError
from storage.sources import WrongBytesError, pull
from tests.storage.sources.pulls import MODEL, content_of, kept_bytes, pull_from
from tests.storage.sources.site import Answer, Site, Waits, gguf, patience, redirect, sha256


@pytest.mark.parametrize("cut", [0, 3, 100_000, len(MODEL) - 1])
def test_a_cut_is_resumed_where_it_was(site: Site, scratch: Path, cut: int) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=cut)]
    assert content_of(pull_from(site, scratch)) == MODEL
    assert len(site.asked) == 2
    if cut:
        assert (site.ranges()[1] or "").startswith(f"bytes={cut}-")
        assert site.asked[1][1]["if-range"] == f'"{sha256(MODEL)[:16]}"'


def test_a_cut_in_a_body_of_unannounced_length_is_noticed_and_resumed(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(chunked=True, cut_after=4096 * 10)]
    assert content_of(pull_from(site, scratch)) == MODEL
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
        assert content_of(pull(source, Path(folder), patience=patience())) == current


def test_a_server_that_always_cuts_is_given_up_and_the_next_pull_goes_on(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.always = Answer(cut_after=20_000)
    waits = Waits()
    with pytest.raises(ModelSourceError, match="What came is kept: pull again"):
        pull(site.url(), scratch, patience=patience(waits, attempts=4))
    assert waits.seconds == [1, 2, 4]
    assert len(site.asked) == 4
    assert kept_bytes(scratch) == 80_000
    site.always = None
    assert content_of(pull_from(site, scratch)) == MODEL
    assert (site.ranges()[-1] or "").startswith("bytes=80000-")


def test_attempts_are_counted_anew_once_enough_has_come(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.always = Answer(cut_after=20_000)
    pulled = pull(site.url(), scratch, patience=patience(attempts=3, renew_bytes=20_000))
    assert content_of(pulled) == MODEL


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
    assert content_of(pull(site.url(), scratch, patience=patience(stall_s=0.3))) == MODEL
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


def test_a_head_that_drips_is_broken_off(site: Site, scratch: Path) -> None:
    def drip(handler: Any) -> bool:
        while not site.stopped.wait(0.01):
            try:
                handler.wfile.write(b"H")
            except OSError:
                break
        return True

    site.answer = drip
    with pytest.raises(ModelSourceError, match=r"nothing came for 0 s \(2 attempts\)"):
        pull(site.url(), scratch, patience=patience(stall_s=0.3, attempts=2))


def test_what_a_server_says_is_told_without_what_a_terminal_obeys(site: Site, scratch: Path) -> None:
    def say(handler: Any) -> bool:
        handler.wfile.write(b"HTTP/1.1 418 \x1b[31mred\r\n\r\n")
        return True

    site.answer = say
    with pytest.raises(ModelSourceError, match=r"answers 418 \ufffd\[31mred"):
        pull_from(site, scratch)


def test_a_redirect_whose_address_is_not_written_in_ascii_is_followed(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [redirect("/model.gguf?caf\u00e9 x"), Answer()]
    assert content_of(pull_from(site, scratch)) == MODEL
    assert site.asked[1][0] == "/model.gguf?caf%E9%20x"


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
        pull_from(site, scratch, f"/model.gguf#sha256={sha256(MODEL)}")


def test_wrong_bytes_are_refused_and_set_aside(site: Site, scratch: Path) -> None:
    other = site.files["/model.gguf"] = gguf(seed=2)
    with pytest.raises(WrongBytesError, match=f"not {sha256(MODEL)} as promised") as refused:
        pull_from(site, scratch, f"/model.gguf#sha256={sha256(MODEL)}")
    assert refused.value.path.read_bytes() == other
    assert (refused.value.promised, refused.value.actual) == (sha256(MODEL), sha256(other))
    assert kept_bytes(scratch) == 0
    assert len(site.asked) == 1


def test_a_damaged_partial_file_is_fetched_again_from_its_start(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    source = f"/model.gguf#sha256={sha256(MODEL)}"
    site.script = [Answer(cut_after=50_000), Answer(status=404)]
    with pytest.raises(ModelSourceError):
        pull_from(site, scratch, source)
    (path,) = scratch.glob("*.partial")
    path.write_bytes(b"GGUF" + bytes(49_996))
    assert content_of(pull_from(site, scratch, source)) == MODEL


def test_wrong_bytes_that_come_in_pieces_are_fetched_twice_at_most(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = gguf(seed=2)
    site.script = [Answer(cut_after=50_000), Answer(), Answer(cut_after=50_000), Answer()]
    with pytest.raises(ModelSourceError, match="as promised"):
        pull_from(site, scratch, f"/model.gguf#sha256={sha256(MODEL)}")
    assert len(site.asked) == 4


@pytest.mark.parametrize("fragment", ["sha256=12", "md5=0", "sha256=" + "g" * 64])
def test_a_promise_that_is_no_sha256_is_refused(site: Site, scratch: Path, fragment: str) -> None:
    with pytest.raises(ModelSourceError, match="64 hexadecimal digits"):
        pull_from(site, scratch, f"/model.gguf#{fragment}")


def test_a_server_that_ignores_range_starts_the_file_again(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=100_000), Answer(ranges=False)]
    assert content_of(pull_from(site, scratch)) == MODEL


def test_bytes_of_an_unnamed_version_are_not_continued(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=100_000, etag=False)]
    assert content_of(pull_from(site, scratch)) == MODEL
    assert site.ranges()[1] is None


def test_a_weak_etag_does_not_name_a_version(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=100_000, etag=False, headers=(("ETag", 'W/"1"'),))]
    assert content_of(pull_from(site, scratch)) == MODEL
    assert site.ranges()[1] is None


def test_a_date_names_a_version(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    dated = ("Last-Modified", "Sun, 29 Nov 2026 08:00:00 GMT")
    site.script = [Answer(cut_after=100_000, etag=False, headers=(dated,))]
    site.always = Answer(if_range=False, etag=False, headers=(dated,))
    assert content_of(pull_from(site, scratch)) == MODEL
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
        pull_from(site, scratch)
    site.files["/model.gguf"] = newer
    site.always = Answer(if_range=if_range)
    assert content_of(pull_from(site, scratch)) == newer


def test_a_file_that_became_shorter_is_fetched_from_its_start(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(cut_after=100_000), Answer(status=404, body=b"")]
    with pytest.raises(ModelSourceError):
        pull_from(site, scratch)
    site.files["/model.gguf"] = MODEL[:1000]
    site.always = Answer(if_range=False)
    assert content_of(pull_from(site, scratch)) == MODEL[:1000]


def test_another_range_than_asked_for_is_not_appended(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    wrong = Answer(status=206, body=MODEL[:50], headers=(("Content-Range", f"bytes 0-49/{len(MODEL)}"),))
    site.script = [Answer(cut_after=100_000), wrong]
    assert content_of(pull_from(site, scratch)) == MODEL


def test_more_bytes_than_the_file_has_are_refused(site: Site, scratch: Path) -> None:
    site.files["/model.gguf"] = MODEL
    etag = ("ETag", f'"{sha256(MODEL)[:16]}"')
    rest = (etag, ("Content-Range", f"bytes 100000-{len(MODEL) - 1}/{len(MODEL)}"))
    site.script = [Answer(cut_after=100_000), Answer(status=206, body=MODEL, headers=rest)]
    with pytest.raises(ModelSourceError, match="more bytes than it says"):
        pull_from(site, scratch)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_whole_file_is_not_sent_twice(site: Site, scratch: Path, chunked: bool) -> None:
    site.files["/model.gguf"] = MODEL
    site.script = [Answer(chunked=chunked)]
    pull_from(site, scratch)
    assert content_of(pull_from(site, scratch)) == MODEL
    assert (site.ranges()[1] or "").startswith(f"bytes={len(MODEL) - 1}-")
