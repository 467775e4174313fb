"""Sources of RGB-D frames, one file a layout."""
