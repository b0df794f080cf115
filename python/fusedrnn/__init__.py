"""Fused RNN, LSTM and GRU kernels for PyTorch: drop-in modules, functions, and an honest account of what ran."""

from . import functional, nn
from .along import States, debug
from .convert import convert, patch, revert, survey
from .dropouts import Dropouts
from .engines import engine
from .engines.cpu import batch_invariant
from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .report import explain, info
from .saving import save_budget
from .truncated import tbptt

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Dropouts",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "States",
    "batch_invariant",
    "convert",
    "debug",
    "engine",
    "explain",
    "functional",
    "info",
    "nn",
    "patch",
    "revert",
    "save_budget",
    "survey",
    "tbptt",
]
