"""Ways in which a file can be damaged, each a function of its path."""

import os
import random
import shutil


def _replaced(content):
    return lambda path: path.write_bytes(content)


def _random(path):
    path.write_bytes(random.Random(path.name).randbytes(max(path.stat().st_size, 40)))


def _directory(path):
    path.unlink()
    path.mkdir()


def _dangling(path):
    path.unlink()
    path.symlink_to(path.with_name("gone"))


DAMAGES = {
    "empty": _replaced(b""),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "0xff": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "random bytes": _random,
    "zeros behind": lambda path: path.write_bytes(path.read_bytes() + bytes(100)),
    "a list": _replaced(b"[]\n"),
    "an object": _replaced(b"{}\n"),
    "a number": _replaced(b"3\n"),
    "null": _replaced(b"null\n"),
    "deleted": lambda path: path.unlink(),
    "a directory": _directory,
    "dangling": _dangling,
}


def restore(copy, folder):
    """Puts a folder back as it was in its copy."""
    shutil.rmtree(folder)
    shutil.copytree(copy, folder, symlinks=True)
