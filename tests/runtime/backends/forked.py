"""Scripts run in processes that are forked off one which has imported the libraries: they start in milliseconds.

`Forked` is as much of `subprocess.Popen` as the tests of several processes need. Run as a script, this is the process
that is forked: python forked.py SOCKET MODULE...
"""

import array
import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

LIBRARIES = ("torch", "transformers", "gkd_dsl.cli.main", "gkd_dsl.cli.run", "gkd_dsl.runtime.session")
GEMINI = (*LIBRARIES, "gkd_dsl.runtime.backends.gemini", "colossalai.booster.plugin", "host_accelerator")
_parents = {}


class Forked:
    """A script with its arguments in a process of its own."""

    def __init__(self, modules, words, *, cwd=None, env=None, stdout=None, stderr=None):
        self.returncode = None
        self._pipes, files, ends = {}, [], []
        for number, (name, where) in enumerate((("stdout", stdout), ("stderr", stderr)), 1):
            if where == subprocess.PIPE:
                self._pipes[name], end = os.pipe()
                files.append(end)
                ends.append(end)
            else:
                files.append(files[0] if where == subprocess.STDOUT else number)
        self._parent = socket.socket(socket.AF_UNIX)
        self._parent.connect(_parent(modules))
        said = json.dumps({"words": list(words), "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)})
        self._parent.sendmsg([b"%8d" % len(said)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
        self._parent.sendall(said.encode())
        for end in ends:
            os.close(end)
        self.pid = self._told()

    def _told(self):
        """The next number that the parent tells."""
        said = b""
        while not said.endswith(b"\n"):
            part = self._parent.recv(1)
            assert part, "the process that others are forked off has ended"
            said += part
        return int(said)

    def _ended(self):
        with self._parent:
            self.returncode = self._told()

    def poll(self):
        """The exit status, None while it runs."""
        if self.returncode is None and select.select([self._parent], [], [], 0)[0]:
            self._ended()
        return self.returncode

    def wait(self, timeout=None):
        """The exit status, when it has ended."""
        if self.returncode is None:
            if not select.select([self._parent], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self._ended()
        return self.returncode

    def send_signal(self, number):
        """Send it a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """The text that it wrote to each pipe (None where there is none), when it has ended."""
        until = None if timeout is None else time.monotonic() + timeout

        def left():
            return None if until is None else max(0.0, until - time.monotonic())

        held = dict.fromkeys(self._pipes, b"")
        open_ = {number: name for name, number in self._pipes.items()}
        while open_:
            ready = select.select(list(open_), [], [], left())[0]
            if not ready:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            for number in ready:
                part = os.read(number, 1 << 16)
                held[open_[number]] += part
                if not part:
                    os.close(number)
                    del open_[number]
        self._pipes = {}
        self.wait(left())
        return tuple(held[name].decode() if name in held else None for name in ("stdout", "stderr"))


def _parent(modules):
    """The socket of the process that has imported these modules; it ends with this one."""
    if modules not in _parents:
        place = Path(tempfile.mkdtemp(prefix="forked")) / "socket"
        process = subprocess.Popen(
            [sys.executable, __file__, str(place), *modules], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        atexit.register(lambda: (process.kill(), process.wait()))
        until = time.monotonic() + 120
        while not place.exists():
            assert process.poll() is None, "the process that others are forked off has ended"
            assert time.monotonic() < until
            time.sleep(0.02)
        _parents[modules] = str(place)
    return _parents[modules]


def serve(place, modules):
    """Fork a child for each request, and tell when it has ended."""
    sys.path.insert(0, str(Path(__file__).parent))
    for name in modules:
        importlib.import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{place}.new")
    listening.listen(16)
    os.rename(f"{place}.new", place)
    parent, running = os.getppid(), {}
    while os.getppid() == parent:
        if select.select([listening], [], [], 0.02)[0]:
            asking, _ = listening.accept()
            size, extra, *_ = asking.recvmsg(8, socket.CMSG_LEN(2 * 4))
            files = array.array("i")
            files.frombytes(extra[0][2])
            said = b""
            while len(said) < int(size):
                said += asking.recv(int(size) - len(said))
            child = os.fork()
            if not child:
                listening.close()
                run(json.loads(said), list(files), [asking, *running.values()])
            for number in set(files):
                os.close(number)
            asking.sendall(b"%d\n" % child)
            running[child] = asking
        while running:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if not ended:
                break
            with contextlib.suppress(BrokenPipeError), running.pop(ended) as asking:
                asking.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def run(request, files, sockets):
    """The script, as if python had been started with it; never returns."""
    code = 1
    try:
        for held in sockets:
            held.close()
        for number, file in zip((1, 2), files, strict=True):
            os.dup2(file, number)
        for file in set(files) - {0, 1, 2}:
            os.close(file)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = request["words"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
