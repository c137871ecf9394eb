"""Which of the processes that torchrun started this is, without importing torch."""

import os

RANK = int(os.environ["RANK"]) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0
