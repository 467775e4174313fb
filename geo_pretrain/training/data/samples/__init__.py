"""Training samples: augmented pairs, clouds and views."""
