"""From an image file to a batch: decoding, augmentation, splits, the store of decoded images, the loader."""
