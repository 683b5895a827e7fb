"""`unified-lm` and `python` for shell scripts in tests, without the seconds that imports take.

A server, forked from the process that has imported everything (`tests.processes`), forks a child for every command. The child
gets the caller's arguments, working directory, environment, and its open files themselves, so that pipes and redirections work.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import CONTEXT

_CLIENT = """
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "server"))
files = [0, 1, 2, *(int(a[8:]) for a in sys.argv if a.startswith("/dev/fd/"))]
request = {"files": files, "module": %r, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
socket.send_fds(connection, [b"+"], files)
connection.sendall(json.dumps(request).encode())
connection.shutdown(socket.SHUT_WR)
sys.exit(int(connection.recv(8)))
"""


@contextmanager
def commands(folder: Path) -> Iterator[Path]:
    """Put `unified-lm` and `python` into a folder, to be the first one of PATH, and answer them until the context is left.

    Args:
        folder: new or empty; its path is short enough for a socket (about 100 characters).
    """
    folder.mkdir(exist_ok=True)
    for name, module in (("unified-lm", "unified_lm"), ("python", "")):
        (folder / name).write_text(f"#!{sys.executable} -SE\n{_CLIENT % module}")
        (folder / name).chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "server"))
    listener.listen()
    server = CONTEXT.Process(target=_serve, args=(listener,))
    server.start()
    listener.close()
    try:
        yield folder
    finally:
        server.kill()
        server.join()


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        pid = os.fork()
        if not pid:
            _run(connection)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(str(code).encode())
        os._exit(0)


def _run(connection: socket.socket) -> None:
    """The body of a command's process."""
    gc.freeze()
    _, files, _, _ = socket.recv_fds(connection, 1, 16)
    with connection.makefile("rb") as stream:
        request = json.load(stream)
    for here, there in zip(files, request["files"], strict=True):
        os.dup2(here, there)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
    code: object = 1
    try:
        if request["module"]:
            sys.argv = [request["module"], *request["arguments"]]
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        else:
            sys.argv = request["arguments"]
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
