"""Files: what is written is whole, keeps its mode and replaces nothing of others; what is read is looked at first."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from optional import needs

from gpurnn.cli import main
from gpurnn.tasks.run import load, prepare

ROOT = Path(__file__).parents[1]
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


def test_a_run_does_not_replace_its_data(copied):
    Path("data").mkdir()
    Path("tunes.json").rename(Path("data", "last.json"))
    before = Path("data", "last.json").read_bytes()
    for more in ([], ["--overwrite"]):
        refused("train", "music", "data/last.json", "--out", "data", *more, *TINY)
    assert Path("data", "last.json").read_bytes() == before and len(os.listdir("data")) == 1


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
    Path("f.csv").touch(0o600)
    call("forecast", "series", "--out", "f.csv")
    assert stat.S_IMODE(os.stat("f.csv").st_mode) == 0o600
    for file in Path("text").iterdir():
        file.chmod(0o600)
    call("train", "text", "--out", "text", "--resume", "--epochs", 2, "--no-progress")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in Path("text").iterdir()}
    assert set(modes.values()) == {0o600}, modes


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
        if pattern.search(path.read_text(encoding="utf-8"))
    }
    assert found <= {"gpurnn/files.py", "gpurnn/_cubins.py"}, found


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
    Path("text", ".lock").write_text("")  # its writer was killed before it wrote
    lock = lock_folder("text")
    lock.active = True
    with pytest.raises(FolderInUseError, match="this process"):
        lock_folder("text")
    lock.close()
    assert not Path("text", ".lock").exists()


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
