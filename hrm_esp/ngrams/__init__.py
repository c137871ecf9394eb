"""N-gram counts and their mixture with the network."""

from .context import ContextMatch as ContextMatch
from .context import Continuations as Continuations
from .context import NgramContext as NgramContext
from .context import NgramIndex as NgramIndex
from .mixture import NgramMixture as NgramMixture
from .table import NgramTable as NgramTable
