"""`llmpi doctor`: what a job would find here, each thing with a verdict and what to do about it.

`facts` are what a rank knows of itself, gathered by `gather` and the `probe_*` modules; `exchange` brings them to rank
0 and measures the links; the `about_*` modules turn plain facts into `findings`, without looking at anything
themselves; `show` prints. `examining` is the order of it all.
"""
