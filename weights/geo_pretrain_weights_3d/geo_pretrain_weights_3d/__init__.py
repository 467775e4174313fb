"""Weights for geo_pretrain, which reads them by their metadata: csc_srunet34.rooms."""
