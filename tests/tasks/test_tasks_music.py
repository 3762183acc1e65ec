"""Music: reading and writing rolls, batches, loss and score, composing, and a run from files to a MIDI file."""

import json

import hostile
import numpy as np
import pytest
from click.testing import CliRunner
from optional import given, needs, optional

from gpurnn.cli import main
from gpurnn.data.midi import KEYS, read_midi, write_midi
from gpurnn.data.rolls import read_parts
from gpurnn.data.vocabulary import Vocabulary
from gpurnn.errors import FileError, ShapeError
from gpurnn.tasks.music import (
    TASK,
    MusicSettings,
    RollBatches,
    compose,
    compose_abc,
    frame_loss,
    key_statistics,
    score,
)
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load

mido, st = optional("mido"), optional("hypothesis.strategies")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("gpurnn.plots.plot_run", lambda folder: [])


def tunes(count=24, T=24):
    """Pieces of a rule that has to be learned: a bass that walks through four keys, and a chord every fourth frame."""
    made = []
    for n in range(count):
        roll = np.zeros((T + n % 5, KEYS), np.uint8)
        for t in range(len(roll)):
            roll[t, 30 + (t + n) % 4 * 2] = 1
            if (t + n) % 4 == 0:
                roll[t, [44, 48, 51]] = 1
        made.append(roll)
    return made


def as_lists(pieces):
    return [[(21 + np.flatnonzero(frame)).tolist() for frame in piece] for piece in pieces]


def save_npz(path, **parts):
    arrays = {f"{name}_roll": np.concatenate(pieces) for name, pieces in parts.items()}
    np.savez(path, **arrays, **{f"{name}_length": [len(p) for p in pieces] for name, pieces in parts.items()})
    return path


def random_roll(T, seed, density=0.1):
    return (np.random.default_rng(seed).random((T, KEYS)) < density).astype(np.uint8)


# ---- reading and writing


def test_npz_and_json_hold_the_same(tmp_path):
    parts = {"train": tunes(3), "valid": tunes(2), "test": tunes(4)[2:]}
    save_npz(tmp_path / "a.npz", **parts)
    (tmp_path / "a.json").write_text(json.dumps({name: as_lists(pieces) for name, pieces in parts.items()}))
    (tmp_path / "b.json").write_text(json.dumps(as_lists(parts["train"])))
    for name in ("a.npz", "a.json"):
        found = read_parts([tmp_path / name], 1.0)
        for part, pieces in parts.items():
            assert len(found[part]) == len(pieces)
            assert all(np.array_equal(a, b) for a, b in zip(found[part], pieces, strict=True))
    alone = read_parts([tmp_path / "b.json"], 1.0)
    assert [len(alone[part]) for part in ("train", "valid", "test")] == [3, 0, 0]
    together = read_parts([tmp_path], 1.0)  # the folder: a.json, a.npz, b.json
    assert [len(together[part]) for part in ("train", "valid", "test")] == [9, 4, 4]


@pytest.mark.parametrize("step, density", [(1.0, 0.1), (0.25, 0.5), (1 / 3, 0.02)])
def test_a_roll_survives_midi(tmp_path, step, density):
    roll = random_roll(40, 3, density)
    roll[-1, 5] = 1
    write_midi(tmp_path / "a.mid", roll, step, tempo=77)
    assert np.array_equal(read_midi(tmp_path / "a.mid", step), roll)
    notes = [m for m in mido.MidiFile(tmp_path / "a.mid").tracks[0] if m.type == "note_on"]
    rises = np.diff(np.vstack([np.zeros((1, KEYS), int), roll]), axis=0) > 0
    assert len(notes) == rises.sum()  # held keys are one note


def test_midi_has_its_length_and_tempo(tmp_path):
    roll = np.zeros((8, KEYS), np.uint8)
    roll[2:4, 10] = 1
    write_midi(tmp_path / "a.mid", roll, step=0.5, tempo=120)
    assert mido.MidiFile(tmp_path / "a.mid").length == pytest.approx(8 * 0.5 * 60 / 120)  # the silence at the end, too


def test_midi_times_are_exact_to_the_tick(tmp_path):
    roll = np.zeros((7, 88), np.uint8)
    roll[2:5, 30], roll[4:7, 40] = 1, 1
    write_midi(tmp_path / "a.mid", roll, step=0.25)
    now, told = 0, []
    for message in mido.MidiFile(tmp_path / "a.mid").tracks[0]:
        now += message.time
        told.append((message.type, getattr(message, "note", None), now))
    frame = 120  # a quarter of 480 ticks
    assert told == [
        ("set_tempo", None, 0), ("text", None, 0), ("note_on", 51, 2 * frame), ("note_on", 61, 4 * frame),
        ("note_off", 51, 5 * frame), ("note_off", 61, 7 * frame), ("end_of_track", None, 7 * frame),
    ]  # fmt: skip


def test_midi_is_rounded_to_frames_and_no_further(tmp_path):
    """A tick before the middle of a frame, and one behind it."""
    for late, first in ((239, 0), (241, 1)):
        file = mido.MidiFile(ticks_per_beat=480)
        file.tracks.append(mido.MidiTrack([
            mido.Message("note_on", note=60, velocity=9, time=late), mido.Message("note_off", note=60, time=960 - late),
        ]))  # fmt: skip
        file.save(tmp_path / "a.mid")
        assert np.flatnonzero(read_midi(tmp_path / "a.mid")[:, 39]).tolist() == list(range(first, 2))


def test_midi_of_others(tmp_path):
    """Two tracks, drums, note_on with velocity 0, a key struck again, a note shorter than a frame, one left open."""
    file = mido.MidiFile(ticks_per_beat=96)
    one, two = file.add_track(), file.add_track()
    on, off = "note_on", "note_off"
    for kind, note, velocity, wait in [
        (on, 60, 9, 0), (on, 60, 0, 96), (on, 62, 9, 0), (on, 62, 9, 96), (off, 62, 9, 96), (on, 64, 9, 0),
        (off, 64, 9, 5),
    ]:  # fmt: skip
        one.append(mido.Message(kind, note=note, velocity=velocity, time=wait))
    two.append(mido.Message(on, note=36, velocity=9, time=0, channel=9))
    two.append(mido.Message(on, note=21, velocity=9, time=192, channel=2))
    two.append(mido.MetaMessage("end_of_track", time=192))
    file.save(tmp_path / "a.mid")
    roll = read_midi(tmp_path / "a.mid", 1.0)
    expected = np.zeros((4, KEYS))
    expected[0, 39] = expected[1:3, 41] = expected[3, 43] = expected[2:4, 0] = 1
    assert np.array_equal(roll, expected)


def write_bad(path, what):
    roll, length = np.zeros((5, KEYS), np.uint8), np.array([5])
    arrays = {
        "no arrays": {"x": roll},
        "no length": {"train_roll": roll},
        "narrow": {"train_roll": roll[:, :80], "train_length": length},
        "values": {"train_roll": roll + 2, "train_length": length},
        "lengths": {"train_roll": roll, "train_length": length + 1},
        "objects": {"train_roll": np.array([[None]]), "train_length": length},
    }
    texts = {
        "not JSON": b"[[[60",
        "encoding": b'["\xff"]',
        "no list": b"[[60, 62]]",
        "pitch": b"[[[60], [20]]]",
        "no number": b'[[["C"]]]',
        "names": b'{"training": []}',
        "silent": b"[[], []]",
    }
    if what in arrays:
        np.savez(path.with_suffix(".npz"), **arrays[what])
        return path.with_suffix(".npz")
    if what in texts:
        path.with_suffix(".json").write_bytes(texts[what])
        return path.with_suffix(".json")
    if what == "high note":
        file = mido.MidiFile()
        file.add_track().append(mido.Message("note_on", note=120))
        file.save(path.with_suffix(".mid"))
        return path.with_suffix(".mid")
    if what == "no notes":
        mido.MidiFile().save(path.with_suffix(".mid"))
        return path.with_suffix(".mid")
    path = path.with_suffix({"no zip": ".npz", "no MIDI": ".mid", "empty": ".mid"}.get(what, f".{what}"))
    path.write_bytes(b"" if what == "empty" else b"MThd nonsense")
    return path


@pytest.mark.parametrize(
    "what, words",
    [
        ("no arrays", "expected arrays such as train_roll"),
        ("no length", "train_length is missing"),
        ("narrow", r"train_roll: expected .* \(frames, 88\), got uint8 \(5, 80\)"),
        ("values", "expected 0 and 1"),
        ("lengths", "5 frames in all"),
        ("objects", "is not an .npz file of arrays"),
        ("no zip", "is not an .npz file of arrays"),
        ("not JSON", "is not JSON"),
        ("encoding", "is not JSON"),
        ("no list", "piece 0, frame 0: expected a list, got int"),
        ("pitch", "train, piece 0, frame 1: expected MIDI numbers from 21 to 108, got 20"),
        ("no number", "got 'C'"),
        ("names", r"train, valid, test, got \['training'\]"),
        ("silent", "every piece is empty"),
        ("no MIDI", "is damaged MIDI: it ends too early"),
        ("empty", "is not a MIDI file: it does not begin with MThd"),
        ("no notes", "has no notes"),
        ("high note", r"all of its notes, 1, are outside a piano's keys \(MIDI numbers 21 to 108\)"),
        ("abc", "gpurnn train text"),
        ("wav", "expected a file of music"),
    ],
)
def test_bad_files_are_named(tmp_path, what, words):
    path = write_bad(tmp_path / "bad", what)
    with pytest.raises(ValueError, match=words) as caught:
        read_parts([path], 1.0)
    assert str(path) in str(caught.value)


def save_notes(path, *notes, channel=0):
    """A MIDI file of quarter notes, one after another."""
    file = mido.MidiFile(ticks_per_beat=96)
    track = file.add_track()
    for note in notes:
        track.append(mido.Message("note_on", note=note, velocity=9, time=0, channel=channel))
        track.append(mido.Message("note_off", note=note, time=96, channel=channel))
    file.save(path)
    return path


def test_bad_files_of_a_folder_are_skipped_and_counted(tmp_path, caplog):
    save_notes(tmp_path / "a.mid", 60, 62)
    save_notes(tmp_path / "drums.mid", 36, 38, channel=9)
    (tmp_path / "cut.mid").write_bytes((tmp_path / "a.mid").read_bytes()[:-20])
    for name in ("x.json", "y.json"):
        (tmp_path / name).write_text("[[[")
    for files in ([tmp_path], sorted(tmp_path.iterdir())):  # a folder, and a list
        caplog.clear()
        parts = read_parts(files, 1.0)
        assert [np.argwhere(piece).tolist() for piece in parts["train"]] == [[[0, 39], [1, 41]]]
        (said,) = [record.getMessage().splitlines() for record in caplog.records]
        assert said[0] == "4 of 5 files of music skipped:" and said[4] == "  and 1 more"
        assert said[1] == f"  {tmp_path / 'cut.mid'}: is damaged MIDI: it ends too early"
        assert said[2] == f"  {tmp_path / 'drums.mid'}: has no notes but those of drums"
        assert said[3].startswith(f"  {tmp_path / 'x.json'}: is not JSON")
        with pytest.raises(FileError, match="cut.mid: is damaged MIDI"):
            read_parts(files, 1.0, strict=True)
    with pytest.raises(FileError, match=r"drums.mid: has no notes .* \(none of the 2 files of music can be used\)"):
        read_parts([tmp_path / "drums.mid", tmp_path / "x.json"], 1.0)
    with pytest.raises(FileNotFoundError):
        read_parts([tmp_path / "none.mid"], 1.0)


def test_notes_that_no_piano_has_are_left_out_and_counted(tmp_path, caplog):
    save_notes(tmp_path / "a.mid", 60, 20, 62)
    save_notes(tmp_path / "b.mid", 109, 21, 108, 127)
    save_notes(tmp_path / "c.mid", 64)
    rule = "notes left out because they are outside a piano's keys (MIDI numbers 21 to 108)"
    roll = read_midi(tmp_path / "a.mid")
    assert np.argwhere(roll).tolist() == [[0, 39], [2, 41]]
    parts = read_parts([tmp_path], 1.0)
    assert [np.argwhere(piece).tolist() for piece in parts["train"]] == [
        [[0, 39], [2, 41]], [[1, 0], [2, 87]], [[0, 43]]
    ]  # fmt: skip
    read_parts([tmp_path / "b.mid"], 1.0)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.mid'}: {rule}: 1", f"2 of 3 files of music: {rule}: 3", f"{tmp_path / 'b.mid'}: {rule}: 2",
    ]  # fmt: skip
    for strict in (lambda: read_midi(tmp_path / "b.mid", strict=True), lambda: read_parts([tmp_path], 1.0, True)):
        with pytest.raises(FileError, match=r"[ab].mid: has notes outside a piano's keys .*: [12]"):
            strict()


def test_strict_is_an_option_and_evaluation_follows_it(tmp_path):
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    (pieces / "a.json").write_text(json.dumps(as_lists(tunes(4))))
    (pieces / "b.json").write_text("[[[")
    options = dict(hidden=4, epochs=1, seed=0, valid=0.0, backend="cpu")
    with pytest.raises(FileError, match="b.json: is not JSON"):
        prepare("music", [pieces], tmp_path / "strict", strict=True, **options)
    prepare("music", [pieces], tmp_path / "run", **options).train(progress=False)
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run"), str(pieces), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["pieces"] == 4
    done = CliRunner().invoke(main, ["train", "music", str(pieces), "--strict", "--out", str(tmp_path / "x")])
    assert done.exit_code == 2 and "b.json: is not JSON" in done.output


def changed_midi():
    """A good file with some bytes replaced, cut, or any bytes."""
    good = hostile.midi([(0, 0x90, 60, 64), (96, 0x80, 60, 0), (0, 0x99, 36, 64), (9, 0x90, 120, 64)] * 3)
    changes = st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4)

    def apply(changes, cut):
        data = bytearray(good)
        for place, value in changes:
            data[place] = value
        return bytes(data[: cut or None])

    return st.one_of(st.builds(apply, changes, st.sampled_from([0, 0, 0, 30])), st.binary(max_size=60))


@pytest.mark.long
@needs("mido")
@needs("hypothesis")
def test_no_bytes_of_midi_raise_anything_but_a_file_error(tmp_path):
    path, outcomes = tmp_path / "a.mid", set()

    @given(changed_midi, max_examples=300)
    def check(data):
        path.write_bytes(data)
        try:
            roll = read_midi(path)
        except FileError as error:
            outcomes.add("refused")
            assert str(error).startswith(f"{path}: ")
        else:
            outcomes.add("read")
            assert roll.shape[1] == KEYS and roll.any()

    check()
    assert outcomes == {"refused", "read"}


def test_a_folder_without_music(tmp_path):
    with pytest.raises(ValueError, match="no files of music"):
        read_parts([tmp_path], 1.0)


# ---- batches, loss, score


def test_the_inputs_are_the_frames_before():
    pieces = tunes(5)
    source = RollBatches(pieces, 3, seed=1)
    seen = 0
    for index in range(len(source)):
        batch = source.batch(4, index)
        assert batch.inputs.dtype == batch.targets.dtype == np.float32
        assert not batch.inputs[0].any() and np.array_equal(batch.inputs[1:], batch.targets[:-1])
        for b, length in enumerate(batch.lengths):
            assert any(np.array_equal(batch.targets[:length, b], piece) for piece in pieces)
            assert not batch.targets[length:, b].any()
            seen += 1
    assert seen == 5


def test_transposed_pieces_stay_on_the_piano():
    low, wide = np.zeros((6, KEYS), np.uint8), np.zeros((6, KEYS), np.uint8)
    low[:, [1, 4]] = 1
    wide[:, [0, KEYS - 1]] = 1
    source = RollBatches(
        [low, wide, np.zeros((6, KEYS), np.uint8)], 3, transpose=3, shuffle=False, bucket=False, seed=0
    )
    shifts = set()
    for epoch in range(40):
        rolls = source.batch(epoch, 0).targets
        keys = np.flatnonzero(rolls[0, 0])
        assert keys[1] - keys[0] == 3 and (rolls[:, 0] == rolls[0, 0]).all()
        assert np.array_equal(rolls[:, 1], wide) and not rolls[:, 2].any()
        shifts.add(int(keys[0]) - 1)
        assert np.array_equal(rolls, source.batch(epoch, 0).targets)
    assert shifts == {-1, 0, 1, 2, 3}


def test_frame_loss_is_the_sum_over_keys():
    rng = np.random.default_rng(0)
    logits, rolls, lengths = (
        rng.standard_normal((4, 3, KEYS)),
        rng.integers(0, 2, (4, 3, KEYS)).astype(float),
        [4, 2, 0],
    )
    loss, backward = frame_loss(logits, rolls, lengths=lengths)
    p = 1 / (1 + np.exp(-logits))
    nll = -(rolls * np.log(p) + (1 - rolls) * np.log(1 - p)).sum(axis=2)
    assert loss == pytest.approx((nll[:, 0].sum() + nll[:2, 1].sum()) / 6, rel=1e-12)
    direction, gradient = rng.standard_normal(logits.shape), backward(2.0)
    eps = 1e-5
    ends = [frame_loss(logits + sign * eps * direction, rolls, lengths=lengths)[0] for sign in (1, -1)]
    assert (gradient * direction).sum() == pytest.approx(2 * (ends[0] - ends[1]) / (2 * eps), rel=1e-7)


def build(dtype="float64", **settings):
    settings = MusicSettings(hidden=7, dtype=dtype, seed=3, **settings)
    return TASK.build(settings, {"keys": key_statistics(tunes())}, "cpu").eval()


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_score_counts_frames(cell):
    """Against one piece at a time, with the sums written out; 40 pieces are more than one batch."""
    pieces, model = [*tunes(39), random_roll(1, 0)], build(cell=cell)
    keys = key_statistics(tunes(3))
    totals, firsts, repeat, frames = [], [], 0.0, 0
    often = np.array(keys["often"])
    for piece in pieces:
        before = np.vstack([np.zeros((1, KEYS)), piece[:-1]])
        p = 1 / (1 + np.exp(-model(before[:, None])[0][:, 0]))
        nll = -np.log(np.where(piece, p, 1 - p)).sum(axis=1)
        totals.append(nll.sum())
        firsts.append(nll[0])
        for t, frame in enumerate(piece):
            for k in range(KEYS):
                p = keys["kept" if before[t, k] else "struck"][k]
                repeat -= np.log(p if frame[k] else 1 - p)
        frames += len(piece)
    numbers = score(model, pieces, keys)
    assert numbers["nll"] == pytest.approx(sum(totals) / frames, rel=1e-12)
    assert numbers["nll_after_first"] == pytest.approx((sum(totals) - sum(firsts)) / (frames - 40), rel=1e-12)
    means = [total / len(piece) for total, piece in zip(totals, pieces, strict=True)]
    assert numbers["nll_per_piece"] == pytest.approx(np.mean(means), rel=1e-12)
    assert numbers["baseline_repeat"] == pytest.approx(repeat / frames, rel=1e-9)
    everything = np.concatenate(pieces)
    entropy = -np.log(np.where(everything, often, 1 - often)).sum() / frames
    assert numbers["baseline_often"] == pytest.approx(entropy, rel=1e-9)
    assert (numbers["pieces"], numbers["frames"]) == (40, frames)


def test_key_statistics():
    piece = np.zeros((4, KEYS), np.uint8)
    piece[1:3, 7] = 1  # off, on, on, off: before these come off, off, on, on
    keys = key_statistics([piece])
    assert keys["often"][7] == pytest.approx((2 + 1) / (4 + 2), rel=1e-5)
    assert keys["kept"][7] == pytest.approx((1 + 1) / (2 + 2), rel=1e-5)
    assert keys["struck"][7] == pytest.approx((1 + 1) / (2 + 2), rel=1e-5)
    assert keys["struck"][8] == pytest.approx(1 / 6, rel=1e-5)


def test_the_model_begins_with_the_frequencies():
    model = build()
    p = 1 / (1 + np.exp(-model["linear"].params["bias"]))
    np.testing.assert_allclose(p, key_statistics(tunes())["often"], rtol=1e-12)


# ---- composing


class Fixed:
    """A model that always says the same logits, and remembers what it read."""

    xp, dtype = np, np.dtype("float64")

    class ops:
        to_numpy = staticmethod(np.asarray)

    def __init__(self, logits):
        self.logits, self.read = np.asarray(logits, float), []

    def stepper(self, batch):
        return self

    def step(self, x):
        self.read.append(x[0])
        return self.logits[None]


def test_keys_are_drawn_with_their_probability():
    logits = np.linspace(-4, 4, KEYS)
    for temperature in (1.0, 2.5):
        roll = compose(Fixed(logits), 4000, temperature=temperature, seed=5)
        p = 1 / (1 + np.exp(-logits / temperature))
        off = (roll.mean(axis=0) - p) / np.sqrt(p * (1 - p) / 4000)
        assert np.abs(off).max() < 4.5 and off.std() < 1.3  # 88 standard normal numbers


def test_cold_is_a_threshold_and_voices_are_counted():
    logits = np.random.default_rng(1).standard_normal(KEYS)
    assert np.array_equal(compose(Fixed(logits), 3, temperature=0), np.tile(logits > 0, (3, 1)))
    cold = compose(Fixed(logits), 3, temperature=0, voices=4)
    assert np.array_equal(np.flatnonzero(cold[1]), np.sort(np.argsort(logits)[-4:]))
    warm = compose(Fixed(logits), 30, temperature=1.0, voices=4, seed=2)
    assert (warm.sum(axis=1) == 4).all() and len({frame.tobytes() for frame in warm}) > 10


def test_composing_reads_its_prompt_and_itself():
    prompt, model = random_roll(5, 9), Fixed(np.linspace(-3, 1, KEYS))
    roll = compose(model, 6, prompt=prompt, seed=4)
    assert roll.shape == (11, KEYS) and np.array_equal(roll[:5], prompt)
    assert not model.read[0].any() and np.array_equal(model.read[1:], roll[:-1])
    assert np.array_equal(compose(model, 9, prompt=prompt, seed=4)[:11], roll)  # frame n depends on (seed, n)
    assert not np.array_equal(compose(model, 6, prompt=prompt, seed=5), roll)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 0}, "steps"),
        ({"temperature": -1}, "temperature"),
        ({"voices": 89}, "88 keys"),
        ({"prompt": np.zeros((3, 4))}, r"prompt: expected shape \(T, 88\)"),
    ],
)
def test_compose_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        compose(Fixed(np.zeros(KEYS)), **options)
    with pytest.raises(ShapeError, match="roll"):
        write_midi("never.mid", np.zeros((3, 4)))
    for numbers, words in (({"step": 0}, "step should be"), ({"tempo": 3.9}, "tempo should be")):
        with pytest.raises(ValueError, match=words):
            write_midi("never.mid", np.zeros((3, KEYS)), **numbers)


class Reciting(Fixed):
    """A character model that recites ``text`` over and over, beginning anew behind every prompt."""

    def __init__(self, text):
        self.vocabulary = Vocabulary(text + "X: 0123456789")
        self.text, self.place = text, 0

    def stepper(self, batch):
        self.waiting = True
        return self

    def step(self, x):
        if self.waiting and self.vocabulary.decode(x[:1]) == ":":
            self.waiting = False
        logits = np.full(len(self.vocabulary), -1e9)
        if not self.waiting:
            logits[self.vocabulary.encode(self.text[self.place % len(self.text)])] = 0
            self.place += 1
        return logits[None]


def test_whole_tunes_are_kept_and_others_thrown_away():
    tune = " 7\nT:Round\nM:3/4\nK:G\nG2A|B3|\n\n"
    model = Reciting(" 9\nno tune\n\n" + tune + " 3\nK:D\n\n" + tune)
    made = compose_abc(model, model.vocabulary, tunes=2, length=200, seed=0)
    assert made == [f"X: {n}\nT:Round\nM:3/4\nK:G\nG2A|B3|\n" for n in (1, 2)]
    model = Reciting(" 9\nK:G\nabc\n")  # never an empty line
    with pytest.raises(ValueError, match="at most 50 characters in 20 attempts"):
        compose_abc(model, model.vocabulary, length=50)


# ---- whole runs


@pytest.mark.long
@needs("mido")
@needs("matplotlib")
def test_from_files_to_midi(tmp_path):
    """The command line on generated pieces: better than what knows the keys alone, resumed, composed, written."""
    pieces, run = tunes(30), str(tmp_path / "run")
    (tmp_path / "a.json").write_text(json.dumps({"train": as_lists(pieces[:24]), "test": as_lists(pieces[24:])}))
    files = ["train", "music", str(tmp_path / "a.json"), "--out", run, "--backend", "cpu", "--no-progress", "--json"]
    more = ["--hidden", "16", "--epochs", "12", "--lr", "0.02", "--weight-noise", "0.02", "--seed", "1"]
    done = CliRunner().invoke(main, [*files, *more])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["data"].startswith("22 / 2 / 6 pieces")  # a tenth for validation
    test = result["test"]
    assert test["nll"] < 0.5 * min(test["baseline_repeat"], test["baseline_often"])
    again = CliRunner().invoke(main, ["evaluate", run, str(tmp_path / "a.json"), "--json"])
    assert json.loads(again.stdout).items() >= test.items()

    options = ["compose", run, "--steps", "8", "--temperature", "0", "--out", str(tmp_path / "b.mid"), "--json"]
    made = CliRunner().invoke(main, [*options, "--prompt", str(tmp_path / "a.json"), "--prompt-steps", "8"])
    assert made.exit_code == 0, made.output
    written = json.loads(made.stdout)["files"]
    assert [path[-5:] for path in written] == ["b.mid", "b.png"] and (tmp_path / "b.png").stat().st_size > 2000
    assert np.array_equal(read_midi(tmp_path / "b.mid"), pieces[0][:16])  # it goes on as the rule says


@needs("mido")
@needs("matplotlib")
def test_the_picture_of_a_tune(tmp_path, monkeypatch):
    """Title, axes, and what is the prompt; a legend only where there is one."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, data, **_: (drawn.append(figure), data.write(b"png")))
    (tmp_path / "a.json").write_text(json.dumps(as_lists(tunes(4))))
    run = str(tmp_path / "run")
    prepare("music", [tmp_path / "a.json"], run, hidden=4, epochs=1, seed=0, valid=0.0, backend="cpu").train(
        progress=False
    )
    options = ["compose", run, "--steps", "8", "--seed", "5"]
    for more in (["--prompt", str(tmp_path / "a.json"), "--prompt-steps", "6"], []):
        done = CliRunner().invoke(main, [*options, "--out", str(tmp_path / f"{len(more)}.mid"), *more])
        assert done.exit_code == 0, done.output
    prompted, free = (figure.axes[0] for figure in drawn)
    assert (
        prompted.get_title("left") == "4.mid: 14 frames, seed 5" and free.get_title("left") == "0.mid: 8 frames, seed 5"
    )
    assert [text.get_text() for text in prompted.get_legend().get_texts()] == ["prompt", "composed"]
    assert free.get_legend() is None
    assert prompted.get_xlabel() == "time in quarter notes" and prompted.get_ylabel() == "pitch"


def test_resumed_equals_uninterrupted(tmp_path):
    path = save_npz(tmp_path / "a.npz", train=tunes(9, 6), valid=tunes(2, 6))
    same = dict(backend="cpu", seed=4, hidden=5, layers=2, dropout=0.3, transpose=4, schedule="constant")
    for folder, epochs in (("whole", 3), ("parts", 1)):
        prepare("music", [path], tmp_path / folder, epochs=epochs, **same).train(progress=False)
    prepare("music", [], tmp_path / "parts", epochs=3, resume=True).train(progress=False)
    whole, parts = (load(tmp_path / folder, "cpu").model.state_dict() for folder in ("whole", "parts"))
    assert len(whole) == 10 and all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_too_few_pieces_to_keep_some(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(as_lists(tunes(9))))
    with pytest.raises(ValueError, match="9 pieces are too few to keep a share of 0.1"):
        prepare("music", [path], tmp_path / "run")
    data = TASK.read([str(path)], MusicSettings(valid=0.0, seed=0))
    assert data.valid is None and len(data.train.inputs) == 9


def test_composing_needs_a_run_of_music(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("to be or not to be " * 30)
    options = dict(hidden=4, steps=8, batch=2, epochs=1, seed=0, backend="cpu")
    prepare("text", [book], tmp_path / "letters", **options).train(progress=False)
    done = CliRunner().invoke(main, ["compose", str(tmp_path / "letters"), "--length", "20"])
    assert done.exit_code == 2 and "no whole ABC tune" in done.output
    prepare("text", [book], tmp_path / "words", level="words", **options).train(progress=False)
    done = CliRunner().invoke(main, ["compose", str(tmp_path / "words")])
    assert done.exit_code == 2 and "need a model of characters" in done.output


def test_midi_without_mido(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mido", None)
    with pytest.raises(ImportError, match=r'pip install "gpurnn\[music\]"'):
        write_midi(tmp_path / "a.mid", np.zeros((1, KEYS)))
