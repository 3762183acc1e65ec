"""gpurnn: recurrent networks on NumPy and on CUDA kernels of their own."""

from . import _interrupt
from .attention import Attention
from .backend import backends, empty_cache, get_backend, use_backend
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .ctc import ctc_beam_search, ctc_greedy, ctc_loss
from .data import Batch, SequenceBatches, TextBatches
from .errors import BackendError, DtypeError, ShapeError
from .gradients import GradientFlow, record_gradient_flow
from .layers import BatchNorm, Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential, TiedLinear
from .loss_scale import LossScaler
from .losses import binary_cross_entropy_with_logits, cross_entropy, mae, mse
from .metrics import accuracy, bits_per_character, edit_distance, error_rate, perplexity
from .module import Module
from .optim import (
    SGD,
    Adam,
    AdamW,
    ConstantSchedule,
    CosineSchedule,
    PlateauSchedule,
    RMSprop,
    StepSchedule,
    WarmupSchedule,
    clip_grad_norm,
    clip_grad_value,
)
from .recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .seq2seq import EncoderDecoder, beam_search, greedy_search
from .train import History, TrainingError, evaluate, fit, load_weights, save_weights

__version__ = "0.1.0"
