"""The Hugging Face hub, with the real huggingface_hub against a small hub on loopback, and its cache."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from scheduling.errors import ModelSourceError
from storage.sources import Pulled, pull
from storage.sources import hub as hub_source
from storage.sources.hub import cache_folder
from tests.storage.sources.site import Answer, Site, Waits, gguf, patience, redirect, sha256

pytest.importorskip("huggingface_hub.hf_api", reason="huggingface_hub (extra: hub) asks the hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/A-Model-GGUF"
MODEL = gguf()


class Hub:
    """A repository on `site`, whose files lie on `store` as those of the hub lie on a content network."""

    def __init__(self, site: Site, store: Site) -> None:
        self.site, self.store = site, store
        self.files: dict[str, bytes] = {}
        self.changes: dict[str, Any] = {}
        self.refusal: Answer | None = None
        self.broken = 0
        site.answer = self._answer

    def _answer(self, handler: Any) -> bool:
        path = handler.path.partition("?")[0]
        if self.broken:
            self.broken -= 1
            handler.send(503, b"", [])
        elif path.startswith("/api/"):
            if self.refusal is not None:
                handler.send(self.refusal.status, b"{}", list(self.refusal.headers))
            elif path not in (f"/api/models/{REPO}/revision/main", f"/api/models/{REPO}/revision/{COMMIT}"):
                handler.send(404, b"{}", [("X-Error-Code", "RevisionNotFound")])
            else:
                handler.send(200, json.dumps(self._info()).encode(), [("Content-Type", "application/json")])
        else:
            handler.send(302, b"", [("Location", self.store.url(path.removeprefix(f"/{REPO}/resolve/{COMMIT}")))])
        return True

    def _info(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": len(data), "lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 1}}
            for name, data in self.files.items()
        ]
        siblings.append({"rfilename": "README.md", "size": 5})
        tags = ["gguf", "license:apache-2.0"]
        return {"id": REPO, "modelId": REPO, "sha": COMMIT, "tags": tags, "siblings": siblings, **self.changes}

    def hold(self, **files: bytes) -> None:
        """Keys are file names with `__` for a slash, without `.gguf`."""
        for key, data in files.items():
            name = key.replace("__", "/") + ".gguf"
            self.files[name] = data
            self.store.files[f"/{name}"] = data


@pytest.fixture
def hub(site: Site, other_site: Site, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_ENDPOINT", site.root)
    return Hub(site, other_site)


def _pull(scratch: Path, source: str = f"hf:{REPO}", waits: Waits | None = None, **options: Any) -> Pulled:
    return pull(source, scratch, patience=patience(waits, attempts=3), **options)


def _cache(home: Path, files: dict[str, bytes], revision: str | None = "main") -> Path:
    """A cache as huggingface_hub lays it out. Returns the snapshot's folder."""
    repo = home / ".cache" / "huggingface" / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir(parents=True)
    for name, data in files.items():
        blob, link = repo / "blobs" / sha256(data), snapshot / name
        blob.write_bytes(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if revision is not None:
        (repo / "refs").mkdir()
        (repo / "refs" / revision).write_text(COMMIT)
    return snapshot


def test_the_only_model_is_taken_and_pinned_to_the_commit(hub: Hub, scratch: Path) -> None:
    hub.hold(a__model_Q4=MODEL, mmproj_f16=gguf(seed=3))
    said: list[tuple[int, int | None]] = []
    pulled = _pull(scratch, progress=lambda done, total: said.append((done, total)))
    (file,) = pulled.files
    assert file.path.read_bytes() == MODEL
    assert (file.name, file.adopt, file.sha256, file.digest) == ("model_Q4.gguf", False, sha256(MODEL), sha256(MODEL))
    assert pulled.source == f"hf:{REPO}@{COMMIT}:a/model_Q4.gguf"
    assert (pulled.licence, pulled.suggested_name) == ("apache-2.0", "model_Q4")
    assert said[-1] == (len(MODEL), len(MODEL))
    assert _pull(scratch, pulled.source).files[0].path.read_bytes() == MODEL


def test_several_models_are_listed_and_one_must_be_named(hub: Hub, scratch: Path) -> None:
    hub.hold(m_Q4_K_M=MODEL, m_Q8_0=gguf(seed=2))
    with pytest.raises(ModelSourceError, match=r"2 models. Name one as hf:.*:FILE: m_Q4_K_M.gguf, m_Q8_0.gguf"):
        _pull(scratch)
    with pytest.raises(ModelSourceError, match=r"no file 'm_Q5.gguf'. There are: m_Q4_K_M.gguf"):
        _pull(scratch, f"hf:{REPO}:m_Q5.gguf")
    assert _pull(scratch, f"hf:{REPO}:m_Q8_0.gguf").files[0].name == "m_Q8_0.gguf"
    assert _pull(scratch, f"hf:{REPO}:q4_k_m").source.endswith(":m_Q4_K_M.gguf")


def test_a_model_among_very_many_other_files_is_found(hub: Hub, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_source, "_FILES_MAX", 3)
    hub.hold(z=MODEL)
    of_model = hub._info()["siblings"][0]
    hub.changes = {"siblings": [*({"rfilename": f"{k}.txt", "size": 1} for k in range(10)), of_model]}
    assert _pull(scratch).source.endswith(":z.gguf")


def test_a_repository_without_gguf_says_so(hub: Hub, scratch: Path) -> None:
    with pytest.raises(ModelSourceError, match="has no GGUF file"):
        _pull(scratch)


def test_all_parts_come_in_order_and_a_missing_one_is_named(hub: Hub, scratch: Path) -> None:
    parts = {f"Q4__m-{number:05d}-of-00002": gguf(1000 + number, number) for number in (2, 1)}
    hub.hold(**parts)
    pulled = _pull(scratch)
    assert [file.name for file in pulled.files] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert [len(file.path.read_bytes()) for file in pulled.files] == [1001, 1002]
    assert pulled.suggested_name == "m"
    del hub.files["Q4/m-00001-of-00002.gguf"]
    with pytest.raises(ModelSourceError, match=r"lacks 1 of 2 parts of a model, the first Q4/m-00001-of-00002.gguf"):
        _pull(scratch)


def test_a_cut_is_resumed_by_the_next_pull_and_what_is_whole_is_not_asked_for(hub: Hub, scratch: Path) -> None:
    hub.hold(m=MODEL)
    hub.store.script = [Answer(cut_after=100_000, etag=False), Answer(status=404, body=b"")]
    with pytest.raises(ModelSourceError):
        _pull(scratch)
    assert _pull(scratch).files[0].path.read_bytes() == MODEL
    assert (hub.store.ranges()[-1] or "").startswith("bytes=100000-")
    asked = len(hub.store.asked)
    assert _pull(scratch).files[0].path.read_bytes() == MODEL
    assert len(hub.store.asked) == asked


def test_a_large_file_comes_in_pieces(hub: Hub, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.sources.hub.PIECE_BYTES", 100_000)
    hub.hold(m=MODEL)
    assert _pull(scratch).files[0].path.read_bytes() == MODEL
    assert hub.store.ranges() == ["bytes=0-99999", "bytes=100000-199999", "bytes=200000-299999"]


def test_the_token_goes_to_the_hub_and_not_to_its_content_network(
    hub: Hub, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.hold(m=MODEL)
    _pull(scratch)
    assert {headers.get("authorization") for _, headers in hub.site.asked} == {"Bearer hf_secret"}
    assert {headers.get("authorization") for _, headers in hub.store.asked} == {None}


def test_other_bytes_than_the_hub_lists_are_refused(hub: Hub, scratch: Path) -> None:
    hub.hold(m=MODEL)
    hub.store.files["/m.gguf"] = gguf(seed=2)
    with pytest.raises(ModelSourceError, match="as promised: refused"):
        _pull(scratch)
    hub.store.files["/m.gguf"] = MODEL + b"more"
    with pytest.raises(ModelSourceError, match=r"300,004 bytes, not 300,000 as promised"):
        _pull(scratch)


def test_a_small_file_without_a_listed_digest_must_have_the_listed_size(hub: Hub, scratch: Path) -> None:
    hub.files["m.gguf"] = MODEL
    hub.store.files["/m.gguf"] = MODEL[:-1]
    hub.store.always = Answer(chunked=True)
    hub.changes = {"siblings": [{"rfilename": "m.gguf", "size": len(MODEL)}]}
    with pytest.raises(ModelSourceError, match=r"299,999 bytes, not 300,000 as promised"):
        _pull(scratch)
    hub.store.files["/m.gguf"] = MODEL
    (file,) = _pull(scratch).files
    assert (file.sha256, file.digest) == (None, sha256(MODEL))


def test_a_model_over_the_limit_is_refused_before_it_comes(hub: Hub, scratch: Path) -> None:
    hub.hold(m=MODEL)
    with pytest.raises(ModelSourceError, match="over the limit"):
        _pull(scratch, max_bytes=1000)
    assert hub.store.asked == []


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "is gated. Set HF_TOKEN .* accept the terms"),
        (404, "RepoNotFound", "is not there, or is private"),
        (401, "RepoNotFound", "is not there, or is private"),
        (404, "RevisionNotFound", "has no revision"),
        (403, "", "the hub answers 403. Set HF_TOKEN"),
        (400, "", "the hub answers 400"),
    ],
)
def test_what_the_hub_refuses_is_not_tried_again(hub: Hub, scratch: Path, status: int, code: str, words: str) -> None:
    hub.refusal = Answer(status=status, headers=(("X-Error-Code", code),) if code else ())
    waits = Waits()
    with pytest.raises(ModelSourceError, match=words):
        _pull(scratch, waits=waits)
    assert waits.seconds == []


def test_a_hub_that_is_overloaded_is_asked_again(hub: Hub, scratch: Path) -> None:
    hub.hold(m=MODEL)
    hub.broken = 2
    waits = Waits()
    assert _pull(scratch, waits=waits).files[0].path.read_bytes() == MODEL
    assert waits.seconds == [1, 2]
    hub.refusal = Answer(status=429, headers=(("Retry-After", "900"),))
    with pytest.raises(ModelSourceError, match="left alone for 900 s"):
        _pull(scratch)
    hub.broken = 100
    with pytest.raises(ModelSourceError, match=r"answers 503 \(3 attempts\)"):
        _pull(scratch)


def test_a_hub_that_is_not_there_is_given_up(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelSourceError, match=r"cannot be asked \(Connect.*3 attempts"):
        _pull(scratch)


@pytest.mark.parametrize("changes", [{"sha": None}, {"sha": "../../etc"}])
def test_a_hub_that_names_no_commit_is_refused(hub: Hub, scratch: Path, changes: dict[str, Any]) -> None:
    hub.changes = changes
    with pytest.raises(ModelSourceError, match="names no commit"):
        _pull(scratch)


def test_a_listed_path_that_climbs_is_refused(hub: Hub, scratch: Path) -> None:
    hub.files["../../evil.gguf"] = MODEL
    with pytest.raises(ModelSourceError, match="no path below it"):
        _pull(scratch)


def test_what_the_cache_has_is_adopted_and_only_the_rest_fetched(hub: Hub, scratch: Path, home: Path) -> None:
    parts = {f"m-{number:05d}-of-00002": gguf(1000 + number, number) for number in (1, 2)}
    hub.hold(**parts)
    snapshot = _cache(home, {"m-00001-of-00002.gguf": parts["m-00001-of-00002"]})
    first, second = _pull(scratch).files
    assert (first.adopt, second.adopt) == (True, False)
    assert first.path == (snapshot / "m-00001-of-00002.gguf").resolve()
    assert first.sha256 == sha256(parts["m-00001-of-00002"])
    assert [path for path, _ in hub.store.asked] == ["/m-00002-of-00002.gguf"]


def test_a_truncated_file_of_the_cache_is_fetched_instead(hub: Hub, scratch: Path, home: Path) -> None:
    hub.hold(m=MODEL)
    snapshot = _cache(home, {"m.gguf": MODEL})
    (snapshot / "m.gguf").resolve().write_bytes(MODEL[:100])
    (file,) = _pull(scratch).files
    assert not file.adopt
    assert file.path.read_bytes() == MODEL


def test_a_file_of_the_cache_with_another_digest_is_fetched_instead(hub: Hub, scratch: Path, home: Path) -> None:
    hub.hold(m=MODEL)
    _cache(home, {"m.gguf": gguf(seed=2)})
    assert _pull(scratch).files[0].path.read_bytes() == MODEL


def test_a_commit_that_the_cache_has_needs_no_hub(hub: Hub, scratch: Path, home: Path) -> None:
    _cache(home, {"m.gguf": MODEL}, revision=None)
    pulled = _pull(scratch, f"hf:{REPO}@{COMMIT}:m.gguf")
    assert pulled.files[0].adopt
    assert hub.site.asked == []


@pytest.mark.parametrize("how", ["argument", "HF_HUB_OFFLINE"])
def test_offline_takes_the_cache_and_says_so(
    hub: Hub, scratch: Path, home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    snapshot = _cache(home, {"sub/m.gguf": MODEL})
    if how != "argument":
        monkeypatch.setenv(how, "1")
    pulled = _pull(scratch, offline=how == "argument")
    (file,) = pulled.files
    assert (file.adopt, file.name, file.sha256) == (True, "m.gguf", sha256(MODEL))
    assert file.path == (snapshot / "sub/m.gguf").resolve()
    assert not file.path.is_symlink()
    assert pulled.source == f"hf:{REPO}@{COMMIT}:sub/m.gguf"
    assert "the hub was not asked" in pulled.notes[0]
    assert hub.site.asked == []


def test_offline_without_a_cache_says_what_is_missing(scratch: Path, home: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"has nothing of it.*Pull it once with the network"):
        _pull(scratch, offline=True)
    _cache(home, {"m.gguf": MODEL})
    with pytest.raises(ModelSourceError, match="has other revisions of it"):
        _pull(scratch, f"hf:{REPO}@v2", offline=True)
    with pytest.raises(ModelSourceError, match=r"as far as it is in the cache .* no file 'n.gguf'"):
        _pull(scratch, f"hf:{REPO}:n.gguf", offline=True)


def test_links_out_of_the_cache_are_not_followed(scratch: Path, home: Path) -> None:
    snapshot = _cache(home, {"m.gguf": MODEL})
    (home / "private").write_bytes(MODEL)
    (snapshot / "m.gguf").unlink()
    (snapshot / "m.gguf").symlink_to(home / "private")
    with pytest.raises(ModelSourceError, match="leads out of"):
        _pull(scratch, offline=True)


@pytest.mark.parametrize(
    "source",
    [
        "hf:",
        "hf:model",
        "hf:a/b/c",
        "hf:a/../b",
        "hf:a/b:",
        "hf:a/b@",
        "hf:a/b:../x.gguf",
        "hf:a/b@../x:f.gguf",
        "hf:a b/c",
    ],
)
def test_malformed_sources_are_refused(scratch: Path, source: str) -> None:
    with pytest.raises(ModelSourceError, match=r"not of the form hf:ORG/REPO"):
        _pull(scratch, source)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://hub", "https://"])
def test_an_endpoint_that_is_no_address_is_refused(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ModelSourceError, match="HF_ENDPOINT"):
        _pull(scratch)


def test_without_huggingface_hub_the_error_says_what_to_install(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelSourceError, match=r"pip install 'llmpi\[hub\]'"):
        _pull(scratch)


def test_the_cache_is_where_huggingface_hub_has_it() -> None:
    assert cache_folder({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert cache_folder({"HF_HOME": "/b"}) == Path("/b/hub")
    assert cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert cache_folder({}) == Path.home() / ".cache/huggingface/hub"


def test_redirects_within_the_hub_keep_the_token(hub: Hub, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.hold(m=MODEL)
    moved = hub._answer

    def answer(handler: Any) -> bool:
        if "/resolve/" in handler.path and "moved" not in handler.path:
            handler.send(307, b"", list(redirect(handler.path + "?moved=1").headers))
            return True
        return moved(handler)

    hub.site.answer = answer
    assert _pull(scratch).files[0].path.read_bytes() == MODEL
    assert [headers.get("authorization") for _, headers in hub.site.asked] == ["Bearer hf_secret"] * 3
