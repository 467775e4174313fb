"""The sparse convolution engine: coordinates, kernel maps, layers; nothing to compile."""
