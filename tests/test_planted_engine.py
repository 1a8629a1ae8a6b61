"""Part (a) of `specdec verify` against every known mistake, planted in the production engine."""

import pytest

from specdec.evals.audit import TOLERANCE
from specdec.evals.planted_engine import audited, small
from specdec.evals.wrong_rules import FAULTS, KEY_FAULTS, LEGAL, KeyFault, Variant

pytestmark = pytest.mark.usefixtures("one_thread")

SHOWS = 1e-3  # total variation
TABLES = (7, 0, 9)  # seeds; a mistake need not show on every one


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_wrong_variant_is_seen(fault: Variant) -> None:
    """By the law of two tokens; or the engine refuses what is no law."""
    found = (audited(small(fault), seed, tokens=2) for seed in TABLES)
    assert any(law is None or law.total_variation > SHOWS for law in found)


@pytest.mark.parametrize("fault", KEY_FAULTS, ids=lambda fault: f"{fault.rule}: {fault.name}")
def test_every_number_under_another_key_is_seen(fault: KeyFault) -> None:
    """Three tokens: what two steps share has to meet."""
    found = (audited(fault, seed, tokens=3) for seed in TABLES)
    assert any(law is not None and law.total_variation > SHOWS for law in found)


@pytest.mark.parametrize("legal", LEGAL, ids=lambda legal: legal.name)
def test_what_only_looks_wrong_passes(legal: Variant) -> None:
    law = audited(small(legal), TABLES[0], tokens=2)
    assert law is not None
    assert law.error < TOLERANCE
