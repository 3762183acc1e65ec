"""A run's folder that was damaged: shortened logs, flipped bits, and folders of the first edition."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from optional import needs

from gpurnn.checkpoint import CheckpointError
from gpurnn.run_folder import check_ours, read_flow, read_history
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load, read_run

OPTIONS = dict(hidden=4, steps=8, batch=4, epochs=2, seed=1, backend="cpu", schedule="constant")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with book.txt, a run of one epoch, "part", and one of two, "whole"."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "book.txt").write_text("a gate keeps the state, a state opens the gate. " * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
        for name, epochs in (("part", 1), ("whole", 2)):
            run = prepare("text", [folder / "book.txt"], folder / name, **OPTIONS | {"epochs": epochs})
            run.finish(run.train(progress=False, flow=True))
    return folder


@pytest.fixture
def part(made, tmp_path, monkeypatch):
    monkeypatch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
    return Path(shutil.copytree(made / "part", tmp_path / "part"))


def resume(folder):
    run = prepare("text", [], folder, resume=True, epochs=2)
    return run.train(progress=False, flow=True)


@pytest.mark.long
@pytest.mark.parametrize("log", ["history.jsonl", "gradient_flow.jsonl"])
@pytest.mark.parametrize("left", [None, 0, 1, 0.3, 0.9])
def test_a_shortened_log_does_not_stop_a_run(made, part, log, left, caplog):
    """What is missing is said; no byte of another kind comes in its place; the weights are those of the whole run."""
    path = part / log
    data = path.read_bytes()
    if left is None:
        path.unlink()
    else:
        path.write_bytes(data[: left if isinstance(left, int) else round(left * len(data))])
    resume(part)
    assert f"{log} was shortened" in caplog.text
    assert b"\0" not in path.read_bytes()
    read_history(part / "history.jsonl"), read_flow(part / "gradient_flow.jsonl")
    whole, parts = (load(folder, "cpu").model.state_dict() for folder in (made / "whole", part))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


@pytest.mark.long
@needs("matplotlib")
def test_a_whole_log_goes_on(made, part, caplog):
    from gpurnn.plots import plot_run

    history = resume(part)
    assert [record["epoch"] for record in history.epochs] == [1, 2] and "shortened" not in caplog.text
    assert len(plot_run(part)) == 2
    whole = read_history(made / "whole" / "history.jsonl")
    assert [record["step"] for record in whole] == [record["step"] for record in read_history(part / "history.jsonl")]


DAMAGES = [b"\0" * 40 + b"\n", b"{}\n", b'{"kind": "step"}\n', b"[" * 100000 + b"\n", b"\xff\n"]


def test_a_diverged_run_is_still_a_run(tmp_path):
    """Its history holds losses that are not finite: the folder may be overwritten as any other run's."""
    (tmp_path / "history.jsonl").write_text('{"kind": "step", "loss": NaN}\n')
    check_ours(tmp_path)
    (tmp_path / "history.jsonl").write_text('{"loss": NaN}\n')
    with pytest.raises(CheckpointError, match="history.jsonl has the name of a run's file and is none"):
        check_ours(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES, ids=["nul", "empty", "short", "deep", "byte"])
def test_a_damaged_log_is_named_with_the_line(part, damage):
    for log, draw in (("history.jsonl", read_history), ("gradient_flow.jsonl", read_flow)):
        path = part / log
        whole = path.read_bytes()
        path.write_bytes(damage + whole)
        with pytest.raises(CheckpointError, match=rf"{log}: line 1: ") as caught:
            draw(path)
        assert len(str(caught.value)) < 600
        if log == "history.jsonl":
            with pytest.raises(CheckpointError, match=rf"{log}: line 1: "):
                resume(part)
        path.write_bytes(whole)


@pytest.mark.slow
def test_no_flipped_bit_gives_another_run(made, part):
    """Of config.json every bit is flipped: an error that names it, or the same run."""
    path = part / "config.json"
    data = bytearray(path.read_bytes())
    expected = read_run(part)
    survived = 0
    for place in range(8 * len(data)):
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            assert read_run(part) == expected
            survived += 1
        except CheckpointError as error:
            assert "config.json: is" in str(error) and len(str(error)) < 600
        data[place // 8] ^= 1 << place % 8
    assert survived < 8 * len(data) / 20  # white space


def test_runs_of_the_first_edition_load(part):
    """They have no SHA-256 in config.json; what does not fit their checkpoint is refused before anything is built."""
    path = part / "config.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_text(json.dumps(document))
    load(part, "cpu")
    resume(part)
    for settings, message in (
        ({"hidden": 6000}, "1 layers of 6000 hidden units"),
        ({"layers": 500}, "500 layers"),
        ({"embedding": 10**9}, "embedding 1000000000"),
    ):
        path.write_text(json.dumps(document | {"settings": document["settings"] | settings}))
        with pytest.raises(CheckpointError, match=f"config.json: {message}"):
            load(part, "cpu")
        with pytest.raises(CheckpointError, match=f"config.json: {message}"):
            resume(part)


@pytest.mark.parametrize("key", ["task", "backend", "settings", "files", "data", "facts"])
@pytest.mark.parametrize("value", [None, 7, [7], {"a": 7}, "absent"])
def test_keys_that_are_missing_or_odd(part, key, value):
    path = part / "config.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    document[key] = value
    if value == "absent":
        del document[key]
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="config.json: is damaged"):
        load(part, "cpu")


def test_a_bad_byte_gives_a_short_message(part):
    path = part / "config.json"
    document = json.loads(path.read_text())
    document["facts"]["vocabulary"] = "x" * 200000
    path.write_bytes(json.dumps(document).encode()[:-1] + b"\xff}")
    with pytest.raises(CheckpointError, match=r"config.json: is not JSON: .*byte \d+ is 0xff") as caught:
        read_run(part)
    assert len(str(caught.value)) < 600


def test_settings_are_written_with_their_digest(part):
    settings, document = read_run(part)
    assert dataclasses.asdict(settings) == document["settings"] and "sha256" not in document
    saved = json.loads((part / "config.json").read_text())
    assert len(saved["sha256"]) == 64 and saved["result"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import gpurnn.tasks.text
import gpurnn.train.run_files
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load

gpurnn.train.run_files.RunFiles.draw = lambda files: None
folder, first, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
options = dict(hidden=4, steps=8, batch=4, epochs=2, seed=1, backend="numpy", schedule="constant")

def train(run):
    run.finish(run.train(progress=False, flow=True, checkpoint_every=12))

def begin(place):
    if (place / "config.json").exists():
        train(prepare("text", [], place, resume=True))
    else:
        train(prepare("text", [folder / "book.txt"], place, **options))

def killed(place, n):
    calls = 0
    def wrap(function):
        def wrapped(*arguments, **more):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)
        return wrapped
    for name in ("open", "write", "fsync", "replace", "unlink", "ftruncate", "mkdir", "close"):
        setattr(os, name, wrap(getattr(os, name)))
    begin(place)

def child(function, *arguments):
    "Whether a process that calls it was killed."
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, (arguments, status)
    return os.WIFSIGNALED(status)

def same(place):
    whole, parts = (load(p, "numpy").model.state_dict() for p in (folder / "whole", place))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    logs = [[line.split(b'"seconds"')[0] for line in (p / "history.jsonl").read_bytes().splitlines()]
            for p in (folder / "whole", place)]
    assert logs[0] == logs[1], place
    assert not list(place.glob(".*")), list(place.iterdir())

if not (folder / "whole").exists():
    child(begin, folder / "whole")
kills = 0
for n in range(first, 10000, stride):
    place = folder / str(n)
    if not child(killed, place, n):
        break
    kills += 1
    child(begin, place)
    child(same, place)
print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
def test_killed_at_every_system_call_of_a_run(tmp_path):
    """From the first folder to the last result: resumed, each run has the bits and the log of the whole one. An epoch
    has 17 batches, and a checkpoint is after each twelve."""
    (tmp_path / "book.txt").write_text("a gate keeps the state, a state opens the gate. " * 12)
    command = [sys.executable, "-c", KILLED, str(tmp_path), "1", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 80


@pytest.mark.slow
def test_many_runs_start_at_once(tmp_path):
    """Eight pairs, as in the trial in which four were mixed."""
    (tmp_path / "book.txt").write_text("a gate keeps the state, a state opens the gate. " * 30)
    tiny = ["--hidden", "4", "--steps", "8", "--batch", "4", "--epochs", "2", "--backend", "cpu", "--json"]
    command = [sys.executable, "-m", "gpurnn", "train", "text", "book.txt", *tiny]
    for _ in range(8):
        pair = [
            subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for _ in range(2)
        ]
        runs = [json.loads(process.communicate(timeout=60)[0])["run"] for process in pair]
        assert len(set(runs)) == 2
        for run in runs:
            load(tmp_path / run, "cpu")
            records = read_history(tmp_path / run / "history.jsonl")
            assert [record["epoch"] for record in records if record["kind"] == "epoch"] == [1, 2]
