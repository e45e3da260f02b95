"""From a name or a path to batches: sources, splits, decoder, store, augmentation, loader."""
