"""Data: folder layouts, decoding, augmentation, sample order and a synthetic data set."""
