"""The run folder and its checkpoints: whole or absent, verified wherever they are read."""
