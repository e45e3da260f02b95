"""Run a command of vitft as a job of a cluster."""
