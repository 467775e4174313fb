"""Labelled point clouds: whole scans, objects, and the clouds of labelled RGB-D frames."""
