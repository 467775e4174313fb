"""The demo: what the shipped weights can do (a minute on a CPU), then a short pre-training, and a report of both."""
