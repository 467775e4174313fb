"""The networks; `architectures` lists them without importing torch."""
