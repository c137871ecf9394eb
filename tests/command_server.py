"""Runs commands in forks of one process that has imported torch: the import takes most of the time
of a short command.

    python tests/command_server.py SOCKET                  the server; says "ready"
    python -SE tests/command_client.py SOCKET SCRIPT ...   a client: as ``python SCRIPT ...``
    python -SE tests/command_client.py SOCKET -m MODULE ...

A client passes its arguments, folder, environment, stdin, stdout and stderr on, and ends as the
command ends. Signals do not reach the command: tests that send some start Python itself.
"""

import json
import os
import runpy
import socket
import sys
import traceback
from typing import Any


def serve(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                answer(client)
                os._exit(0)
            client.close()
            reap()


def reap() -> None:
    """Removes the processes that have answered."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def answer(client: socket.socket) -> None:
    _, fds, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile(encoding="utf-8") as lines:
        request = json.loads(lines.readline())
    if (pid := os.fork()) == 0:
        client.close()
        os._exit(run(dict(zip(request.pop("open"), fds, strict=True)), **request))
    for fd in fds:
        os.close(fd)
    _, status = os.waitpid(pid, 0)
    client.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def run(fds: dict[int, int], argv: list[str], cwd: str, env: dict[str, str]) -> int:
    """Runs ``python *argv`` with the given standard files, as Python would open them."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number in range(3):
        if number in fds:
            os.dup2(fds[number], number)
            os.close(fds[number])
        else:
            os.close(number)
    options: dict[int, dict[str, Any]] = {
        0: {},
        1: {"mode": "w"},
        2: {"mode": "w", "buffering": 1, "errors": "backslashreplace"},
    }
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, **options[number]) if number in fds else None  # noqa: SIM115
        for number in range(3)
    )
    status: object = 0
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    for file in (sys.stdout, sys.stderr):
        if file is not None:
            file.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()

    import hrm_esp.training  # noqa: F401

    serve(sys.argv[1])
