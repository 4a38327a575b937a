"""A section that is one of several models: its keys in `--help`, and errors that name the keys of the chosen one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Discriminator, Field, Tag

from coldstill.common.config_file import ConfigInvalid, check_config, described_keys
from coldstill.common.models import FrozenModel


class Depth(FrozenModel):
    meters: float = Field(1.0, gt=0, description="How deep.")


class Lake(FrozenModel):
    kind: Literal["lake"] = Field("lake", description="A lake.")
    size: int = Field(3, description="Its size.")
    depth: Depth = Field(default_factory=Depth, description="Its depth.")


class River(FrozenModel):
    kind: Literal["river"] = Field("river", description="A river.")
    size: int = Field(3, description="Its size.")
    speed: float = Field(0.5, description="Its speed.")


class Canal(FrozenModel):
    kind: Literal["canal"] = Field("canal", description="A canal.")
    size: int = Field(4, description="Its size.")


def kind_of(given: Any) -> str:
    return given.get("kind", "lake") if isinstance(given, dict) else given.kind


class Map(FrozenModel):
    water: Annotated[
        Annotated[Lake, Tag("lake")] | Annotated[River, Tag("river")] | Annotated[Canal, Tag("canal")],
        Discriminator(kind_of),
    ] = Field(default_factory=Lake, description="What is drawn.")
    depth: Depth | None = Field(None, description="Optional.")


class Atlas(FrozenModel):
    map: Map = Field(default_factory=Map, description="A map.")


@pytest.mark.parametrize(("model", "prefix"), [(Map, ""), (Atlas, "map.")])
def test_each_key_is_described_once_with_those_that_have_it(model: type[BaseModel], prefix: str) -> None:
    assert [(key.removeprefix(prefix), *rest) for key, *rest in described_keys(model)] == [
        ("water.kind", "lake", "lake: A lake."),
        ("water.kind", "lake", "river: A river."),
        ("water.kind", "lake", "canal: A canal."),
        ("water.size", "3", "all but canal: Its size."),
        ("water.size", "4", "canal: Its size."),
        ("water.depth.meters", "1.0", "lake: How deep."),
        ("water.speed", "0.5", "river: Its speed."),
        ("depth.meters", "1.0", "How deep."),
    ]


@pytest.mark.parametrize(
    ("water", "wanted"),
    [
        ({"kind": "river", "depht": 2}, r"f: water\.depht\n.*unknown key\n.*one of kind, size, speed\n"),
        ({"kind": "river", "sped": 2}, r"did you mean water\.speed\?"),
        ({"dept": {}}, r"one of kind, size, depth\n.*did you mean water\.depth\?"),
        (
            {"depth": {"meter": 2}},
            r"water\.depth\.meter\n.*unknown key\n.*\n.*did you mean water\.depth\.meters\?",
        ),
        ({"depth": {"meters": 0}}, r"f: water\.depth\.meters\n.*0\n.*greater than 0"),
        ({"kind": "canal", "size": "x"}, r"f: water\.size\n.*'x'\n.*integer"),
    ],
)
def test_an_error_names_the_keys_of_the_chosen_model(water: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigInvalid, match=wanted):
        check_config({"water": water}, model=Map, where="f")
