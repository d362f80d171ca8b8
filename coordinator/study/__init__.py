"""`llmpi study`: the same work measured again and again under one mpirun, while one thing is varied."""
