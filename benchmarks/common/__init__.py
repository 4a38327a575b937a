"""Parts that several benchmarks share: logs of runs, stored results, captures, figures against a whole teacher."""
