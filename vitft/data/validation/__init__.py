"""Validate a dataset: duplicates, leaks between splits, unreadable and unusual images, and an HTML report."""
