"""One input shared by several jobs, each with a run directory of its own: `llmpi batch --slice I/N`."""
