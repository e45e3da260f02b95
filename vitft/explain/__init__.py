"""Explains a ViT stage by stage: tables, worked examples, attention maps, and a page for the browser."""
