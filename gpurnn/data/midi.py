"""MIDI files as piano rolls, read and written."""

import io

import numpy as np

from ..errors import FileError, ShapeError, check_number
from ..files import check_room, max_memory, one_line, read_bytes, write_bytes_atomic

KEYS, LOWEST = 88, 21  # keys of a piano, and the MIDI number of the first, A0
FRAME_COST = 16 * KEYS  # bytes of memory for a frame: a byte for each key, and the numbers that a batch has of it
_MIDI_FACTOR = 256  # bytes of memory for a byte of MIDI: three make a message, an object of Python


def read_midi(path, step=1.0):
    """A MIDI file as a roll (T, 88), uint8: all tracks together, without the drums (channel 10).

    step: length of a frame in quarter notes. Beginnings and ends of notes are rounded to frames; every note has at
    least one. Raises ValueError for a file that is not MIDI, without notes or with notes that no piano has.
    """
    mido = _mido()
    data = read_bytes(path, factor=_MIDI_FACTOR, what="its messages")
    try:
        file = mido.MidiFile(file=io.BytesIO(data))
        messages = [pair for track in file.tracks for pair in _timed(track)]
        frame = file.ticks_per_beat * step
    except Exception as error:  # whatever mido meets in a damaged file
        raise FileError(f"{path}: is not a MIDI file that can be read: {one_line(error)}") from error
    if frame <= 0:
        raise FileError(f"{path}: its clock counts in film frames; expected parts of a quarter note")
    messages.sort(key=lambda pair: pair[0])  # at one moment as the tracks stand; mido's own merging takes far longer
    most = max_memory() / FRAME_COST  # frames
    sounding, notes = {}, []

    def end(start, key):
        first = round(start / frame)
        notes.append((first, max(first + 1, round(now / frame)), key))

    for now, message in messages:
        if now > frame * most:  # an int of any length, which no float may hold
            ticks = f"{now:,}" if now < 1 << 64 else "more than 2^64"
            check_room(path, min(now, 1 << 64) / frame * FRAME_COST, f"its length of {ticks} ticks")
        if message.type not in ("note_on", "note_off") or message.channel == 9:
            continue
        voice = message.channel, key_of(message.note, str(path))
        if voice in sounding:  # a second beginning ends the first
            end(sounding.pop(voice), voice[1])
        if message.type == "note_on" and message.velocity:
            sounding[voice] = now
    for voice, start in sounding.items():
        end(start, voice[1])
    if not notes:
        raise ValueError(f"{path}: has no notes")
    roll = np.zeros((max(stop for _, stop, _ in notes), KEYS), np.uint8)
    for start, stop, key in notes:
        roll[start:stop, key] = 1
    return roll


def _timed(track):
    """(ticks since the beginning, message) of each message of a track."""
    now = 0
    for message in track:
        now += message.time
        yield now, message


def write_midi(path, roll, step=1.0, tempo=90.0):
    """Write a roll (T, 88) as a MIDI file: a key that sounds in consecutive frames is one held note.

    step: length of a frame in quarter notes; tempo: quarter notes a minute.
    """
    mido = _mido()
    roll = np.asarray(roll)
    if roll.ndim != 2 or roll.shape[1] != KEYS:
        raise ShapeError(f"roll: expected shape (T, {KEYS}), got {roll.shape}")
    file = mido.MidiFile(type=0, ticks_per_beat=480)
    frame = max(1, round(480 * check_number("step", step, 0, low_open=True)))
    track = mido.MidiTrack()
    file.tracks.append(track)
    beat = mido.bpm2tempo(check_number("tempo", tempo, 4, 1e6))  # what MIDI can say
    track.append(mido.MetaMessage("set_tempo", tempo=beat))
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
        raise ImportError("MIDI files need mido: pip install 'gpurnn[music]'") from error
    return mido


def key_of(number, place):
    """The column of a MIDI number, which has to be on the piano."""
    if not isinstance(number, int) or not LOWEST <= number < LOWEST + KEYS:
        raise ValueError(f"{place}: expected MIDI numbers from {LOWEST} to {LOWEST + KEYS - 1}, got {number!r}")
    return number - LOWEST
