"""Aligns the stored tokens of a teacher with those of a student that has another tokenizer, by bytes of the text."""
