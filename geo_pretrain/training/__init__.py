"""How each checkpoint is made: RGB-D sequences, pretext tasks, the training loop and downstream protocols."""
