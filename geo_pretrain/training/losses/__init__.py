"""Losses of the pretext tasks: pure functions of tensors, each with a runnable example and a slow twin in its test."""
