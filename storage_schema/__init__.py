"""The dataset directory: all that capture and training share. Needs numpy, pyarrow, zstandard, pydantic and fsspec."""

from coldstill.common.errors import ColdstillError

from .dataset import Dataset, open_dataset
from .header import DatasetHeader, TeacherFacts
from .rows import CachedRow, TeacherTargets

__all__ = ["CachedRow", "ColdstillError", "Dataset", "DatasetHeader", "TeacherFacts", "TeacherTargets", "open_dataset"]
