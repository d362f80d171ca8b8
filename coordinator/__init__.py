"""Rank 0: its loop, the MPI transport, launching, the command line, reports."""
