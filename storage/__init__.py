"""What survives: the run directory, the durable record, HDF5 metrics, and what is known of model files."""
