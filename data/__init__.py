"""Data room: folder layouts, decoding, augmentation, sample order, loaders and a synthetic dataset."""
