"""Benchmarks over pretext tasks: every task trained at one budget, measured alike, one table."""
