"""Restoring accents, ñ and ü."""

from .blocks import TextBlocks as TextBlocks
from .restore import Restorer as Restorer
from .restore import WordForm as WordForm
from .restore import restore as restore
