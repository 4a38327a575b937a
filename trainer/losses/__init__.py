"""The losses that configurations can name: every class derived from `Loss` in this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from coldstill.common.config_file import ConfigInvalid, check_config
from coldstill.common.models import FrozenModel
from coldstill.common.plugins import is_plugin, load_plugin

from .base import Loss
from .taid import Taid

_PLUGIN = "module:name"


class PluginLoss(FrozenModel):
    """The user's own loss and its options, not yet imported; `read_loss` imports it."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        description="Your own loss, a class derived from Loss; its options are further keys of this section."
    )


def _losses_of_this_folder() -> dict[str, type[Loss]]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    losses = [
        found
        for module in modules
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, Loss) and found.__module__ == module.__name__
    ]
    return {loss.model_fields["name"].default: loss for loss in losses if not loss.model_fields["name"].is_required()}


LOSSES: dict[str, type[Loss]] = {"taid": Taid, **_losses_of_this_folder()}
"""Every loss by its name; the default comes first."""


def _with_name(given: Any) -> Any:
    """A mapping with the default name if it has none, and without the options that are null."""
    if isinstance(given, Loss | PluginLoss):
        return given
    if not isinstance(given, Mapping):
        raise ValueError("should be a mapping, such as {name: taid}")
    chosen = {"name": "taid", **{option: value for option, value in given.items() if value is not None}}
    name = chosen["name"]
    if not isinstance(name, str) or (name not in LOSSES and not is_plugin(name)):
        raise ValueError(f"name should be {', '.join(LOSSES)} or module:name, not {name!r}")
    return chosen


def _tag(given: Mapping[str, Any] | Loss | PluginLoss) -> str:
    name: str = given["name"] if isinstance(given, Mapping) else given.name
    return _PLUGIN if is_plugin(name) else name


if TYPE_CHECKING:
    LossConfig = Loss | PluginLoss
else:
    _MEMBERS = [Annotated[loss, Tag(name)] for name, loss in LOSSES.items()]
    LossConfig = Annotated[
        Union[(*_MEMBERS, Annotated[PluginLoss, Tag(_PLUGIN)])], Discriminator(_tag), BeforeValidator(_with_name)
    ]
"""The section `loss` of a configuration: a union of all losses, told apart by `name`."""


class _LossSection(FrozenModel):
    loss: LossConfig


def read_loss(given: str | Mapping[str, Any] | Loss | PluginLoss) -> Loss:
    """The loss that `given` means: a name, a mapping as in a configuration, or a loss as it is.

    Raises `ConfigInvalid` for an unknown name or option, and `PluginNotFound` for code that cannot be imported.
    """
    if isinstance(given, Loss):
        return given
    if not isinstance(given, PluginLoss):
        section = {"name": given} if isinstance(given, str) else given
        found = check_config({"loss": section}, model=_LossSection, where="loss").loss
        return read_loss(found)
    loss = load_plugin(given.name, key="loss.name")
    if not (isinstance(loss, type) and issubclass(loss, Loss)):
        raise ConfigInvalid("loss.name", found=given.name, wanted="a class derived from coldstill.trainer.losses.Loss")
    return check_config(given.model_extra or {}, model=loss, where=given.name)


def run_identity(loss: Loss | PluginLoss) -> dict[str, Any]:
    """The record of a loss in `run.json`. The first releases had these keys for every loss, null if it had no such
    option; with them, runs of all releases can be compared."""
    keys = ("schedule", "t_start", "t_end", "alpha", "beta", "mu")
    return {"tail": "auto", "cross_entropy_share": 0.0, **dict.fromkeys(keys), **loss.model_dump()}
