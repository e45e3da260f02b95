"""Pretrained models: loading, a new head, another input size, and how a checkpoint prepares its images."""
