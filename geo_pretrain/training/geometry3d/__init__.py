"""Geometry of detection in point clouds: sampling and grouping of points, oriented boxes, non-maximum suppression."""
