"""The pure core: requests, messages, the control plane's state machine, policies, estimates, the simulator.

Nothing here performs input or output, reads a clock, draws randomness of its own, or knows MPI exists.
Time and seeds come in as arguments, so that every behaviour can be tested and simulated deterministically.
"""
