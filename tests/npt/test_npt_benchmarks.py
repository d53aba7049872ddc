"""The experiments page is its data's, and the forms that the benchmark times compute the same."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import npt as speed  # noqa: E402
from benchmarks import npt_experiments as experiments  # noqa: E402

from memplan.job.spec import Npt  # noqa: E402
from memplan.npt.modulator import make_modulator  # noqa: E402

pytestmark = pytest.mark.torch


def test_the_page_is_that_of_the_data():
    """Every row of the experiments has figures, and the page says what they say."""
    data = json.loads(experiments.DATA.read_text(encoding="utf-8"))

    assert [row.name for row in experiments.ROWS] == [row["name"] for row in data["rows"]]
    assert experiments.page(data) == experiments.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("variant", ["diag", "linear", "outer"])
def test_the_timed_forms_agree(variant):
    """Factored, token by token and materialised: one delta."""
    npt = Npt(variant=variant, components=2, rank=3)
    made = make_modulator(npt, 6, 10, dtype=torch.float64, device=torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        made.B.normal_()
    x, a = torch.randn(2, 1, 5, 6, dtype=torch.float64)
    expected = speed.factored(made, x, a)
    assert expected.abs().max() > 0.01
    for form in (speed.token_by_token, speed.materialised):
        torch.testing.assert_close(form(made, x, a), expected, rtol=1e-10, atol=1e-12)
