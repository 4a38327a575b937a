"""The dataset directory: all that capture and training share. Needs numpy, pyarrow, zstandard, pydantic and fsspec."""

from .dataset import Dataset, open_dataset
from .errors import ColdstillError
from .header import DatasetHeader, TeacherFacts
from .rows import CachedRow, TeacherTargets

__all__ = ["CachedRow", "ColdstillError", "Dataset", "DatasetHeader", "TeacherFacts", "TeacherTargets", "open_dataset"]
