"""What a frozen backbone knows of 3D: matching by viewpoint, probes of depth, normals and classes, layer by layer."""
