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
        context = max(sequences) * (-(-(prompt_tokens + output_tokens) // 256) * 256)
        flash = {None: "auto", True: "on", False: "off"}[engine.flash_attention]
        self._command = [
            str(program), "-m", engine.model, "-c", str(context), "-b", str(engine.batch_tokens), "-ub",
            str(engine.ubatch_tokens), "-npp", str(prompt_tokens), "-ntg", str(output_tokens), "-npl",
            ",".join(map(str, sequences)), "-ngl", str(engine.gpu_layers if engine.gpu_layers >= 0 else 999), "-t",
            str(engine.threads), "-fa", flash, "--output-format", "jsonl",
        ]  # fmt: skip
        self._environment = engine_environment(os.environ, engine.device_mask)

    def total_tokens_per_s(self) -> dict[int, float]:
        """Prompt and output tokens over wall time, by number of sequences. Loading is not in it."""
        done = subprocess.run(self._command, env=self._environment, capture_output=True, text=True, check=False)
        found = {}
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                found[int(row["pl"])] = float(row["speed"])
        if not found:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["it said nothing"]
            raise EngineError(f"{NAME} gave no figures (exit status {done.returncode}): {said[0]}")
        return found
