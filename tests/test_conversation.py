"""`hrm-esp generate` on a terminal without a prompt, and through a pipe that stays open."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

SECONDS = 60


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *args: object) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:  # the command
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, "-m", "hrm_esp", *map(str, args)])
        self.data = b""

    def read_until(self, end: str) -> str:
        """Returns what is written up to and with ``end``."""
        deadline, mark = time.monotonic() + SECONDS, end.encode()
        while mark not in self.data and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    self.data += os.read(self.fd, 4096)
                except OSError:  # the command has ended
                    break
        assert mark in self.data, self.data.decode(errors="replace")
        found, _, self.data = self.data.partition(mark)
        return found.decode().replace("\r", "")

    def say(self, line: str) -> str:
        """Types a line and returns what is written up to the next prompt."""
        os.write(self.fd, line.encode() + b"\n")
        self.read_until("\n")  # the echo
        return self.read_until("\n> ").strip()


@pytest.fixture
def terminal(trained: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    checkpoint = trained / "checkpoints" / "pretrain_best.pt"
    flags = getattr(request, "param", ("--max_new_tokens", 40))
    terminal = Terminal("generate", "--ckpt", checkpoint, *flags)
    yield terminal
    os.close(terminal.fd)
    with suppress(ProcessLookupError, ChildProcessError):  # it has ended
        os.kill(terminal.pid, signal.SIGKILL)
        os.waitpid(terminal.pid, 0)


def test_a_conversation(terminal: Terminal) -> None:
    assert "continues each line" in terminal.read_until("\n> ")
    assert "/temperature" in terminal.say("/help") and "Ctrl-D" in terminal.say("/help")
    assert terminal.say("/again") == "nothing to repeat yet"
    assert terminal.say("/seed 1") == "seed: 1"
    first = terminal.say("La niña")
    assert first.startswith("La niña") and len(first) > len("La niña")
    assert terminal.say("La niña") == first
    assert terminal.say("/temperature 3,0") == "temperature: 3,0"
    again = terminal.say("/again")
    assert again.startswith("La niña") and again != first
    assert terminal.say("/temperature 0") and terminal.say("Él") == terminal.say("Él")
    # Mistakes end nothing.
    assert "is not a number" in terminal.say("/seed x")
    assert "at least 0" in terminal.say("/temperature -1")
    assert "no such command" in terminal.say("/adios")
    assert "must be from 0 to 7" in (terminal.say("/plan 99") + terminal.say("La"))
    assert terminal.say("/plan 3") == "plan: 3" and terminal.say("La").startswith("La")
    os.write(terminal.fd, b"\n")
    terminal.read_until("\n> ")  # the echo and the next prompt: nothing else
    os.write(terminal.fd, b"\x04")
    terminal.read_until("\n")
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0


@pytest.mark.parametrize("terminal", [("--min_new_tokens", 10**6, "--seed", 1)], indirect=True)
def test_ctrl_c_ends_the_text_but_not_the_session(terminal: Terminal) -> None:
    terminal.read_until("\n> ")
    for _ in range(2):
        os.write(terminal.fd, "La niña\n".encode())
        terminal.read_until("La niña\r\n")  # the echo
        for part in ("La niña", "i"):  # the text has begun, and has no end
            terminal.read_until(part)
        os.write(terminal.fd, b"\x03")
        terminal.read_until("\n> ")
    time.sleep(0.5)  # the prompt is there just before Python reads the keyboard
    os.write(terminal.fd, b"\x03")  # at the prompt: another one
    terminal.read_until("\n> ")
    assert "Ctrl-D" in terminal.say("/help")
    os.write(terminal.fd, b"/quit\n")
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0


def test_a_line_of_a_pipe_is_answered_before_the_next_comes(trained: Path) -> None:
    command = [sys.executable, "-m", "hrm_esp", "generate", "--ckpt",
               str(trained / "checkpoints" / "finetune_best.pt"), "--prompts", "-"]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in (b"12\n", b"7\n", b"31\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert select.select([process.stdout], [], [], SECONDS)[0]
            assert process.stdout.readline().endswith(b"\n")
        process.stdin.close()
