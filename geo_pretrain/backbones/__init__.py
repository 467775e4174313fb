"""The networks; `architectures` says which there are, without torch."""
