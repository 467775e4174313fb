"""Backbones pre-trained with 3D geometry."""

__version__ = "0.1.0"
