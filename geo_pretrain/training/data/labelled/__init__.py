"""Labelled data sets, one file a layout."""
