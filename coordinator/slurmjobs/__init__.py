"""`llmpi submit`: runs as jobs of Slurm, one after another until all is answered."""
