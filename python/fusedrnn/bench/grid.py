"""The grids: every shape that fusedrnn is measured on, by name, on the CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
USUAL_CELLS = ("lstm", "gru", "rnn_tanh")  # what is measured unless others are asked for
MODES = ("inference", "training")
DTYPES = ("float32", "float64", "bfloat16", "float16")
SECTIONS = (
    "grid", "overhead", "step", "packed", "lengths", "resets", "memory", "first call", "contention", "accuracy"
)  # fmt: skip

#: The kinds of shapes. Shapes of kind ODD show the edges; they do not count in any mean.
ONE_STEP, BATCH_1, TRAINING, LONG_THIN, ODD = "one step", "batch 1", "training shapes", "RL and long-thin", "odd"
KINDS = (ONE_STEP, BATCH_1, TRAINING, LONG_THIN, ODD)


@dataclass(frozen=True)
class Shape:
    """T steps of B sequences with I features into layers of H units; packed if ``shortest`` is given.

    Attributes:
        kind: one of ``KINDS``.
        layers: number of stacked layers.
        bidirectional: whether every layer runs both ways.
        shortest: the length of the shortest sequence; the lengths fall evenly from T to it.
    """

    T: int
    B: int
    I: int
    H: int
    kind: str
    layers: int = 1
    bidirectional: bool = False
    shortest: int | None = None

    @property
    def name(self) -> str:
        """Such as ``100x32x128x128``, in the order T, B, I, H, with what is unusual behind it."""
        words = [f"{self.T}x{self.B}x{self.I}x{self.H}"]
        words += [f"{self.layers}layers"] if self.layers > 1 else []
        words += ["bidirectional"] if self.bidirectional else []
        words += ["packed"] if self.shortest is not None else []
        return "-".join(words)

    @property
    def counts(self) -> bool:
        """Whether the shape is part of the means."""
        return self.kind != ODD

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def tokens(self) -> int:
        """Steps of all sequences together."""
        lengths = self.lengths()
        return self.T * self.B if lengths is None else int(lengths.sum())

    def lengths(self) -> Tensor | None:
        """Length of each sequence (B), falling, or None if all are T."""
        return None if self.shortest is None else torch.linspace(self.T, self.shortest, self.B).long()


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(1, 1, 64, 64, ONE_STEP),
        Shape(100, 1, 64, 64, BATCH_1),
        Shape(100, 1, 128, 128, BATCH_1),
        Shape(100, 1, 256, 256, BATCH_1),
        Shape(100, 1, 512, 512, BATCH_1),
        Shape(100, 1, 1024, 1024, BATCH_1),
        Shape(1000, 1, 128, 128, BATCH_1),
        Shape(100, 32, 128, 128, TRAINING),
        Shape(100, 32, 512, 512, TRAINING),
        Shape(100, 64, 256, 256, TRAINING),
        Shape(200, 16, 256, 256, TRAINING),
        Shape(35, 20, 650, 650, TRAINING),
        Shape(50, 64, 1024, 1024, TRAINING),
        Shape(20, 16, 128, 128, LONG_THIN),
        Shape(128, 8, 64, 64, LONG_THIN),
        Shape(128, 8, 256, 256, LONG_THIN),
        Shape(1000, 4, 128, 128, LONG_THIN),
        Shape(100, 16, 16, 256, ODD),
        Shape(100, 16, 37, 37, ODD),
        Shape(100, 16, 200, 200, ODD),
        Shape(100, 2, 128, 128, ODD),
        Shape(50, 16, 128, 128, ODD, layers=2, bidirectional=True),
        Shape(100, 32, 128, 128, ODD, shortest=25),
    )
}

#: One small shape of each kind that counts, for a look within a minute or two.
QUICK = ("1x1x64x64", "100x1x128x128", "100x32x128x128", "20x16x128x128")

#: The kinds of shapes of the GPU's grid: widths.
GPU_KINDS = ("H 64, 128", "H 256, 512", "H 768, 1024", "H 1536, 2048")
_GPU_WIDTHS = {64: 0, 128: 0, 256: 1, 512: 1, 768: 2, 1024: 2, 1536: 3, 2048: 3}  # H: its place in GPU_KINDS
GPU_SHAPES = {
    shape.name: shape
    for H, kind in _GPU_WIDTHS.items()
    for shape in (Shape(256, B, H, H, GPU_KINDS[kind]) for B in (1, 8, 16, 32, 64, 128, 256))
}
ALL_SHAPES = SHAPES | GPU_SHAPES


@dataclass(frozen=True)
class Precision:
    """How a GPU multiplies.

    Attributes:
        dtype: of all tensors.
        tf32: whether float32 may be multiplied in tf32.
        tolerance: by how much two contestants may differ, as a part of a tensor's largest value; rounding every step
            adds up along time.
    """

    dtype: torch.dtype
    tf32: bool
    tolerance: float


PRECISIONS = {
    "fp32": Precision(torch.float32, False, 1e-4),
    "tf32": Precision(torch.float32, True, 0.1),
    "bf16": Precision(torch.bfloat16, False, 0.3),
    "fp16": Precision(torch.float16, False, 0.1),
}


@dataclass(frozen=True)
class GpuCell:
    """One cell of the GPU's grid: names in ``USUAL_CELLS``, ``MODES``, ``PRECISIONS`` and ``GPU_SHAPES``."""

    cell: str
    mode: str
    precision: str
    shape: str


#: Twelve cells that show within a minute whether anything is wrong: every path, precision and cell of the kernels, and
#: where cuDNN is strongest (fp16 LSTM).
TELLING = tuple(
    GpuCell(cell, mode, precision, f"256x{B}x{H}x{H}")
    for cell, mode, precision, B, H in (
        ("lstm", "training", "bf16", 16, 64),
        ("lstm", "training", "bf16", 16, 768),
        ("lstm", "inference", "bf16", 1, 1024),
        ("lstm", "training", "bf16", 256, 2048),
        ("lstm", "training", "fp16", 64, 512),
        ("lstm", "training", "fp32", 32, 256),
        ("lstm", "training", "tf32", 64, 1024),
        ("gru", "training", "bf16", 64, 512),
        ("gru", "inference", "fp32", 8, 128),
        ("gru", "training", "fp16", 128, 1536),
        ("rnn_tanh", "training", "bf16", 32, 1024),
        ("rnn_tanh", "inference", "tf32", 128, 256),
    )
)
