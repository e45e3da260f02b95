"""Device, precision and threads of a run, and timers for the parts of a step."""
