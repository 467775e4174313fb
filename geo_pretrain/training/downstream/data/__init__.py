"""Labelled images for fine-tuning: readers of the data sets' real layouts, subsets of them, and COCO's format."""
