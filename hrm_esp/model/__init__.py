"""The model and its parts."""

from .codebook import Codebook as Codebook
from .embeddings import TokenEmbedding as TokenEmbedding
from .executor import Executor as Executor
from .hrm import HRMModel as HRMModel
from .hrm import LossTerms as LossTerms
from .kv_cache import ExecutorCache as ExecutorCache
from .kv_cache import KVCache as KVCache
from .layers import FFN as FFN
from .layers import MHA as MHA
from .layers import DecoderBlock as DecoderBlock
from .layers import EncoderBlock as EncoderBlock
from .layers import RMSNorm as RMSNorm
from .planner import EncoderOutput as EncoderOutput
from .planner import Planner as Planner
