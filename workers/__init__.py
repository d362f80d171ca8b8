"""A rank's side: pinning, the engine process and its supervisor, telemetry, the simulated and null engines."""
