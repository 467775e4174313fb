"""RGB-D sources, frame pairs, samples and augmentation."""
