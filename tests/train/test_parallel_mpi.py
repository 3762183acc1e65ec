"""Training by processes that mpirun starts: sums, results, the command, and what fails."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mpi_program
import numpy as np
import pytest
from helpers import ROOT
from optional import needs

from gpurnn.checkpoint import load_checkpoint

MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
pytestmark = [pytest.mark.long, needs("mpi4py"), pytest.mark.skipif(MPIRUN is None, reason="needs mpirun")]
STARTING = 25  # seconds that a busy machine may take to start the processes


def mpirun(count, *words, **variables):
    """A finished ``mpirun -n COUNT python WORDS``, and its seconds."""
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    start = time.monotonic()
    command = [MPIRUN, "-n", str(count), sys.executable, *map(str, words)]
    done = subprocess.run(command, env=os.environ | more | variables, capture_output=True, text=True, timeout=120)
    return done, time.monotonic() - start


def test_three_processes_compute_what_one_does(tmp_path):
    done, _ = mpirun(3, mpi_program.__file__, "everything", tmp_path)
    assert done.returncode == 0, done.stderr
    losses, params = mpi_program.train()
    got = json.loads((tmp_path / "result.json").read_text())
    np.testing.assert_allclose(got[0], losses, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got[1], params, rtol=0, atol=1e-12)
    np.testing.assert_allclose(load_checkpoint(tmp_path / "run" / "last.json")[0]["model/0.weight"].ravel()[:5],
                               params[:5], rtol=0, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("kind, limit", [("raise", 60), ("kill", 60), pytest.param("hang", 2, marks=pytest.mark.slow)])
def test_one_process_that_fails_ends_all(tmp_path, kind, limit):
    done, seconds = mpirun(2, mpi_program.__file__, kind, tmp_path, GPURNN_GROUP_TIMEOUT=str(limit))
    assert done.returncode != 0
    assert seconds < STARTING + 10, "5 seconds for those that fail alone, 5 and the limit for one that hangs"
    causes = {"raise": "a bad disk, say", "kill": "KILLED BY SIGNAL|signal 9", "hang": "Without an answer: 1 (of 2)"}
    said = done.stderr + done.stdout
    assert any(cause in said for cause in causes[kind].split("|")), said
    assert said.count("Error: ") == (kind != "kill"), said
    arrays, document = load_checkpoint(tmp_path / "last.json")
    assert document["epoch"] == 1 and arrays


def test_the_command_trains_and_says_everything_once(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("Once upon a time there was a text. " * 40, encoding="utf-8")
    options = ("--hidden", 8, "--epochs", 1, "--seed", 1, "--batch", 4, "--steps", 16, "--backend", "cpu")
    done, _ = mpirun(2, "-m", "gpurnn", "train", "text", book, *options, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["group"] == ["mpi", 2]
    assert done.stderr.count("epoch 1/1") == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "last.json", "best.json", "history.jsonl"} <= names

    wrong, _ = mpirun(2, "-m", "gpurnn", "train", "text", book, "--hiden", 8)
    assert (wrong.returncode, wrong.stderr.count("No such option")) == (2, 1)
