"""Measures what mini can do: `python -m model.score`."""

from model.score.measure import main

main()
