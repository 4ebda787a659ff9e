"""Experiments on real models and data: tasks, budgets, runs, results. Started with `python -m experiments.<name>`."""

from uniproj import console

console.without_word_of_bitsandbytes()
