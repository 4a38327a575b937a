"""What a cache must keep of a teacher: ids and draws, by their bytes, by the gradient's noise, and by students.

Commands: `__main__` (ways of drawing), `quality` (K and the number of draws), `long` (more targets), `real` (a real
model's distributions) and `bytes`. `plan` lists what is measured and trained. `rules` and `noise` give the figures
without training; `grid` goes over the training runs, each of which is `students`.
"""
