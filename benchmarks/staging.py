"""Staging a model to several hosts over links of 1 Gbit/s, hashing and writing included.

usage: python benchmarks/staging.py [--hosts 2,4] [--mb 256] [--rate 1gbit] [--repeats 3] [--json]

Hosts are network namespaces of this machine (root is needed), their links limited by tc, a rank on each. In the same
run, in turn: MPI's own broadcast of as many bytes between the same hosts, nothing read, hashed or written, once whole
and once in pieces of 16 MiB (the better one counts); staging, from a file of rank 0's host; and each host reading the
file by itself from one more host, which serves it over a link of the same rate, one TCP stream a reader (in the place
of a file server). "CPU" is the processor time that staging a GB takes on a host, the mean of all: what the hosts' own
processes use, without what the kernel does for the links in nobody's name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PORT = 7070
PIECE_BYTES = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="2,4")
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [measured(int(count), options) for count in options.hosts.split(",")]
    if options.json:
        print(json.dumps(found))
        return
    print(f"{options.mb} MB, links of {options.rate}, medians of {options.repeats}; MB/s is of the file's bytes")
    titles = ("hosts", "broadcast", "staging", "ratio", "each reads", "times", "read", "rank 0 sent", "CPU")
    print("{:>5} {:>17} {:>17} {:>6} {:>17} {:>6} {:>9} {:>12} {:>10}".format(*titles))
    for one in found:
        size = one["bytes"] / 1e6
        cells = [f"{one[name]:.2f} s {size / one[name]:4.0f} MB/s" for name in ("broadcast_s", "stage_s", "each_s")]
        print(
            f"{one['hosts']:5} {cells[0]:>17} {cells[1]:>17} {one['ratio']:6.2f} {cells[2]:>17} "
            f"{one['each_s'] / one['stage_s']:6.2f} {one['source_bytes_read'] / 1e6:6.0f} MB "
            f"{one['sent_bytes'] / 1e6:9.0f} MB {one['cpu_s_per_gb']:5.2f} s/GB"
        )


def measured(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """All three on `count` hosts."""
    from tests.hosts import cannot, hosts

    if why := cannot():
        sys.exit(f"hosts cannot be made here: {why}")
    scratch = Path(tempfile.mkdtemp(prefix="llmpi-stage-", dir="/dev/shm"))
    try:
        model = scratch / "model.gguf"
        with open(model, "wb") as file:
            file.write(b"GGUF")
            for _ in range(options.mb):
                file.write(os.urandom(1_000_000))
        with hosts(count + 1, scratch, rate=options.rate) as made:
            server = subprocess.Popen(
                made.command([sys.executable, __file__, "serve", str(model)], host=count), stdout=subprocess.DEVNULL
            )
            try:
                ranks = [sys.executable, __file__, "rank", str(model), str(scratch / "local"), made.addresses[-1]]
                mpirun = Path(sys.executable).with_name("mpirun")
                words = [str(mpirun), *made.options(1, count), "-n", str(count), *ranks, str(options.repeats)]
                done = subprocess.run(
                    made.command(words), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment()
                )
                if done.returncode:
                    sys.exit(f"mpirun ended with {done.returncode}")
                told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            finally:
                server.terminate()
                server.wait()
        return told | {"hosts": count, "ratio": told["broadcast_s"] / told["stage_s"]}
    finally:
        shutil.rmtree(scratch)


def environment() -> dict[str, str]:
    as_root = {f"{who}_ALLOW_RUN_AS_ROOT{what}": "1" for who in ("OMPI", "PRTE") for what in ("", "_CONFIRM")}
    return {**os.environ, **as_root, "PYTHONPATH": str(ROOT)}


# ---------------------------------------------------------------- on the hosts


def serve(model: str) -> None:
    """The file, whole, to everybody who connects."""
    with socket.create_server(("", PORT)) as listening:
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=send_file, args=(connection, model), daemon=True).start()


def send_file(connection: socket.socket, model: str) -> None:
    with connection, open(model, "rb") as file:
        connection.sendfile(file)


def sent() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def be_rank(model: str, folder: str, server: str, repeats: int) -> None:
    """One rank; rank 0 prints medians as JSON."""
    import numpy as np

    from coordinator.mpi import World
    from coordinator.mpi_staging import MpiGroup
    from storage.stagemodel import model_of
    from storage.staging import Node, stage

    world = World()
    comm = world.collectives_comm
    size = Path(model).stat().st_size
    data = np.zeros(size, np.uint8)
    hosts = comm.allgather(socket.gethostname())
    assert len(set(hosts)) == world.size, hosts
    times: dict[str, list[float]] = {"whole": [], "pieces": [], "stage": [], "each": [], "cpu": []}
    told: dict[str, Any] = {}
    for _ in range(repeats):
        for name, piece in (("whole", size), ("pieces", PIECE_BYTES)):
            comm.Barrier()
            began_s = time.monotonic()
            for place in range(0, size, piece):
                comm.Bcast(data[place : place + piece], root=0)
            comm.Barrier()
            times[name].append(time.monotonic() - began_s)
        for old in Path(folder).iterdir():
            shutil.rmtree(old)
        comm.Barrier()
        before, began_s, began_cpu_s = sent(), time.monotonic(), time.process_time()
        node = Node(socket.gethostname(), {})
        done = stage(
            MpiGroup(world), "always", folder, lambda: [model_of("model", "m", [(Path(model), None)], None)], node
        )
        cpu_s = time.process_time() - began_cpu_s
        comm.Barrier()
        times["stage"].append(time.monotonic() - began_s)
        times["cpu"].append(statistics.mean(comm.allgather(cpu_s)))
        told = dict(done.facts[0]) | {"sent_bytes": sent() - before}
        comm.Barrier()
        began_s = time.monotonic()
        with socket.create_connection((server, PORT)) as connection:
            got, view = 0, memoryview(bytearray(1 << 20))
            while count := connection.recv_into(view):
                got += count
        assert got == size, got
        comm.Barrier()
        times["each"].append(time.monotonic() - began_s)
    if world.rank == 0:
        middle = {name: statistics.median(all_s) for name, all_s in times.items()}
        told |= {
            "broadcast_s": min(middle["whole"], middle["pieces"]), "broadcast_whole_s": middle["whole"],
            "broadcast_pieces_s": middle["pieces"], "stage_s": middle["stage"], "each_s": middle["each"],
            "cpu_s_per_gb": middle["cpu"] / (size / 1e9), "all_s": times,
        }  # fmt: skip
        print(json.dumps(told))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    elif sys.argv[1:2] == ["rank"]:
        be_rank(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
