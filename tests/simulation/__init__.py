"""A whole job in one process, again and again, in a world that is made of one seed: time, network, disk, engines.

What is real: rank 0 from its first line to its exit status, the control plane, the protocol between ranks, the workers'
logic, the record and its writer, the run directory, metrics.h5. What is simulated: time, what carries envelopes, the
disk, engines, the death of any of these, and the person who presses Ctrl-C.

    agenda      time, and what happens when
    weather     what goes wrong in a seed, and how often
    network     envelopes between ranks, late, twice, or lost with who sent them
    disk        files in memory: what is written, what is synced, what a crash leaves
    engines     engines that answer after a while, hang, die, refuse to start
    ranks       worker ranks around the real worker, and what all ranks do together
    rank0       rank 0's surroundings: its sleep is when the others live
    threads     what the product does in threads, in turn
    faults      what is done to all of them
    oracles     what must hold after every event, and at the end
    case        one seed: sessions of the same command until the run is complete
    bugs        mistakes planted in the product, to show that they are found

Rank 0 is the main program. Its only way to wait is `sleep`; there the rest of the world lives for as long. See
docs/simulation.md.
"""
