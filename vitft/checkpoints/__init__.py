"""Run folders and checkpoints: written atomically, and verified by checksum on every read."""
