"""A job with a build that says it is Vulkan's: the real libraries beside an empty `libggml-vulkan.so`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.launch import Finished, run_alone
from tests.workers.device_lists import VULKAN_LAPTOP
from workers.devices.build import library_folder

pytestmark = [pytest.mark.system, pytest.mark.slow]


def _job(model: Path, at: Path, tools: Path) -> Finished:
    real = library_folder({})
    assert real is not None
    libraries = at / "lib"
    libraries.mkdir()
    for library in real.iterdir():
        (libraries / library.name).symlink_to(library)
    (libraries / "libggml-vulkan.so").touch()
    requests = at / "in.jsonl"
    requests.write_text(json.dumps({"prompt": "ab", "max_tokens": 2}) + "\n")
    environ = {"LLAMA_CPP_LIB_PATH": str(libraries), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    options = ("-m", model, "-i", requests, "-o", at / "run", "--slots", 1, "--ctx", 64, "--threads", 1)
    return run_alone("batch", *options, env=environ)


def _tool(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "summary").write_text(text)
    program = folder / "vulkaninfo"
    program.write_text(f'#!/bin/sh\nexec cat "{folder}/summary"\n')
    program.chmod(0o755)
    return folder


def test_devices_without_a_list_are_one_workers_and_it_is_said(tiny_model: Path, tmp_path: Path) -> None:
    done = _job(tiny_model, tmp_path, _tool(tmp_path / "bin", "no list\n"))
    assert done.rc == 0, done.output
    assert "all that Vulkan sees (vulkaninfo lists no devices in a form that is known)" in done.output


def test_a_device_that_the_build_does_not_see_is_named_by_its_mask(tiny_model: Path, tmp_path: Path) -> None:
    done = _job(tiny_model, tmp_path, _tool(tmp_path / "bin", VULKAN_LAPTOP))
    assert done.rc != 0, done.output
    assert "a GPU was assigned (GGML_VK_VISIBLE_DEVICES=1), but llama.cpp sees none" in done.stderr
