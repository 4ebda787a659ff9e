"""Experiments on real models and data: tasks, budgets, runs, results. Started with `python -m experiments.<name>`."""
