"""Settings of section `cluster` of a capture."""

from __future__ import annotations

from pydantic import Field, model_validator

from coldstill.common.models import FrozenModel, renamed_field


class ClusterConfig(FrozenModel):
    """Where the capture runs."""

    min_workers: int = Field(
        default=1, ge=1, description="Number of workers that must be ready before work units are assigned."
    )
    max_workers: int = Field(
        default=1, ge=1, description="Maximum number of workers: Ray actors, each with its own engine."
    )
    cpus_per_worker: float | None = Field(
        default=None,
        gt=0,
        description="CPU cores that Ray reserves per worker; also its number of OpenMP threads, unless OMP_NUM_THREADS "
        "is set. By default 1; on one machine without a GPU, the workers share all cores.",
    )
    gpus_per_worker: float | None = Field(
        default=None,
        ge=0,
        description="GPUs that Ray reserves per worker; by default tensor times pipeline parallel size if the cluster "
        "has GPUs.",
    )
    address: str | None = Field(
        default=None,
        description="Address of the Ray cluster to join; by default RAY_ADDRESS, or else a new one on this machine.",
    )
    hung_after_s: float = Field(
        default=600, gt=0, description="Seconds without progress after which a worker counts as hung and exits."
    )
    store_retry_s: float = renamed_field(
        "store_retry_s",
        old="store_patience_s",
        default=300,
        ge=0,
        description="Seconds for which a failed access to the output store is retried before the capture ends.",
    )
    driver_dead_after_s: float = Field(
        default=120,
        gt=0,
        description="Seconds without a heartbeat after which another driver may take over the capture.",
    )
    price_per_gpu_hour: float | None = Field(
        default=None, ge=0, description="Price of one GPU for one hour, in any currency, for `status` and `--dry-run`."
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> ClusterConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers at most max_workers, {self.max_workers}, not {self.min_workers}")
        return self
