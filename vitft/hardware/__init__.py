"""What a run runs on: devices, precision, threads, and where the time of a step goes."""
