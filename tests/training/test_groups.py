"""Each parameter's weight decay and learning rate factor, for every architecture: as listed in groups/FAMILY.txt.

A file is written by `python -c "from tests.training.test_groups import write; write()"`; read its difference.
"""

from pathlib import Path

import pytest

from tests.families import FAMILIES, tiny_classifier
from tests.models.test_heads import marked
from vitft.models.heads import in_head
from vitft.training.optim import parameter_groups

FOLDER = Path(__file__).with_name("groups")


def listed(family: str) -> str:
    """A line for each parameter, in the model's order: weight decay of 1, layer decay of 1/2, and its name."""
    model = tiny_classifier(family)
    groups = {id(p): group for group in parameter_groups(model, 1.0, 0.5) for p in group["params"]}
    rows = [(groups[id(p)], name) for name, p in model.named_parameters()]
    return "".join(f"{group['weight_decay']:g} {group['lr_factor']!r} {name}\n" for group, name in rows)


def write() -> None:
    """Write all files anew."""
    FOLDER.mkdir(exist_ok=True)
    for family in FAMILIES:
        (FOLDER / f"{family}.txt").write_text(listed(family), encoding="utf-8")


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_every_parameter_has_the_decay_and_the_rate_that_are_listed(family: str) -> None:
    assert listed(family).splitlines() == (FOLDER / f"{family}.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_listed_rises_to_the_head(family: str) -> None:
    """Factors are powers of 1/2 without a gap: 1 for the head alone and what follows the last block, less before."""
    rows = [line.split() for line in (FOLDER / f"{family}.txt").read_text(encoding="utf-8").splitlines()]
    factors = sorted({float(factor) for _, factor, _ in rows}, reverse=True)
    assert factors == [0.5**number for number in range(len(factors))]
    assert {decay for decay, _, name in rows if name.endswith("bias")} <= {"0"}
    model = tiny_classifier(family)
    assert {factor for _, factor, name in rows if in_head(model, name)} == {"1.0"}


def test_there_is_a_list_for_each_architecture_and_no_other() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == FAMILIES.keys()
