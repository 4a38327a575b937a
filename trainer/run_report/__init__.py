"""The report page of a training run, and the comparison of several. Imports no heavy library but in `callback`."""
