"""Scores of texts and of pairs."""

from .metrics import edit_distance as edit_distance
from .metrics import perplexity as perplexity
from .scoring import PairScore as PairScore
from .scoring import TextScore as TextScore
from .scoring import byte_bits as byte_bits
from .scoring import evaluate as evaluate
from .scoring import pair_bits as pair_bits
from .scoring import score_pairs as score_pairs
from .scoring import score_stream as score_stream
from .scoring import score_targets as score_targets
from .surprisal import Surprisal as Surprisal
from .surprisal import target_surprisals as target_surprisals
from .surprisal import text_surprisals as text_surprisals
