"""How many greedy answers equal llama_cpp.Llama's, at one slot and at many, and where the others part.

usage: python benchmarks/greedy_equality.py MODEL [--slots 1,4,8,16] [--requests N] [--output-tokens N]
           [--flash-attention] [--speculate never|auto|always] [--json]

The reference is `llama_cpp.Llama` in a process of its own, one prompt at a time, with the engine's batch, micro-batch,
flash attention and KV settings. Prompts are those of examples/prompts.jsonl, as plain text. Two answers part at
the first character that differs. More slots mean other batch shapes, for which llama.cpp's kernels round differently.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scheduling.requests import Request, Sampling, parse_request
from workers.protocol import EngineConfig, EngineFailed, Frame, Job
from workers.supervisor import EngineProcess

EXAMPLES = Path(__file__).parent.parent / "examples" / "prompts.jsonl"
CTX_TOKENS = 1024
BATCH_TOKENS = 512

REFERENCE = """
import json, sys
import llama_cpp
job = json.load(sys.stdin)
model = llama_cpp.Llama(
    job["model"], n_ctx=job["ctx"], n_batch=job["batch"], n_ubatch=job["batch"], n_threads=job["threads"],
    n_threads_batch=job["threads"], flash_attn=job["flash"], n_gpu_layers=0, verbose=False,
)
texts = []
for prompt in job["prompts"]:
    made = model.create_completion(prompt, max_tokens=job["tokens"], temperature=0.0, repeat_penalty=1.0)
    texts.append(made["choices"][0]["text"])
    model.reset()
json.dump(texts, sys.stdout)
"""


def prompts_of(count: int) -> list[str]:
    """The text of the first `count` example prompts."""
    texts = []
    for line in EXAMPLES.read_bytes().splitlines()[:count]:
        request = parse_request(line)
        texts.append(str(request.prompt) if request.prompt else request.messages[-1].content)
    return texts


def reference(prompts: list[str], options: argparse.Namespace) -> list[str]:
    """Answers of `llama_cpp.Llama`."""
    job = {
        "model": options.model, "prompts": prompts, "tokens": options.output_tokens, "threads": options.threads,
        "ctx": CTX_TOKENS, "flash": options.flash_attention,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE],
        input=json.dumps(job | {"batch": BATCH_TOKENS}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    texts: list[str] = json.loads(done.stdout)
    return texts


def ours(prompts: list[str], options: argparse.Namespace, slots: int) -> list[str]:
    """Answers of our engine with `slots` slots."""
    engine = EngineProcess(
        EngineConfig(
            model=options.model, slots=slots, ctx_tokens=CTX_TOKENS, batch_tokens=BATCH_TOKENS,
            ubatch_tokens=BATCH_TOKENS, threads=options.threads, gpu_layers=0,
            flash_attention=options.flash_attention, speculate=options.speculate,
        )
    )  # fmt: skip
    sampling = Sampling(max_tokens=options.output_tokens, temperature=0.0)
    requests = [
        Request(custom_id=str(key), kind="completion", prompt=text, sampling=sampling)
        for key, text in enumerate(prompts)
    ]
    engine.submit([Job(key, 0, False, request) for key, request in enumerate(requests)])
    answers: dict[int, str] = {}
    while len(answers) < len(prompts):
        for frame in engine.poll():
            if isinstance(frame, EngineFailed):
                sys.exit(frame.reason)
            if isinstance(frame, Frame):
                answers.update({answer.key: answer.choices[0].text for answer in frame.finished})
        if not engine.alive:
            sys.exit(engine.exit_reason())
        time.sleep(0.005)
    engine.close(5.0)
    return [answers[key] for key in range(len(prompts))]


def parting(one: str, other: str) -> int:
    """The first character at which two texts differ."""
    return next(
        (k for k, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--slots", default="1,4,8,16")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash-attention", action="store_true")
    parser.add_argument("--speculate", choices=("never", "auto", "always"), default="never")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prompts = prompts_of(options.requests)
    expected = reference(prompts, options)
    found: list[dict[str, Any]] = []
    for slots in map(int, options.slots.split(",")):
        texts = ours(prompts, options, slots)
        parts = sorted(parting(a, b) for a, b in zip(texts, expected, strict=True) if a != b)
        found.append({"slots": slots, "answers": len(texts), "equal": len(texts) - len(parts), "part_at": parts})
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'slots':>6} {'answers':>8} {'equal':>6}  the others part at character")
    for row in found:
        print(f"{row['slots']:6} {row['answers']:8} {row['equal']:6}  {', '.join(map(str, row['part_at'])) or '-'}")


if __name__ == "__main__":
    main()
