"""Rounds of distillation: the student answers prompts, the teacher scores the answers, the student trains on them."""
