"""Training: loss, loop, checkpoints, pretraining and finetuning."""

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import checkpoint_path as checkpoint_path
from .checkpoint import find_checkpoint as find_checkpoint
from .checkpoint import load_checkpoint as load_checkpoint
from .checkpoint import load_model as load_model
from .checkpoint import save_checkpoint as save_checkpoint
from .continued import ContinueResult as ContinueResult
from .early_stopping import Score as Score
from .finetune import train_ft as train_ft
from .loss import Loss as Loss
from .loss import loss as loss
from .pretrain import train_lm as train_lm
from .trainer import Trainer as Trainer
from .trainer import TrainResult as TrainResult
