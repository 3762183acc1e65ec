"""Files: read within limits, written whole or not at all. All that gpurnn reads or writes goes through here.

Reading takes regular files only and looks at sizes before it reads: what a file would take in memory is estimated and
compared with a limit, ``max_memory()``. Writing replaces a file in one moment, keeps its mode, follows no links, and
writes into devices and pipes instead of replacing them.
"""

from ..errors import FileError, one_line
from .limits import MAX_MEMORY, check_room, max_memory, parse_size, set_max_memory
from .places import fresh_path, make_folder, open_log, refuse_same
from .reading import JSON_FACTOR, file_size, naming, open_regular, parse_json, read_bytes, read_json
from .system import cache_folder, lock_file
from .temporary import sweep_folder, temporary_target
from .writing import check_target, is_stream, write_bytes_atomic, write_json_atomic, write_text_atomic

__all__ = [
    # limits
    "MAX_MEMORY", "check_room", "max_memory", "parse_size", "set_max_memory",
    # reading
    "JSON_FACTOR", "file_size", "naming", "open_regular", "parse_json", "read_bytes", "read_json",
    # writing
    "check_target", "is_stream", "write_bytes_atomic", "write_json_atomic", "write_text_atomic",
    # places
    "cache_folder", "fresh_path", "make_folder", "open_log", "refuse_same",
    # what killed processes leave, and locks
    "lock_file", "sweep_folder", "temporary_target",
    # the error that all of these raise, and how its message is made one line
    "FileError", "one_line",
]  # fmt: skip
