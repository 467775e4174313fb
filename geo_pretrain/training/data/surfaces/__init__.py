"""Surfaces of scenes: fused or read, chunked, segmented into sets."""
