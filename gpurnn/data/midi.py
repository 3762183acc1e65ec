"""MIDI files as piano rolls, read and written."""

import io
import logging

import numpy as np

from ..errors import FileError, ShapeError, check_number
from ..files import check_room, max_memory, one_line, read_bytes, write_bytes_atomic
from ..run_folder import SOFTWARE

_log = logging.getLogger("gpurnn")
KEYS, LOWEST = 88, 21  # keys of a piano, and the MIDI number of the first, A0
FRAME_COST = 16 * KEYS  # bytes of memory for a frame: a byte for each key, and the numbers that a batch has of it
_DRUMS = 9  # their channel, counted from 0
_RANGE = f"a piano's keys (MIDI numbers {LOWEST} to {LOWEST + KEYS - 1})"
_MIDI_FACTOR = 256  # bytes of memory for a byte of MIDI: three make a message, an object of Python


def read_midi(path, step=1.0, strict=False):
    """A MIDI file as a piano roll: all tracks together, without the drums (channel 10).

    Parameters
    ----------
    path : str or Path
    step : float
        Length of a frame in quarter notes. Beginnings and ends of notes are rounded to frames; every note has at least
        one frame.
    strict : bool
        Refuse a file with notes that no piano has, below 21 or above 108. They are left out otherwise, with a warning
        that counts them.

    Returns
    -------
    roll : (T, 88) uint8
        0 and 1.

    Raises
    ------
    FileError
        Names the file, for one that is damaged, not MIDI, without notes, or too long for the memory that one file may
        take.
    OSError
        For one that cannot be read.
    ImportError
        Without mido.
    """
    roll, outside = midi_roll(path, step, strict)
    say_outside(path, outside)
    return roll


def midi_roll(path, step, strict=False):
    """(roll, number of notes left out): ``read_midi`` without its warning."""
    messages, frame = _messages(path, step)
    sounding, notes, outside = {}, [], 0

    def end(start, key):
        first = round(start / frame)
        notes.append((first, max(first + 1, round(now / frame)), key))

    for now, message in messages:
        if message.type not in ("note_on", "note_off") or message.channel == _DRUMS:
            continue
        begins = message.type == "note_on" and message.velocity > 0
        if not LOWEST <= message.note < LOWEST + KEYS:
            outside += begins
            continue
        voice = message.channel, message.note - LOWEST
        if voice in sounding:  # a second beginning ends the first
            end(sounding.pop(voice), voice[1])
        if begins:
            sounding[voice] = now
    for voice, start in sounding.items():
        end(start, voice[1])
    if strict and outside:
        raise FileError(f"{path}: has notes outside {_RANGE}: {outside:,}")
    if not notes:
        if outside:
            raise FileError(f"{path}: all of its notes, {outside:,}, are outside {_RANGE}")
        drums = any(message.type == "note_on" and message.channel == _DRUMS for _, message in messages)
        raise FileError(f"{path}: has no notes{' but those of drums' if drums else ''}")
    roll = np.zeros((max(stop for _, stop, _ in notes), KEYS), np.uint8)
    for start, stop, key in notes:
        roll[start:stop, key] = 1
    return roll, outside


def say_outside(place, notes):
    """Warn that notes of the file or files ``place`` were left out, if there are any."""
    if notes:
        _log.warning("%s: notes left out because they are outside %s: %d", place, _RANGE, notes)


def _messages(path, step):
    """(list of (ticks since the beginning, message) in order, ticks of a frame) of a MIDI file."""
    mido = _mido()
    data = read_bytes(path, factor=_MIDI_FACTOR, what="its messages")
    if not data.startswith(b"MThd"):
        raise FileError(f"{path}: is not a MIDI file: it does not begin with MThd")
    try:
        file = mido.MidiFile(file=io.BytesIO(data))
        messages = [pair for track in file.tracks for pair in _timed(track)]
        frame = file.ticks_per_beat * step
    except Exception as error:  # whatever mido meets in a damaged file
        known = isinstance(error, (EOFError, OSError, ValueError))
        raise FileError(
            f"{path}: is damaged MIDI: {one_line(error) if known else 'a message in it cannot be read'}"
        ) from error
    if frame <= 0:
        raise FileError(f"{path}: its clock counts in film frames; expected parts of a quarter note")
    messages.sort(key=lambda pair: pair[0])  # at one moment as the tracks stand; mido's own merging takes far longer
    last = messages[-1][0] if messages else 0
    if last > frame * (max_memory() / FRAME_COST):  # an int of any length, which no float may hold
        ticks = f"{last:,}" if last < 1 << 64 else "more than 2^64"
        check_room(path, min(last, 1 << 64) / frame * FRAME_COST, f"its length of {ticks} ticks")
    return messages, frame


def _timed(track):
    """(ticks since the beginning, message) of each message of a track."""
    now = 0
    for message in track:
        now += message.time
        yield now, message


def write_midi(path, roll, step=1.0, tempo=90.0):
    """Write a piano roll as a MIDI file: a key that sounds in consecutive frames is one held note.

    Parameters
    ----------
    path : str or Path
    roll : (T, 88) array
        Of 0 and 1.
    step : float
        Length of a frame in quarter notes.
    tempo : float
        Quarter notes a minute, from 4 to 10^6.

    Raises
    ------
    ShapeError, ValueError
    ImportError
        Without mido.
    """
    mido = _mido()
    roll = np.asarray(roll)
    if roll.ndim != 2 or roll.shape[1] != KEYS:
        raise ShapeError(f"roll: expected shape (T, {KEYS}), got {roll.shape}")
    file = mido.MidiFile(type=0, ticks_per_beat=480)
    frame = max(1, round(480 * check_number("step", step, 0, low_open=True)))
    track = mido.MidiTrack()
    file.tracks.append(track)
    beat = mido.bpm2tempo(check_number("tempo", tempo, 4, 1e6))  # the limits of the MIDI format
    track.append(mido.MetaMessage("set_tempo", tempo=beat))
    track.append(mido.MetaMessage("text", text=SOFTWARE))
    silence = np.zeros((1, KEYS), np.int8)
    changes = np.diff(np.vstack([silence, (roll != 0).astype(np.int8), silence]), axis=0)
    now = 0
    for t, key in np.argwhere(changes):
        kind = "note_on" if changes[t, key] > 0 else "note_off"
        track.append(mido.Message(kind, note=int(LOWEST + key), velocity=80, time=int(t * frame - now)))
        now = int(t * frame)
    track.append(mido.MetaMessage("end_of_track", time=len(roll) * frame - now))
    data = io.BytesIO()
    file.save(file=data)
    write_bytes_atomic(path, data.getvalue())


def _mido():
    try:
        import mido
    except ImportError as error:
        raise ImportError('MIDI files need mido: pip install "gpurnn[music]"') from error
    return mido
