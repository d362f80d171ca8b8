"""The commands of `llmpi`, a module each or a few of a kind: parsing and help.

A module here knows words, defaults and how options become a configuration. It imports neither MPI nor an engine nor
what does the work: a command imports that when it runs, so that `llmpi --help` is quick. `coordinator.cli` lists the
commands.
"""
