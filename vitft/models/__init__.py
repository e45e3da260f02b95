"""Pretrained models: weights, heads, input sizes and preprocessing."""
