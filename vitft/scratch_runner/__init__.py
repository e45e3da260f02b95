"""Trains the from-scratch ViT on the same datasets as fine-tuning, and draws the textbook's figures."""
