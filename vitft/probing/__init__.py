"""A first answer on a dataset, from features that a pretrained backbone gives once."""
