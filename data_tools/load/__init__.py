"""Loading for training: the order of samples, decoding, augmentation."""
