"""Models to be measured: a name and the dataset come in, a checked model goes out, on the device that there is."""

from __future__ import annotations

from typing import Any, Literal

import torch

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import Dataset
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.student import check_tokenizer, load_student, tokenizer_files

Weights = Literal["float32", "bfloat16"]


def load_measured(name: str, dataset: Dataset, *, role: str, weights: Weights = "float32") -> Any:
    """The causal language model in the folder or of the hub name `name`, if its tokenizer and head fit `dataset`.

    A resident teacher is held to the same: its ids must mean what those of the dataset mean. `role` is named in errors.
    Raises what `tokenizer_files`, `check_tokenizer` and `load_student` of `trainer.student` raise.
    """
    config = StudentConfig(model=name, weights=weights)
    try:
        files = tokenizer_files(config, dataset)
        check_tokenizer(files["tokenizer.json"], dataset.header, name=name)
        model = load_student(config, dataset.header)
    except ColdstillError as error:
        raise error.at(role) from error
    return model.eval().to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
