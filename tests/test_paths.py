"""Files appear whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeft.errors import WriteError
from edgeft.paths import atomic_write, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_json(file, {"old": True})
    before = file.read_bytes()
    with pytest.raises(RuntimeError), atomic_write(file) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_results_have_ordinary_permissions(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_json(tmp_path / "x.json", 1)
    finally:
        os.umask(old)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_is_a_write_error_that_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
mount -t tmpfs -o size=64k tmpfs {tmp_path} && {sys.executable} - <<'PYTHON'
from pathlib import Path
from edgeft.errors import WriteError
from edgeft.paths import atomic_write
folder = Path({str(tmp_path)!r})
try:
    with atomic_write(folder / "big") as stream:
        stream.write(bytes(1 << 20))
except WriteError as error:
    print(error.message, "|", *folder.iterdir())
PYTHON
"""
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True
    )
    assert result.stdout == f"no space left on the disk while writing {tmp_path / 'big'} |\n", result.stderr


def test_a_folder_that_cannot_be_written_is_a_write_error() -> None:
    with pytest.raises(WriteError, match="cannot write /proc/result"), atomic_write(Path("/proc/result")):
        raise AssertionError("unreachable")
