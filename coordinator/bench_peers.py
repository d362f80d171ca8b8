"""llama.cpp's own benchmark as a peer of ours: started as a process, its figures read from what it prints."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from scheduling.errors import ConfigError, EngineError
from workers.protocol import EngineConfig
from workers.supervisor import engine_environment

NAME = "llama-batched-bench"
SEQUENCES_MAX = 256
"""LLAMA_MAX_SEQ."""
TIMEOUT_S = 1800.0


class BatchedBench:
    """`llama-batched-bench`: all prompts, then a token for every sequence in each step. It chooses no tokens."""

    def __init__(
        self, folder: Path, engine: EngineConfig, prompt_tokens: int, output_tokens: int, sequences: tuple[int, ...]
    ) -> None:
        """`sequences`: numbers of sequences to try in turn. Raises ConfigError if `folder` does not have it."""
        program = folder / NAME
        if not os.access(program, os.X_OK):
            raise ConfigError(
                f"--peers {folder}: there is no program {NAME} in it; build llama.cpp's tools, name its bin"
            )
        if max(sequences) > SEQUENCES_MAX:
            raise ConfigError(
                f"llama.cpp has at most {SEQUENCES_MAX} sequences in a context, and {NAME} has one context: name "
                "what it shall try with --peer-sequences"
            )
        context = max(sequences) * (-(-(prompt_tokens + output_tokens) // 256) * 256)
        flash = {None: "auto", True: "on", False: "off"}[engine.flash_attention]
        self._command = [
            str(program), "-m", engine.model, "-c", str(context), "-b", str(engine.batch_tokens), "-ub",
            str(engine.ubatch_tokens), "-npp", str(prompt_tokens), "-ntg", str(output_tokens), "-npl",
            ",".join(f"{n},{n}" for n in sequences), "-ngl",
            str(engine.gpu_layers if engine.gpu_layers >= 0 else 999), "-t", str(engine.threads), "-fa", flash,
            "--output-format", "jsonl",
        ]  # fmt: skip
        self._sequences = set(sequences)
        self._environment = engine_environment(os.environ, engine.device_mask)

    def total_tokens_per_s(self) -> dict[int, float]:
        """Prompt and output tokens over wall time, by number of sequences, the second of two times: the first warms it
        up. Loading is not in it. Raises EngineError if a figure is missing."""
        try:
            done = subprocess.run(
                self._command, env=self._environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"{NAME} has not ended within {TIMEOUT_S:g} s") from None
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found = {int(row["pl"]): float(row["speed"]) for row in rows}
        if done.returncode or found.keys() != self._sequences:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["it said nothing"]
            missing = ", ".join(map(str, sorted(self._sequences - found.keys()))) or "none"
            raise EngineError(
                f"{NAME} failed (exit status {done.returncode}; without figures for sequences: {missing}): {said[0]}"
            )
        return found
