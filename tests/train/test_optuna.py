"""The search with Optuna in docs/parallel.md, as it stands there."""

import re

import numpy as np
import pytest
from helpers import ROOT
from optional import needs

pytestmark = [pytest.mark.long, needs("optuna"), pytest.mark.filterwarnings("default")]


def test_the_search_of_the_page_reports_and_prunes():
    import optuna

    page = (ROOT / "gpurnn" / "docs" / "parallel.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(import optuna\n.*?)^```$", page, re.S | re.M)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = {}
    exec(block, names)
    study = names["study"]
    states = [trial.state.name for trial in study.trials]
    assert len(states) == 12 and "PRUNED" in states and "COMPLETE" in states
    assert study.best_value < np.log(7), "better than guessing"
    assert all(len(trial.intermediate_values) == 5 for trial in study.trials if trial.state.name == "COMPLETE")
