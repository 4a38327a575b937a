"""What a dataset holds, in figures: measured, as a table, as a picture."""
