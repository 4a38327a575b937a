"""The report page of a training run, and the comparison of several. No heavy library but in `callback` and `pace`."""
