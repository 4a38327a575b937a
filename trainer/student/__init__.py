"""The student: its settings and a dataset's header come in, a model that fits goes out, or a named error."""

from __future__ import annotations

from .adapter import merged
from .checks import check_head, check_tokenizer
from .forward import Distilling, distil_in_forward, innermost
from .load import load_student
from .packing_probe import check_packing
from .tokenizer_files import TOKENIZER_FILES, tokenizer_files

__all__ = [
    "TOKENIZER_FILES",
    "Distilling",
    "check_head",
    "check_packing",
    "check_tokenizer",
    "distil_in_forward",
    "innermost",
    "load_student",
    "merged",
    "tokenizer_files",
]
