"""Fine-tuning: downstream tasks, their recipes, sweeps and reports."""
