"""Training by processes that mpirun starts: sums, results, the command, and what fails."""

import json
import os
import random
import shutil
import signal
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


def variables():
    """What every process finds in its environment."""
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def mpirun(count, *words, **more):
    """A finished ``mpirun -n COUNT python WORDS``, and its seconds."""
    start = time.monotonic()
    command = [MPIRUN, "-n", str(count), sys.executable, *map(str, words)]
    done = subprocess.run(command, env=os.environ | variables() | more, capture_output=True, text=True, timeout=120)
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

    words = ["-m", "gpurnn", "train", "text", book, *options, "--out", tmp_path / "other", "--clip"]
    differ, _ = mpirun(1, *words, 1, ":", "-n", 1, sys.executable, *words, 2)
    assert (differ.returncode, differ.stderr.count("from process 0: --clip: 2.0 there, 1.0 on process 0")) == (2, 1)


def test_a_process_whose_others_never_join_is_ended():
    program = "import os, gpurnn\nif os.environ['PMI_RANK'] == '1': gpurnn.train.parallel.init('mpi')"
    done, seconds = mpirun(2, "-c", program, GPURNN_GROUP_TIMEOUT="1")
    assert done.returncode != 0 and seconds < STARTING
    assert "process 1 of 2 waited 1 seconds for the others to join the group" in done.stderr


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bits(tmp_path):
    """A random process is killed at a random time, twice; the run is resumed with as many processes."""
    book, draw = tmp_path / "book.txt", random.Random(1)
    book.write_text("".join(draw.choice("abcde ") for _ in range(9000)), encoding="utf-8")
    options = ["--hidden", 16, "--dropout", 0.2, "--epochs", 8, "--seed", 3, "--batch", 8, "--backend", "cpu"]
    command = ["-m", "gpurnn", "train", "text", "--checkpoint-every", 5, "--out"]
    whole, _ = mpirun(2, *command, tmp_path / "whole", book, *options)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "parts"
    for _ in range(2):
        begun = (folder / "last.json").exists()
        words = [*command, folder, *(["--resume"] if begun else [book, "--overwrite", *options])]
        process = subprocess.Popen(
            [MPIRUN, "-n", "2", *map(str, [sys.executable, *words])], env=os.environ | variables(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(draw.uniform(1, 6))
        kill_one(folder, draw)
        process.wait(STARTING)
    last, _ = mpirun(2, *command, folder, *(["--resume"] if (folder / "last.json").exists() else [book, *options]))
    assert last.returncode == 0, last.stderr
    for name, array in load_checkpoint(tmp_path / "whole" / "last.json")[0].items():
        assert load_checkpoint(folder / "last.json")[0][name].tobytes() == array.tobytes(), name


def kill_one(folder, draw):
    """Kill one of the processes that train in a folder, if they run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, names = ((path / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:  # it has ended, or is somebody else's
            continue
        if str(folder).encode() in words and b"PMI_RANK=" in names:
            found.append(int(path.name))
    if found:
        os.kill(draw.choice(sorted(found)), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, for network namespaces")
def test_a_link_that_is_cut_ends_the_training(tmp_path):
    """Two network namespaces as two hosts, see bench/two_hosts.sh; the last checkpoint is whole."""
    if (
        not all(map(shutil.which, ("ip", "tc", "sh")))
        or subprocess.run(["ip", "netns", "add", "gpurnn-probe"]).returncode
    ):
        pytest.skip("needs ip and tc, and a kernel with network namespaces")
    subprocess.run(["ip", "netns", "del", "gpurnn-probe"], check=True)
    book = tmp_path / "book.txt"
    book.write_text("Once upon a time there was a text. " * 400, encoding="utf-8")
    run = tmp_path / "run"  # the link is cut after the first epoch, however long a busy machine takes to start
    more = {"CUT": f"{run / 'last.json'}", "GPURNN_GROUP_TIMEOUT": "4"}
    more["PATH"] = f"{Path(MPIRUN).parent}:{os.environ['PATH']}"
    words = ["-m", "gpurnn", "train", "text", book, "--hidden", 16, "--epochs", 9999, "--out", run]
    command = ["sh", ROOT / "bench" / "two_hosts.sh", 2, sys.executable, *words]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | variables() | more, capture_output=True, text=True, timeout=90
    )
    assert done.returncode != 0
    assert "took more than 4 seconds" in done.stderr and "Without an answer: " in done.stderr, done.stderr + done.stdout
    assert load_checkpoint(run / "last.json")[1]["epoch"] >= 1
