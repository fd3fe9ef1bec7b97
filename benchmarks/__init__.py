"A training step of fnnlite beside other ways to take it: `python -m benchmarks --help`"
