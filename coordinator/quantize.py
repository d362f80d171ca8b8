"""`llmpi models quantize`: a smaller model from a larger one, by llama.cpp, into the store."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

from coordinator.modelnames import find_model, open_store
from coordinator.models import told
from scheduling.errors import ConfigError, ModelFileError
from storage.blobs import Blobs
from storage.digest import Digest
from storage.gguf import check_gguf
from storage.manifest import ModelName, suggested_name
from workers.processes import python_command
from workers.supervisor import engine_environment

LINES_KEPT = 20


def quantize_model(
    name: str, kind: str, called: str | None, threads: int | None, *, pin: bool, replace: bool, as_json: bool
) -> int:
    """Raises UserError: no such model or type, a model that cannot be quantised, or no room."""
    store, kind = open_store(), kind.upper()
    found = find_model(name)
    info = check_gguf(found.path)
    known = _child("0", "", "", "?", "1").split()
    if kind not in known:
        raise ConfigError(f"{kind} is no type of llama.cpp's; there are {', '.join(known)}")
    usual_name = _quantised_name(found.name, kind)
    new_name = ModelName.parse(called) if called else usual_name
    store.blobs.need_room(info.file_bytes)
    parent = _digest(found.path, found.digest, store.blobs)
    with store.blobs.scratch_folder("quantize-") as folder:
        # Not by the file that it is made from: in the store that is called by its digest.
        made = folder / f"{usual_name.name}-{kind}.gguf"
        _run(found.path, made, kind, threads or os.cpu_count() or 1)
        model = store.add(
            made, name=new_name, source=f"quantize {kind} of {found.name}", parent=parent, pinned=pin, link=True,
            replace_other=replace,
        )  # fmt: skip
    return told(store, model, as_json)


def _quantised_name(name: str, kind: str) -> ModelName:
    base = suggested_name(name.partition(":")[0].rpartition("/")[2]).name
    for suffix in ("-f16", "-bf16", "-f32", ".f16", ".bf16", ".f32"):
        base = base.removesuffix(suffix)
    return ModelName(base, kind.lower())


def _digest(path: Path, known: str | None, blobs: Blobs) -> Digest:
    """Of the model that is quantised: it is known, or hashed now."""
    if known is not None:
        return Digest.parse(known)
    return blobs.hash(path)


def _run(source: Path, target: Path, kind: str, threads: int) -> None:
    """Raises ModelFileError with what llama.cpp said last, if it failed."""
    words = [*python_command("workers.quantize"), str(os.getpid()), str(source), str(target), kind, str(threads)]
    process = subprocess.Popen(
        words, env=engine_environment(os.environ, {}), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    last: deque[str] = deque(maxlen=LINES_KEPT)
    drain = threading.Thread(target=last.extend, args=(process.stderr,), daemon=True)
    drain.start()
    live = sys.stderr.isatty()
    try:
        for line in process.stdout:
            done, _, total = line.strip().partition(" ")
            if live:
                print(f"\rllmpi: {kind}: tensor {done} of {total} ", end="", file=sys.stderr, flush=True)
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    drain.join()
    if code:
        said = [line.strip() for line in last if line.strip()]
        words_said = next((line for line in reversed(said) if "fail" in line), said[-1] if said else "it said nothing")
        hint = " (a model that is quantised already cannot be again: take one in F16, BF16 or F32)"
        raise ModelFileError(
            f"{source} cannot be quantised to {kind}: {words_said}{hint if 'requantiz' in words_said else ''}"
        )


def _child(*words: str) -> str:
    done = subprocess.run(
        [*python_command("workers.quantize"), *words], env=engine_environment(os.environ, {}),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout
