"""Tasks: what each asks of a model, its metrics, baselines and plots."""
