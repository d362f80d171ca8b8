"""Staging, as a job does it: before any rank opens its model. What it is and how it works: `storage.staging`."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from coordinator.bytesdone import BytesDone
from coordinator.config import JobConfig
from coordinator.modelnames import Named, find_model
from coordinator.mpi import World
from coordinator.mpi_staging import MpiGroup
from scheduling.errors import EXIT_INFRASTRUCTURE, LlmpiError, RankLostError
from storage.relay import Channel
from storage.stagemodel import Model, model_of
from storage.staging import Group, Node, Staged, stage

MAGIC = b"GGUF"


class SoloGroup:
    """This process alone."""

    rank, size = 0, 1

    def exchange(self, said: bytes, patience_s: float) -> list[bytes]:
        return [said]

    def chain(self, ranks: Sequence[int]) -> Channel:
        return _Nobody()


class _Nobody:
    """A chain of one."""

    place, size = 0, 1

    def receive(self, buffer: memoryview) -> _Never:
        return _Never()

    def send(self, data: memoryview) -> _Never:
        return _Never()

    def answer(self, well: bool) -> None:
        """To nobody."""

    def answered(self) -> bool | None:
        return True

    def idle(self) -> None:
        time.sleep(1e-4)


class _Never:
    def poll(self) -> int | None:
        return None

    def cancel(self) -> None:
        """Nothing is on its way."""


def stage_models(
    config: JobConfig, world: World | None, *, stopped: Callable[[], None] = lambda: None, quiet: bool = True
) -> Staged:
    """Bring the models of the job to this node, with all ranks. To be called by all of them, whatever the options say.

    Raises on all ranks alike StagingError and StoppedError. Where a rank is lost, or something unforeseen happens on
    one, the job is ended.
    """
    mode = config.stage if config.engine == "llama" else "never"
    group: Group = SoloGroup() if world is None else MpiGroup(world)
    node = Node(socket.gethostname(), os.environ, free_memory_bytes=int(psutil.virtual_memory().available))
    with ExitStack() as stack:
        bar: list[BytesDone] = []

        def progress(count: int) -> None:
            if not quiet and not bar:
                total = sum(model.size for model in models_of(config))
                bar.append(stack.enter_context(BytesDone("staging the model", total)))
            for one in bar:
                one.more(count)

        try:
            return stage(
                group, mode, config.stage_dir, lambda: models_of(config), node, stopped=stopped, progress=progress
            )
        except RankLostError as error:
            _give_up(world, f"llmpi: {error}")
            raise
        except LlmpiError:
            raise
        except Exception:
            where = f"rank {group.rank} on {node.host}"
            _give_up(world, f"llmpi: an error of its own in {where}, ending the job:\n{traceback.format_exc()}")
            raise


def _give_up(world: World | None, text: str) -> None:
    """Others may wait for this rank, and it cannot tell them."""
    if world is not None and world.size > 1:
        print(text, file=sys.stderr)
        world.abort(EXIT_INFRASTRUCTURE)


def models_of(config: JobConfig) -> list[Model]:
    """The model, the one that drafts for it, and its adapters. Raises UserError or OSError if one cannot be found.

    None is named that is no model by its first bytes: whoever opens it says so.
    """
    named = [("model", find_model(config.model))]
    if config.draft_model is not None:
        named.append(("draft", find_model(config.draft_model)))
    for number, adapter in enumerate(config.adapters()):
        path = Path(adapter.path)
        named.append((adapter_role(number), Named(path, path.stem)))
    return [
        model_of(role, one.name, one.files(), one.digest)
        for role, one in named
        if all(_is_gguf(path) for path, _ in one.files())
    ]


def adapter_role(number: int) -> str:
    """Of the adapter that comes at this place among `--lora`, from 0."""
    return f"adapter {number}"


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
