"""Measuring backbones: matching, probes, metrics."""
