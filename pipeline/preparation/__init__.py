"""Before any unit is given out: header, tokenizer files, plan and pilot."""
