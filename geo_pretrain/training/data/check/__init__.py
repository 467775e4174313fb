"""Checks of a source before training: what is wrong with its frames, and which options would mend it."""
