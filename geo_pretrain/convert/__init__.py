"""Other people's checkpoint formats and ours, one file a family."""
