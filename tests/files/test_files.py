"""Files: what is written is whole, keeps its mode and replaces nothing of others; what is read is looked at first."""

import contextlib
import json
import math
import os
import platform
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT
from optional import needs

import gpurnn
from gpurnn import files
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.cli import main
from gpurnn.data.vocabulary import read_text
from gpurnn.errors import FileError
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load, read_run

TINY = ["--hidden", "4", "--epochs", "1", "--seed", "1", "--backend", "cpu", "--no-progress"]
posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX systems")


def call(*arguments, code=0):
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done


def command(*arguments):
    return [sys.executable, "-m", "gpurnn", *map(str, arguments)]


def refused(*arguments):
    """The command ends with an error of one line."""
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code in (1, 2), done.output
    assert isinstance(done.exception, SystemExit)
    return done.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with tiny runs of text, music and series, made once; see ``copied``."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text("X: 1\nT:a gate\nK:C\nabc\n\n" * 60)
    (folder / "tunes.json").write_text(json.dumps([[[60 + n % 5], [64], [67]] for n in range(30)]))
    rows = "\n".join(f"{1950 + n // 12}-{n % 12 + 1:02},{np.sin(n) + 3:.4f}" for n in range(120))
    (folder / "x.csv").write_text(f"month,sales\n{rows}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
        call("train", "text", folder / "book.txt", "--out", folder / "text", "--steps", 8, "--batch", 4, *TINY)
        call("train", "music", folder / "tunes.json", "--out", folder / "music", *TINY)
        call("train", "series", folder / "x.csv", "--window", 8, "--horizon", 2, "--out", folder / "series", *TINY)
    return folder


@pytest.fixture
def copied(runs, tmp_path, monkeypatch):
    """Those runs, in a folder of the test's own, which is the working directory."""
    import shutil

    shutil.copytree(runs, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
    return tmp_path / "here"


# ---- C2: files of others stay


NAMES = ["config.json", "last.json", "best.json", "history.jsonl", "history.png", "gradient_flow.jsonl",
         "gradient_flow.png", "best-0123456789abcdef.safetensors", "last-0123456789abcdef.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_one_file_of_a_runs_name_is_not_trained_into(copied, name):
    Path("mine").mkdir()
    Path("mine", name).write_bytes(b"mine")
    assert name in refused("train", "text", "book.txt", "--out", "mine", "--steps", 8, "--batch", 4, *TINY)
    assert os.listdir("mine") == [name] and Path("mine", name).read_bytes() == b"mine"


@pytest.mark.long
@pytest.mark.parametrize("name", [*NAMES[:7], "last.json link"])
@pytest.mark.parametrize("content", [b"mine", b'{"mine": 1}\n', b"\x89PNG\r\n\x1a\n mine"])
def test_overwrite_replaces_runs_and_nothing_else(copied, name, content):
    Path("mine").mkdir()
    path = Path("mine", name.split()[0])
    if "link" in name:
        Path("victim").write_bytes(content)
        path.symlink_to(Path("victim").resolve())
    else:
        path.write_bytes(content)
    more = ["--out", "mine", "--overwrite", "--steps", 8, "--batch", 4, *TINY]
    assert path.name in refused("train", "text", "book.txt", *more)
    assert path.read_bytes() == content and os.listdir("mine") == [path.name]
    call("train", "text", "book.txt", "--out", "text", *more[2:])  # a run's own


@pytest.mark.long
def test_resume_without_the_last_checkpoint_goes_on_from_the_best(copied, caplog):
    whole = ["train", "text", "book.txt", "--out", "whole", "--steps", 8, "--batch", 4, *TINY, "--epochs", 2]
    call(*whole, "--schedule", "constant")
    parts = [*whole[:4], "parts", *whole[5:]]
    call(*parts, "--schedule", "constant", "--epochs", 1)
    Path("parts", "last.json").unlink()
    call("train", "text", "--out", "parts", "--resume", "--epochs", 2, "--no-progress")
    assert "last.json is missing" in caplog.text
    a, b = (load(folder, "cpu").model.state_dict() for folder in ("whole", "parts"))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    epochs = [
        r for r in map(json.loads, Path("parts", "history.jsonl").read_text().splitlines()) if r["kind"] == "epoch"
    ]
    assert [r["epoch"] for r in epochs] == [1, 2]


@pytest.mark.parametrize("name", ["best.json", "history.jsonl"])
def test_resume_replaces_nothing_of_others(copied, name):
    for file in Path("text").iterdir():
        if file.name != "config.json":
            file.unlink()
    Path("text", name).write_text('{"mine": 1}\n')
    assert name in refused("train", "text", "--out", "text", "--resume", "--no-progress")
    assert Path("text", name).read_text() == '{"mine": 1}\n'


@pytest.mark.long
@needs("mido")
@needs("matplotlib")
def test_composing_leaves_pictures_of_others(copied):
    Path("song.png").write_bytes(b"\x89PNG\r\n\x1a\n of mine")
    done = call("compose", "music", "--steps", 2, "--out", "song.mid")
    assert Path("song.png").read_bytes().endswith(b"of mine") and Path("song.mid").read_bytes()[:4] == b"MThd"
    assert "song.png" in done.output
    assert "tune.png" in refused("compose", "music", "--steps", 2, "--out", "tune.png")
    assert not Path("tune.png").exists()
    call("compose", "music", "--steps", 2, "--out", "other.mid")
    first = Path("other.png").stat().st_ino
    call("compose", "music", "--steps", 2, "--out", "other.mid")  # its own picture is drawn anew
    assert Path("other.png").stat().st_ino != first
    made = [call("compose", "music", "--steps", 2).output.split("\n")[0] for _ in range(2)]
    assert made == [os.path.join("music", name) for name in ("tune.mid", "tune-2.mid")]


@needs("matplotlib")
def test_evaluating_leaves_a_picture_of_others(copied):
    for name in ("pos", "neg"):
        Path(f"a.{name}").write_text("".join(f"{name} text {n}\n" for n in range(12)))
    call("train", "classify", "a.pos", "a.neg", "--out", "classes", *TINY)
    Path("classes", "confusion.png").write_bytes(b"\x89PNG mine")
    assert "confusion.png" in call("evaluate", "classes", "a.pos", "a.neg").output
    assert Path("classes", "confusion.png").read_bytes() == b"\x89PNG mine"


@needs("matplotlib")
def test_outputs_are_no_inputs(copied, runs):
    before = Path("x.csv").read_bytes()
    same = ["--out", "same", "--plot", "same"]
    for how in (
        ["x.csv", "--out", "x.csv"], ["--out", runs / "x.csv"], ["x.csv", "--plot", "x.csv"],
        ["x.csv", "--out", "./x.csv"], same, ["--out", "series/last.json"],
    ):  # fmt: skip
        assert refused("forecast", "series", *how), how
    assert Path("x.csv").read_bytes() == (runs / "x.csv").read_bytes() == before and not Path("same").exists()
    tunes = Path("tunes.json").read_bytes()
    refused("compose", "music", "--steps", 2, "--prompt", "tunes.json", "--out", "tunes.json")
    refused("compose", "text", "--out", runs / "book.txt")
    assert Path("tunes.json").read_bytes() == tunes
    call("forecast", "series", "--out", "new.csv")
    load("series", "cpu")


@needs("matplotlib")
@pytest.mark.parametrize("name", ["notes.txt", "month,sales", "few.csv", "long.csv", "other.csv", "a.png"])
def test_a_file_of_others_is_replaced_only_where_that_is_said(copied, name):
    """A series of the user's own has the header of its forecast, and other rows."""
    texts = {
        "notes.txt": "notes on gpurnn\n",
        "month,sales": Path("x.csv").read_text(),
        "few.csv": "month,sales\n1960-01,3.25\n",
        "long.csv": "month,sales\n1960-01,3.250000\n1960-02,3.250000\n1960-03,3.250000\n",  # of 2 rows to forecast
        "other.csv": "month,cost\n1960-01,3.250000\n",
        "a.png": "\x89PNG",
    }
    Path(name).write_text(texts[name], encoding="latin-1")
    before = Path(name).read_bytes()
    how = ["forecast", "series", "--plot" if name == "a.png" else "--out", name]
    assert f"{name} is there already and was not written by this command" in refused(*how)
    assert Path(name).read_bytes() == before
    call(*how, "--overwrite")
    written = Path(name).read_bytes()
    assert written != before
    call(*how)  # by now it is the command's own
    assert Path(name).read_bytes() == written or name == "a.png"


@needs("matplotlib")
def test_a_dash_is_standard_output_where_text_is_written(copied):
    call("forecast", "series", "--out", "f.csv")
    assert call("forecast", "series", "--out", "-", "--plot", "a.png").stdout == Path("f.csv").read_text()
    assert "--out - and --json" in refused("forecast", "series", "--out", "-", "--json")
    for how in (["forecast", "series", "--plot", "-"], ["compose", "music", "--steps", 2, "--out", "-"]):
        assert "'-' is not standard output here" in refused(*how)
    assert not Path("-").exists()


@needs("matplotlib")
def test_plotting_leaves_pictures_of_others(copied):
    Path("text", "history.png").write_bytes(b"\x89PNG mine")
    assert "history.png is not a picture that gpurnn drew, and stays" in refused("plot", "text")
    assert Path("text", "history.png").read_bytes() == b"\x89PNG mine"
    Path("text", "history.png").unlink()
    for _ in range(2):
        call("plot", "text")


@needs("mido")
def test_a_tune_of_others_is_replaced_only_where_that_is_said(copied):
    import mido

    mido.MidiFile().save("mine.mid")
    before = Path("mine.mid").read_bytes()
    Path("mine.abc").write_text("X:1\nT:mine\n")
    assert "--out: mine.mid is there already" in refused("compose", "music", "--steps", 2, "--out", "mine.mid")
    assert "--out: mine.abc is there already" in refused("compose", "text", "--length", 9, "--out", "mine.abc")
    assert Path("mine.mid").read_bytes() == before and Path("mine.abc").read_text() == "X:1\nT:mine\n"
    for more in (["--overwrite"], []):
        call("compose", "music", "--steps", 2, "--out", "mine.mid", *more)
    said = refused("compose", "text", "--length", 9, "--out", "mine.abc", "--overwrite")
    assert "no whole ABC tune" in said and "is there already" not in said


def test_a_run_does_not_replace_its_data(copied):
    Path("data").mkdir()
    Path("tunes.json").rename(Path("data", "last.json"))
    before = Path("data", "last.json").read_bytes()
    for more in ([], ["--overwrite"]):
        refused("train", "music", "data/last.json", "--out", "data", *more, *TINY)
    assert Path("data", "last.json").read_bytes() == before and len(os.listdir("data")) == 1


@pytest.mark.long
@posix
@pytest.mark.parametrize("kind", ["fifo", "device", "stdout"])
def test_special_files_are_written_to(copied, kind):
    got = []
    if kind == "fifo":
        os.mkfifo("out")
        reader = threading.Thread(target=lambda: got.append(Path("out").read_text()))
        reader.start()
        call("forecast", "series", "--out", "out")
        reader.join(10)
        assert stat.S_ISFIFO(os.lstat("out").st_mode) and "sales" in got[0]
    elif kind == "device":
        ours, theirs = os.openpty()
        os.symlink(os.ttyname(theirs), "link")
        call("forecast", "series", "--out", "link")
        assert "sales" in os.read(ours, 1000).decode() and os.path.islink("link") and Path("link").is_char_device()
        os.close(ours)
        os.close(theirs)
    else:
        os.symlink("/proc/self/fd/1", "mystdout")  # what /dev/stdout is
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for plain in (True, False):
            with open("plain", "wb") if plain else contextlib.nullcontext() as file:
                done = subprocess.run(
                    command("forecast", "series", "--out", "mystdout"), env=environment, check=True,
                    stdout=file or subprocess.PIPE,
                )  # fmt: skip
            said = (Path("plain").read_bytes() if plain else done.stdout).decode()
            assert "month,sales" in said and "mystdout" in said and os.path.islink("mystdout")


@posix
def test_modes_are_kept(copied):
    Path("f.csv").touch()
    Path("f.csv").chmod(0o640)  # the temporary file has 0o600 until it is whole
    call("forecast", "series", "--out", "f.csv")
    assert stat.S_IMODE(os.stat("f.csv").st_mode) == 0o640
    for file in Path("text").iterdir():
        file.chmod(0o600)
    call("train", "text", "--out", "text", "--resume", "--epochs", 2, "--no-progress")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in Path("text").iterdir()}
    assert set(modes.values()) == {0o600}, modes


@pytest.mark.long
@posix
@needs("matplotlib")
def test_links_are_not_followed(copied, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(copied)
    Path("victim").write_text("mine")
    victim = Path("victim").resolve()
    for name in ("history.jsonl", "history.png", "gradient_flow.jsonl", "config.json", "last.json"):
        kept = Path("text", name).read_bytes() if Path("text", name).exists() else None
        if kept is None or name in ("history.png", "history.jsonl"):
            Path("text", name).unlink(missing_ok=True)
            Path("text", name).symlink_to(victim)
        else:  # readable: a link to a copy
            Path("copy.json").write_bytes(kept)
            Path("text", name).unlink()
            Path("text", name).symlink_to(Path("copy.json").resolve())
        before = Path("copy.json").read_bytes() if Path("copy.json").exists() else None
        assert name in refused("train", "text", "--out", "text", "--resume", "--epochs", 2, "--no-progress")
        if name == "history.png":
            refused("plot", "text")
        assert victim.read_text() == "mine" and os.path.islink(Path("text", name))
        assert before is None or Path("copy.json").read_bytes() == before
        Path("text", name).unlink()
        if kept is not None:
            Path("text", name).write_bytes(kept)
    Path("music", "tune.mid").symlink_to(victim)
    if Path("music").exists() and "mido" in sys.modules:
        call("compose", "music", "--steps", 2)
    Path("link.csv").symlink_to(victim)
    assert "link" in refused("forecast", "series", "--out", "link.csv")
    assert victim.read_text() == "mine"


def test_there_is_one_helper_that_writes():
    """No other module renames files, or opens one to write it, but the cache of kernels with its whole folders."""
    import re

    pattern = re.compile(r"os\.(replace|rename)\(|\.write_(text|bytes)\(|\bopen\([^)]*[\"'][wxa]b?\+?[\"']|np\.save\(")
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("gpurnn", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if pattern.search(re.sub(r"(?m)^ *>>>.*", "", path.read_text(encoding="utf-8")))  # examples may write
    }
    expected = {"gpurnn/files/system.py", "gpurnn/files/places.py", "gpurnn/backends/cuda/cubins.py"}
    assert found == expected | {"bench/long.py"}, found  # which writes to the kernel's count of memory


@posix
def test_temporary_files_of_killed_processes_are_swept(copied):
    left = [".f.csv.01234567.tmp", "text/.config.json.01234567.tmp", "text/.history.png.89abcdef.tmp"]
    for name in left:
        Path(name).write_text("half")
    other = Path(".other.csv.01234567.tmp")
    other.write_text("of another")
    call("forecast", "series", "--out", "f.csv")
    call("train", "text", "--out", "text", "--resume", "--epochs", 2, "--no-progress")
    assert not [name for name in left if Path(name).exists()] and other.exists()


@posix
def test_a_temporary_file_that_is_being_written_stays(tmp_path):
    import fcntl

    from gpurnn.files import write_text_atomic

    writing = tmp_path / ".a.txt.01234567.tmp"
    with open(writing, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_text_atomic(tmp_path / "a.txt", "new")
        assert writing.exists()
    write_text_atomic(tmp_path / "a.txt", "newer")
    assert os.listdir(tmp_path) == ["a.txt"]


# ---- C1: one process in a folder


def start(folder, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments), cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip


@pytest.mark.slow
def test_runs_that_start_together_have_folders_of_their_own(copied):
    started = [
        start(copied, "train", "text", "book.txt", "--steps", 8, "--batch", 4, *TINY, "--json") for _ in range(3)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended
    assert len({json.loads(out)["run"] for out, _ in ended}) == 3
    assert sorted(os.listdir("runs")) == ["text-1", "text-2", "text-3"]
    for folder in Path("runs").iterdir():
        assert len(folder.joinpath("history.jsonl").read_text().splitlines()) == len(
            Path("runs", "text-1", "history.jsonl").read_text().splitlines()
        )
        load(folder, "cpu")


@pytest.mark.long
def test_a_folder_serves_one_training_at_a_time(copied):
    long = ["--out", "one", "--steps", 8, "--batch", 4, *TINY, "--epochs", 100000, "--schedule", "constant"]
    first = start(copied, "train", "text", "book.txt", *long)
    try:
        while not Path("one", "last.json").exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        for how in (["--resume"], ["book.txt", "--overwrite", *TINY]):
            said = refused("train", "text", "--out", "one", *how)
            assert f"process {first.pid} on host" in said, said
        assert first.poll() is None
        load("one", "cpu")  # reading is free
        first.send_signal(signal.SIGKILL)
    finally:
        first.kill()
        first.communicate()
    assert Path("one", ".lock").exists()
    epochs = json.loads(Path("one", "last.json").read_text())["document"]["epoch"]
    call("train", "text", "--out", "one", "--resume", "--epochs", epochs + 1, "--no-progress")
    assert not Path("one", ".lock").exists()


def test_a_lock_of_another_host_is_named(copied):
    from gpurnn.folder_lock import FolderInUseError, lock_folder

    who = {"pid": 7, "host": "elsewhere", "since": "yesterday", "boot": "another", "born": None}
    Path("text", ".lock").write_text(json.dumps(who))
    for _ in range(2):
        said = refused("train", "text", "--out", "text", "--resume", "--epochs", 2, "--no-progress")
        assert "process 7 on host elsewhere since yesterday" in said and ".lock" in said
        assert "wait for its end, stop it, or choose another folder. That host cannot be asked" in said
    Path("text", ".lock").write_text("")  # its writer was killed before it wrote
    lock = lock_folder("text")
    lock.active = True
    with pytest.raises(FolderInUseError, match="this process"):
        lock_folder("text")
    lock.close()
    assert not Path("text", ".lock").exists()


CHILD = """
import os, sys, time
from gpurnn.folder_lock import lock_folder
lock = lock_folder(sys.argv[1])
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.long
@posix
def test_a_lock_that_outlives_its_process_says_so(copied):
    """A forked child holds the same open file."""
    first = subprocess.Popen(
        [sys.executable, "-c", CHILD, "text"], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    child = int(first.stdout.readline())
    resume = ["train", "text", "--out", "text", "--resume", "--no-progress"]
    try:
        assert f"process {first.pid} on host" in refused(*resume) and "started" not in refused(*resume)
        first.kill()
        first.wait()
        assert f"or by one that it started ({first.pid} itself has ended): wait" in refused(*resume)
    finally:
        first.stdout.close()
        os.kill(child, signal.SIGKILL)
    ends = time.monotonic() + 20
    while "in use" in CliRunner().invoke(main, resume).output and time.monotonic() < ends:
        time.sleep(0.01)
    call(*resume)


@pytest.mark.skipif(not hasattr(os, "link"), reason="needs hard links")
@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_hard_links_to_a_runs_files_keep_what_they_have(copied, how):
    call("train", "text", "--out", "text", "--resume", "--epochs", 2, "--flow", "--no-progress")
    Path("text", ".lock").write_text("not a lock")
    Path("kept").mkdir()
    for path in Path("text").iterdir():
        os.link(path, Path("kept", path.name))
    before = {path.name: path.read_bytes() for path in Path("kept").iterdir()}
    if how == "resume":
        call("train", "text", "--out", "text", "--resume", "--epochs", 3, "--flow", "--no-progress")
    else:
        call("train", "text", "book.txt", "--out", "text", "--overwrite", "--steps", 8, "--batch", 4, *TINY)
    assert {path.name: path.read_bytes() for path in Path("kept").iterdir()} == before
    epochs = [json.loads(line)["epoch"] for line in Path("text", "history.jsonl").read_text().splitlines()]
    assert sorted(set(epochs)) == ([1, 2, 3] if how == "resume" else [1]) and not Path("text", ".lock").exists()


@pytest.mark.long
@pytest.mark.parametrize("pid", ["1e400", "-1e400", "NaN", "9" * 5000, '"x"', "[7]", "null", "1" + "0" * 300])
def test_a_lock_that_says_nonsense_is_taken_over(copied, pid):
    for host in (f'"{platform.node()}"', "3", "[]"):
        text = f'{{"pid": {pid}, "host": {host}, "since": "now", "boot": null, "born": null}}'
        Path("text", ".lock").write_text(text)
        done = CliRunner().invoke(main, ["train", "text", "--out", "text", "--resume", "--no-progress"])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == 0 or "is in use by process 1" in done.stderr, done.output


FORK = """
import os, sys, threading, time
from gpurnn.folder_lock import FolderInUseError, lock_folder

sys.setswitchinterval(1e-6)
folders = [f"folder-{n}" for n in range(5)]
for folder in folders:
    os.mkdir(folder)
over = False

def work(folder):
    while not over:
        lock_folder(folder).close()

threads = [threading.Thread(target=work, args=[folder], daemon=True) for folder in folders[:4]]
for thread in threads:
    thread.start()
mine, hung = lock_folder(folders[4]), 0
mine.active = True
for number in range(60):
    time.sleep(0.001 * (number % 5))
    child = os.fork()
    if child == 0:
        try:
            lock_folder(folders[4])
        except FolderInUseError as error:  # the parent's
            os._exit(0 if f"process {os.getppid()} on host" in str(error) else 3)
        os._exit(4)
    ends = time.monotonic() + 10
    while not hung:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, f"a child ended with {status}"
            break
        if time.monotonic() > ends:
            os.kill(child, 9)
            os.waitpid(child, 0)
            hung = 1
        time.sleep(0.001)
    if hung:
        break
over = True
for thread in threads:
    thread.join()
assert not hung, "a child hung"
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_beside_threads_that_lock_folders(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_a_prepared_run_holds_its_folder(copied):
    options = dict(hidden=4, steps=8, batch=4, epochs=1, backend="cpu")
    run = prepare("text", ["book.txt"], "mine", **options)
    other = start(copied, "train", "text", "book.txt", "--out", "mine", "--overwrite", *TINY)
    assert "in use by process" in other.communicate(timeout=60)[1] and other.returncode == 1
    again = prepare("text", ["book.txt"], "mine", overwrite=True, **options)  # the same notebook's cell once more
    with pytest.raises(ValueError, match="another run was prepared in mine since"):
        run.train(progress=False)
    history = again.train(progress=False)
    assert not Path("mine", ".lock").exists()
    again.finish(history)
    assert sorted(set(os.listdir("mine"))) == sorted(os.listdir("mine"))
    with prepare("text", ["book.txt"], "fresh", **options):
        assert Path("fresh", ".lock").exists()
    assert os.listdir("fresh") == ["config.json"]


def test_a_run_that_cannot_begin_leaves_nothing(copied):
    Path("empty.txt").touch()
    before = sorted(os.listdir("."))
    refused("train", "text", "empty.txt", "--out", "deep/down/run", *TINY)
    refused("train", "text", "empty.txt", *TINY)
    assert sorted(set(os.listdir(".")) - {"runs"}) == before and not (Path("runs").exists() and os.listdir("runs"))


@posix
@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda path: path.symlink_to(os.devnull), "a device"),
        (os.mkfifo, "a pipe"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(str(path.relative_to(Path.cwd()))), "a socket"),
        (lambda path: path.touch(), "a file"),
        (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
    ],
    ids=["device", "pipe", "socket", "file", "dangling"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_folder_is_told(copied, make, kind):
    """Of a run, of ``fit``, of a picture; and above the folder that is asked for."""
    make(copied / "odd")
    before = sorted(os.listdir("."))
    text = refused("train", "text", "book.txt", "--out", "odd", "--steps", 8, "--batch", 4, *TINY)
    assert f"odd: is {kind}, not a folder: choose another" in text or "Directory 'odd' is a file" in text
    if kind != "a link to nothing":
        text = refused("train", "text", "book.txt", "--out", "odd/run", "--steps", 8, "--batch", 4, *TINY)
        assert f"odd: is {kind}, not a folder: choose another" in text
    with pytest.raises(FileError, match=f"odd: is {kind}, not a folder"):
        prepare("text", ["book.txt"], "odd")
    with pytest.raises(FileError, match=f"odd: is {kind}, not a folder"):
        files.make_folder("odd")
    Path("runs").symlink_to("odd")
    assert f"runs: is {kind}, not" in refused("train", "text", "book.txt", "--steps", 8, "--batch", 4, *TINY)
    os.remove("runs")
    assert sorted(os.listdir(".")) == before
    if kind != "a link to nothing":
        with pytest.raises(FileError, match=f"odd: is {kind}, not a folder"):
            fit_into("odd/run")


def fit_into(folder):
    model = gpurnn.Sequential(gpurnn.LSTM(2, 2, seed=0), gpurnn.Linear(2, 1, seed=0))
    batches = gpurnn.SequenceBatches([np.zeros((3, 2), "f4")], [np.zeros((3, 1), "f4")], 1)
    gpurnn.fit(model, gpurnn.mse, batches, optimizer=gpurnn.SGD(model, 0.1), epochs=1, out=folder, progress=False)


# ---- sentences


def test_a_folder_that_holds_a_run_says_what_to_do(copied):
    text = refused("train", "text", "book.txt", "--out", "text", *TINY)
    assert "continue it with --resume, replace it with --overwrite" in text


@posix
def test_a_link_and_a_read_only_file_are_told_plainly(copied, monkeypatch):
    Path("ln.csv").symlink_to("s.csv")
    Path("s.csv").touch()
    text = refused("forecast", "series", "--out", "ln.csv")
    assert "ln.csv: is a link to s.csv. Links are not followed: name s.csv itself" in text and "Errno" not in text
    os.chmod("s.csv", 0o400)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anything
    text = refused("forecast", "series", "--out", "s.csv")
    assert "s.csv: is read-only: choose another name" in text and "Errno" not in text
    monkeypatch.undo()
    Path(copied, "text", "history.jsonl").unlink()
    Path(copied, "text", "history.jsonl").mkdir()
    monkeypatch.chdir(copied)
    text = refused("train", "text", "--out", "text", "--resume", "--epochs", 2, "--no-progress")
    assert "history.jsonl: is a folder, not a file" in text and "Errno" not in text


@pytest.mark.parametrize("name", ["f.csv", "f.gif", "f.PNGX"])
def test_a_picture_of_a_kind_that_is_not_drawn(copied, name):
    text = refused("forecast", "series", "--plot", name, "--out", "y.csv")
    assert f"--plot: {name} would be a picture: expected a name that ends with one of .png, .svg" in text
    assert not Path(name).exists() and not Path("y.csv").exists()


@needs("mido")
@pytest.mark.parametrize("name", ["t.wav", "t.png", "t.mid.txt"])
def test_a_tune_is_written_as_midi_alone(copied, name):
    text = refused("compose", "music", "--out", name)
    assert f"--out: {name} would hold MIDI: name the file such as t" in text and not Path(name).exists()


@needs("mido")
def test_midi_that_ends_too_early(copied):
    Path("short.mid").write_bytes(b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk\0\0\0\x20\0\x90")
    text = refused("evaluate", "music", "short.mid")
    assert "short.mid: is damaged MIDI: it ends too early" in text


@pytest.mark.long
def test_the_result_of_a_run_whose_records_are_missing(copied):
    call("train", "text", "--out", "text", "--resume", "--epochs", 3, "--no-progress")
    log = Path("text", "history.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"epoch": 3' in line))
    output = call("train", "text", "--out", "text", "--resume", "--epochs", 4, "--no-progress").output
    assert f"{log}: the records of 2 epochs are missing: this is told of the others." in " ".join(output.split())
    log.write_text("")
    assert "The model is whole" in refused("train", "text", "--out", "text", "--resume", "--no-progress")
    call("sample", "text", "--length", 3)


# ---- variables that are wrong


@pytest.mark.long
@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("GPURNN_NUM_THREADS", "abc", "whole number from 1 to 4096"),
        ("GPURNN_NUM_THREADS", "9" * 5000, "whole number from 1 to 4096"),
        ("GPURNN_ISA", "sse9", "should be one of"),
        ("GPURNN_BACKEND", "tpu", "unknown backend"),
        ("GPURNN_MAX_MEMORY", "abc", "number of bytes"),
        ("GPURNN_MAX_MEMORY", "9" * 400, "number of bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_a_wrong_variable_is_named_and_no_file(copied, monkeypatch, name, text, expected):
    if name in ("GPURNN_NUM_THREADS", "GPURNN_ISA") and cpu_ops.load_native() is None:
        pytest.skip("gpurnn._native was not built")
    environment = os.environ | {"PYTHONPATH": str(ROOT), name: text}
    for arguments in (
        ["sample", "text", "--length", 3],
        ["evaluate", "text", "book.txt"],
        ["train", "text", "book.txt", "--steps", 8, "--batch", 4, "--epochs", 1, "--out", "new", "--no-progress"],
        ["train", "text", "--out", "text", "--resume", "--epochs", 9, "--no-progress"],
    ):
        if name == "GPURNN_BACKEND" and "--resume" in arguments:
            continue  # it has the run's own
        done = subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, timeout=60)
        errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert done.returncode == 2 and len(errors) == 1, done.stderr
        assert errors[0].startswith(f"Error: {name}") and expected in errors[0] and len(errors[0]) < 200, errors
        assert "book.txt" not in errors[0] and "config.json" not in errors[0]
    assert not Path("new").exists()
    assert read_run("text")[0].epochs == 1


@pytest.mark.parametrize("text", ["abc", "9" * 400, "1e5", "-1", "0.5.5"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="max_memory should be a number of bytes.*got '"):
        files.parse_size(text)
    assert "max_memory should be" in refused("train", "text", f"--max-memory={text}")


def test_sizes():
    assert [files.parse_size(text) for text in ("0", "800M", "1.5 KiB", 7, "0.4")] == [math.inf, 800 << 20, 1536, 7, 0]


# ---- the limit that a user sets for data


@pytest.mark.parametrize("level", ["characters", "words"])
def test_a_text_is_refused_before_training(copied, level):
    Path("big.txt").write_text("a gate keeps the state\n" * 2000)
    more = ["--level", level, "--steps", 8, "--batch", 4, "--out", "new", *TINY]
    text = refused("train", "text", "big.txt", "--max-memory", "100K", *more)
    assert "big.txt: a piece of the text would take" in text and "--max-memory 1G" in text
    assert not Path("new").exists()
    assert "big.txt: a piece" in refused("evaluate", "text", "big.txt", "--max-memory", "100K")


@pytest.mark.long
def test_a_limit_for_data_does_not_judge_a_runs_own_files(copied):
    for _ in range(6):
        Path("text", "history.jsonl").write_text(Path("text", "history.jsonl").read_text() * 2)
    small = ["--max-memory", "20K"]
    call("train", "text", "book.txt", "--out", "new", "--steps", 8, "--batch", 4, *TINY, *small)
    call("train", "text", "--out", "new", "--resume", "--epochs", 2, "--no-progress", *small)
    call("sample", "text", "--length", 3, *small)
    assert "history.png" in call("plot", "text", *small).output


def test_a_text_that_does_not_fit_lies_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("GPURNN_MAX_MEMORY", "10M")
    (tmp_path / "big.txt").write_text("a gate keeps the state\n" * 100_000)
    ids, vocabulary = read_text([tmp_path / "big.txt"], folder=tmp_path)
    assert isinstance(ids, np.memmap) and len(ids) == 2_300_000 and vocabulary.decode(ids[:6]) == "a gate"
