"""Restoring accents, ñ and ü."""

from .blocks import TextBlocks as TextBlocks
from .restorer import Restorer as Restorer
from .restorer import WordForm as WordForm
from .restorer import restore as restore
