"""Laws of the section `loss`: each loss has its own options, the paper's by default, and rejects all others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field, TypeAdapter

from coldstill import load_logit_dataset
from coldstill.common.config_file import ConfigInvalid, check_config, described_keys
from coldstill.common.plugins import PluginNotFound
from coldstill.trainer.checkpoints import claim
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.errors import CheckpointMismatch
from coldstill.trainer.losses import LOSSES, LossConfig, PluginLoss, read_loss, run_identity
from coldstill.trainer.losses.cross_entropy import CrossEntropy
from coldstill.trainer.losses.divergences import JensenShannon
from coldstill.trainer.losses.taid import Taid
from coldstill.trainer.train import _identity

KEYS = {"dataset": "d", "output": "o", "student": {"model": "m"}}
SHARED = {"name", "tail", "cross_entropy_share"}


def options(given: object) -> dict[str, object]:
    return {option: value for option, value in read_loss(given).model_dump().items() if option not in SHARED}


def section(given: object) -> LossConfig:
    return TrainConfig.model_validate({**KEYS, "loss": given}).loss


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("taid", {"schedule": "adaptive", "t_start": 0.4, "t_end": 1.0, "alpha": "auto", "beta": 0.99}),
        ("forward_kl", {}),
        ("reverse_kl", {}),
        ("js", {"beta": 0.1}),
        ("tvd", {}),
        ("skew_forward_kl", {"alpha": 0.1}),
        ("skew_reverse_kl", {"alpha": 0.1}),
        ("adaptive_kl", {"mu": 0.5}),
        ("dkd", {"alpha": 1.0, "beta": 0.5}),
        ("lightning_opd", {"any_rows": False}),
        ("cross_entropy", {}),
    ],
)
def test_what_is_left_out_is_the_paper_s(name, wanted):
    assert options(name) == options({"name": name}) == wanted


def test_what_is_given_is_taken_and_none_is_left_out():
    assert options({"name": "js", "beta": 0.5, "alpha": None}) == {"beta": 0.5}
    assert options({"alpha": 0.01})["alpha"] == 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_survives_being_written_down_and_read_again(name):
    loss, reader = read_loss(name), TypeAdapter(LossConfig)
    assert reader.validate_python(loss.model_dump()) == loss
    assert reader.validate_json(loss.model_dump_json()) == loss
    assert reader.validate_python(loss) == loss
    whole = TrainConfig.model_validate({**KEYS, "loss": {"name": name}})
    assert TrainConfig.model_validate(whole.model_dump(exclude_defaults=True)) == whole


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"name": "js", "alpha": 0.1}, r"loss\.alpha\n.*unknown key\n.*one of name, cross_entropy_share, tail, beta\n"),
        (
            {"name": "forward_kl", "t_start": 0.4},
            r"loss\.t_start\n.*unknown key\n.*one of name, cross_entropy_share, tail\n",
        ),
        ({"name": "taid", "mu": 0.5}, r"loss\.mu\n.*unknown key\n.*schedule, t_start, t_end, alpha, beta\n"),
        ({"name": "cross_entropy", "beta": 0.5}, r"loss\.beta\n.*unknown key\n.*one of name\n"),
        ({"name": "ctkd"}, "name should be taid, .* or module:name, not 'ctkd'"),
        ({"name": "cross_entropy", "cross_entropy_share": 0.1}, r"loss\.cross_entropy_share\n.*unknown key"),
        ({"name": "tvd", "tail": "mixture"}, r"loss\.tail\n.*'mixture'\n.*'auto' or 'bucket'"),
        (
            {"name": "forward_kl", "tail": "mass_corrected"},
            r"loss\.tail\n.*'mass_corrected'\n.*'auto', 'mixture', 'bucket' or 'control_variate'",
        ),
        ({"name": "cross_entropy", "tail": "bucket"}, r"loss\.tail\n.*unknown key"),
        ({"tail": "renormalise"}, "'auto', 'mixture', 'bucket', 'mass_corrected' or 'control_variate'"),
        ({"name": "js", "beta": 0}, r"loss\.beta\n.*0\n.*greater than 0"),
        ({"name": "js", "beta": 1}, r"loss\.beta\n.*1\n.*less than 1"),
        ({"name": "skew_reverse_kl", "alpha": 1}, r"loss\.alpha\n.*1\n.*less than 1"),
        ({"name": "skew_reverse_kl", "alpha": "auto"}, r"loss\.alpha\n.*'auto'\n.*valid number"),
        ({"name": "dkd", "beta": -1}, r"loss\.beta\n.*-1\n.*greater than or equal to 0"),
        ({"name": "dkd", "beta": 101}, r"loss\.beta\n.*101\n.*less than or equal to 100"),
        ({"name": "skew_reverse_kl", "alpha": -0.1}, r"loss\.alpha\n.*-0\.1\n.*greater than or equal to 0"),
        ({"beta": -0.1}, r"loss\.beta\n.*-0\.1\n.*greater than or equal to 0"),
        ({"t_start": 1.1}, r"loss\.t_start\n.*1\.1\n.*less than or equal to 1"),
        ({"alpha": 2}, r"alpha of taid must be auto or in \[0, 1\], not 2"),
        ({"beta": 1}, r"loss\.beta\n.*1\n.*less than 1"),
        ({"beta": float("nan")}, r"loss\.beta\n.*nan\n"),
        ({"t_start": -0.1}, r"loss\.t_start\n.*-0\.1\n.*greater than or equal to 0"),
        ({"t_start": 0.9, "t_end": 0.5}, "must not be above"),
        ({"cross_entropy_share": 1.5}, "less than or equal to 1"),
        ({"name": "reverse"}, "name should be taid, .* or module:name, not 'reverse'"),
        ({"name": ["taid"]}, r"name should be taid, .*, not \['taid'\]"),
        ({"nmae": "taid"}, r"loss\.nmae\n.*unknown key\n.*\n.*did you mean loss\.name\?"),
        ({"name": "js", "bta": 0.3}, r"did you mean loss\.beta\?"),
        ({"t_strat": 0.3}, r"did you mean loss\.t_start\?"),
        ("taid", r"loss\n.*'taid'\n.*should be a mapping, such as \{name: taid\}"),
    ],
)
def test_what_a_loss_does_not_have_is_refused_by_name(given, wanted):
    with pytest.raises(ConfigInvalid, match=wanted):
        check_config({**KEYS, "loss": given}, model=TrainConfig, where="train.yaml")


def test_the_edges_that_mean_something_are_allowed():
    assert options({"name": "skew_forward_kl", "alpha": 0}) == {"alpha": 0.0}
    assert options({"t_start": 1, "t_end": 1, "alpha": 0, "beta": 0})["alpha"] == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_every_key_has_a_sentence(name):
    for option, field in LOSSES[name].model_fields.items():
        assert field.description, option
        assert field.description.endswith("."), option


def test_nothing_chosen_is_taid_and_a_name_is_optional():
    assert section({}) == TrainConfig.model_validate(KEYS).loss == Taid()
    assert section({"t_start": 0.2}) == Taid(t_start=0.2)


def test_a_name_a_mapping_and_an_object_are_the_same_loss():
    wanted = JensenShannon(beta=0.3)
    assert read_loss({"name": "js", "beta": 0.3}) == read_loss(wanted) == read_loss(section(wanted.model_dump()))
    assert read_loss("js") == JensenShannon()
    with pytest.raises(ConfigInvalid, match=r"loss: loss\.bta"):
        read_loss({"name": "js", "bta": 0.3})


def test_help_lists_the_options_of_each_loss():
    lines = [line for line in described_keys(TrainConfig) if line[0].startswith("loss.")]
    told = {(key, owner) for key, _, sentence in lines for owner in sentence.partition(":")[0].split(", ")}
    for name, loss in LOSSES.items():
        for option in loss.model_fields:
            assert (f"loss.{option}", name) in told or option == "cross_entropy_share", (name, option)
    assert {default for key, default, _ in lines if key == "loss.name"} == {"taid"}
    shares = [sentence for key, _, sentence in lines if key == "loss.cross_entropy_share"]
    assert len(shares) == 1
    assert shares[0].startswith("all but cross_entropy, module:name: ")


def test_a_loss_of_the_user_s_own_code_is_named_by_its_module():
    text = f"{__name__}:Mine"
    found = section({"name": text, "sharpness": 2})
    assert isinstance(found, PluginLoss)
    assert TrainConfig.model_validate({**KEYS, "loss": found.model_dump()}).loss == found
    assert read_loss(found) == Mine(sharpness=2)
    assert read_loss(text) == Mine()
    with pytest.raises(ConfigInvalid, match=r"bluntness\n.*unknown key\n.*one of name, sharpness"):
        read_loss({"name": text, "bluntness": 2})
    with pytest.raises(PluginNotFound, match=r"loss\.name"):
        read_loss("no_such_module:Loss")
    with pytest.raises(ConfigInvalid, match="a class derived from"):
        read_loss(f"{__name__}:section")


class Mine(CrossEntropy):
    """A user's loss with an option."""

    sharpness: float = Field(1.0, description="An option.")


def test_reading_losses_loads_no_torch():
    program = "import sys, coldstill.trainer.losses; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_class_in_a_file_of_the_folder_is_a_loss():
    """Adding a loss is one file: there is no list to extend."""
    folder = Path(sys.modules["coldstill.trainer.losses"].__path__[0])
    texts = [file.read_text() for file in folder.glob("*.py")]
    written = [name for text in texts for name in re.findall(r'^    name: Literal\["(\w+)"\]', text, re.MULTILINE)]
    assert sorted(written) == sorted(LOSSES)


OLD_IDENTITIES = [
    (
        {"name": "taid"},
        {
            "name": "taid",
            "tail": "auto",
            "cross_entropy_share": 0.0,
            "schedule": "adaptive",
            "t_start": 0.4,
            "t_end": 1.0,
            "alpha": "auto",
            "beta": 0.99,
            "mu": None,
        },
    ),
    (
        {"name": "js", "tail": "bucket", "beta": 0.3, "cross_entropy_share": 0.25},
        {
            "name": "js",
            "tail": "bucket",
            "cross_entropy_share": 0.25,
            "schedule": None,
            "t_start": None,
            "t_end": None,
            "alpha": None,
            "beta": 0.3,
            "mu": None,
        },
    ),
    (
        {"name": "cross_entropy"},
        {
            "name": "cross_entropy",
            "tail": "auto",
            "cross_entropy_share": 0.0,
            "schedule": None,
            "t_start": None,
            "t_end": None,
            "alpha": None,
            "beta": None,
            "mu": None,
        },
    ),
]


@pytest.mark.parametrize(("given", "stored"), OLD_IDENTITIES)
def test_a_run_of_an_earlier_release_has_the_same_identity(given, stored):
    """`stored`: what `run.json` of that release held for the loss."""
    assert run_identity(section(given)) == stored


def test_the_folder_of_a_run_of_an_earlier_release_is_the_same_run(tiny_dataset: Path, tmp_path: Path):
    given, stored = OLD_IDENTITIES[1]
    config = TrainConfig.model_validate(
        {"dataset": str(tiny_dataset), "output": str(tmp_path / "run"), "student": {"model": "m"}, "loss": given}
    )
    dataset = load_logit_dataset(config.dataset)
    identity = {**_identity(config, dataset), "loss": stored}
    (tmp_path / "run/checkpoint-1").mkdir(parents=True)
    (tmp_path / "run/checkpoint-1/trainer_state.json").write_text('{"global_step": 1, "max_steps": 2}')
    (tmp_path / "run/run.json").write_text(json.dumps(identity))
    claim(tmp_path / "run", _identity(config, dataset), write=False)
    other = config.model_copy(update={"loss": JensenShannon(beta=0.4)})
    with pytest.raises(CheckpointMismatch, match="differs in loss"):
        claim(tmp_path / "run", _identity(other, dataset), write=False)
