"""Text generation."""

from .generate import Completion as Completion
from .generate import generate as generate
from .generate import generate_batch as generate_batch
from .generate import stream as stream
from .sampling import SamplingParams as SamplingParams
from .windows import window_start as window_start
from .windows import window_stride as window_stride
