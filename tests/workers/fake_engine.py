"""A child for the supervisor's tests: speaks frames, and misbehaves as it is told.

python fake_engine.py BEHAVIOUR IN_FD OUT_FD PARENT_PID
"""

from __future__ import annotations

import os
import signal
import sys

from workers.frames import read_frame, write_all
from workers.protocol import EngineLoaded, Frame, Recall, Returned, Submit, decode_to_engine, encode

FLOOD_BYTES = 100 << 20

LOADED = EngineLoaded(
    load_s=0.0,
    vocab_tokens=1,
    train_ctx_tokens=1,
    slots=1,
    model_desc="fake",
    model_bytes=0,
    backend="none",
    chat_template=False,
)


def serve(in_fd: int, out_fd: int) -> None:
    """Say which requests came, and give back what is recalled."""
    while (body := read_frame(in_fd)) is not None:
        message = decode_to_engine(body)
        if isinstance(message, Submit):
            write_all(out_fd, encode(Frame(started=[job.key for job in message.jobs])))
        elif isinstance(message, Recall):
            write_all(out_fd, encode(Returned(message.recall, message.keys)))


def main(behaviour: str, in_fd: int, out_fd: int) -> None:
    read_frame(in_fd)
    if behaviour == "flood":
        noise = b"noise " * 10_000
        for _ in range(FLOOD_BYTES // len(noise)):
            os.write(2, noise)
        os.write(2, b"\nthe very last line\n")
    write_all(out_fd, encode(LOADED))
    if behaviour == "abort":
        os.write(2, b"assertion failed\n")
        os.abort()
    elif behaviour == "exit":
        sys.exit(3)
    elif behaviour == "die in a frame":
        write_all(out_fd, encode(Frame(started=[5])))
        os.write(out_fd, encode(Frame(started=[6]))[:-1])
        os.kill(os.getpid(), signal.SIGKILL)
    elif behaviour == "garbage":
        write_all(out_fd, b"\x02\x00\x00\x00\xc1\xc1")
        signal.pause()
    elif behaviour == "deaf":
        signal.pause()
    elif behaviour == "mute":
        os.close(out_fd)
        signal.pause()
    elif behaviour in ("last words", "chatter"):
        if behaviour == "last words":
            serve(in_fd, out_fd)
        for number in range(3000):
            write_all(out_fd, encode(Frame(started=[number] * 300)))
    elif behaviour == "environment":
        os.write(2, " ".join(sorted(os.environ)).encode())
    else:
        serve(in_fd, out_fd)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
