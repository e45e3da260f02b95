"""Decoded images: all at once, as they are needed, and on disk for the next run."""
