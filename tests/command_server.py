"""Runs the command in forked processes: importing torch takes most of the time of a short command.

The server imports it once. Each request is a line of JSON with ``argv`` and ``cwd``; the answer is
a line with ``returncode``, ``stdout`` and ``stderr`` of the command in a process of its own.
"""

import json
import os
import sys
import tempfile
import traceback


def run(argv: list[str], cwd: str) -> dict[str, object]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if (pid := os.fork()) == 0:
            status = 1
            try:
                os.chdir(cwd)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                sys.stdin, sys.stdout, sys.stderr = (
                    os.fdopen(0),
                    os.fdopen(1, "w"),
                    os.fdopen(2, "w"),
                )
                status = main(argv)
            except SystemExit as error:  # of --help and --version
                status = error.code if isinstance(error.code, int) else 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        returncode = os.waitstatus_to_exitcode(status)
        stdout, stderr = out.read().decode(), err.read().decode()
    return {"returncode": returncode, "stdout": stdout, "stderr": stderr}


if __name__ == "__main__":
    import hrm_esp.training  # noqa: F401
    from hrm_esp.cli import main

    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
