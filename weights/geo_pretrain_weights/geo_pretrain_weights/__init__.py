"""Weights for geo_pretrain, which reads them by their metadata: pri3d_view_r18.rooms."""
