"""``python -m fusedrnn demo``: the same language model trained by torch.nn and by fusedrnn, side by side.

A model reads English (the text behind Python's ``help()``) character by character and learns to guess the next one.
For GRU and for LSTM it is trained twice from the same weights on the same text, once with torch.nn's module and once
with fusedrnn's: the losses must agree, and only the speed may differ.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .convert import convert
from .report import Decision, explain

_LAYERS = ("GRU", "LSTM")
_T, _B, _EMBEDDING, _H = 64, 32, 64, 192
_LEARNING_RATE, _LARGEST_NORM = 4e-3, 1.0
_SLICE = 5  # steps that one model trains before it is the other's turn
_SECONDS = 75  # for each layer; then training stops early, and says so
_SAMPLE_LENGTH, _TEMPERATURE = 400, 0.6

#: The promises: in the first steps, before differences in rounding could grow, the losses are equal; and the means
#: of the last steps still agree, as a part of torch.nn's.
_FIRST, _FIRST_TOLERANCE = 50, 1e-3
_LAST, _LAST_TOLERANCE = 20, 0.02

_State = Tensor | tuple[Tensor, Tensor]


class _Data:
    """The text as numbers, cut into as many parallel streams as a batch has rows."""

    def __init__(self) -> None:
        text = _english()
        self.alphabet = sorted(set(text))
        numbers = {character: k for k, character in enumerate(self.alphabet)}
        characters = torch.tensor([numbers[character] for character in text])
        self.length = len(characters) // _B
        self.streams = characters[: self.length * _B].view(_B, self.length).t().contiguous()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The characters (T, B) of a step and those that follow them; the text starts over at its end."""
        start = step % ((self.length - 1) // _T) * _T
        return self.streams[start : start + _T], self.streams[start + 1 : start + _T + 1]


def _english() -> str:
    """The prose of Python's help topics: paragraphs that look like sentences, without tables, grammar and code."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(p.split()) for topic in topics.values() for p in topic.split("\n\n")]
    text = "\n".join(p for p in paragraphs if p[:1].isupper() and p.endswith("."))
    return text.encode("ascii", "ignore").decode()


class _Model(torch.nn.Module):
    """Scores of the next character for each character read."""

    def __init__(self, layer: str, characters: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(characters, _EMBEDDING)
        self.rnn = getattr(torch.nn, layer)(_EMBEDDING, _H)
        self.linear = torch.nn.Linear(_H, characters)

    def forward(self, text: Tensor, state: _State | None) -> tuple[Tensor, _State]:
        """From characters (T, B) and a state to scores (T, B, characters) and the next state."""
        output, state = self.rnn(self.embedding(text), state)
        return self.linear(output), state


@dataclass
class _Training:
    """One model being trained: the loss and the seconds of each step."""

    model: _Model
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    state: _State | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), _LEARNING_RATE)

    def step(self, text: Tensor, following: Tensor) -> None:
        """Learn from characters (T, B) and the ones that follow them, and carry the state on."""
        start = perf_counter()
        scores, state = self.model(text, self.state)
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _LARGEST_NORM)
        self.optimizer.step()
        self.state = state.detach() if isinstance(state, Tensor) else (state[0].detach(), state[1].detach())
        self.losses.append(loss.item())
        self.seconds.append(perf_counter() - start)

    @property
    def tokens_per_second(self) -> float:
        """Characters per second, the median over steps."""
        return _T * _B / statistics.median(self.seconds)

    @property
    def final_loss(self) -> float:
        """Nats per character, the mean over the last steps."""
        return statistics.fmean(self.losses[-_LAST:])


@dataclass
class _Pair:
    """The two trainings of one layer."""

    layer: str
    stock: _Training
    fused: _Training
    decision: Decision

    @property
    def ratio(self) -> float:
        """torch.nn's time over fusedrnn's: of the median steps, as the speeds beside it."""
        return self.fused.tokens_per_second / self.stock.tokens_per_second

    @property
    def compared(self) -> int:
        """How many first steps the first promise is about: all if there are fewer."""
        return min(_FIRST, len(self.fused.losses))

    @property
    def first_difference(self) -> float:
        """Largest difference of the losses in the first steps."""
        pairs = list(zip(self.stock.losses, self.fused.losses, strict=True))[: self.compared]
        return max(abs(s - f) for s, f in pairs)

    @property
    def final_difference(self) -> float:
        """Difference of the final losses as a part of torch.nn's."""
        return abs(self.fused.final_loss / self.stock.final_loss - 1)

    def broken_promises(self) -> list[str]:
        """What was promised and not kept, in words. A loss that is not a number keeps no promise."""
        broken = []
        if not self.first_difference <= _FIRST_TOLERANCE:
            broken.append(
                f"{self.layer}: losses of the first {self.compared} steps differ by up to {self.first_difference:.1e}, "
                f"promised are {_FIRST_TOLERANCE:.0e}"
            )
        if not self.final_difference <= _LAST_TOLERANCE:
            broken.append(
                f"{self.layer}: final losses differ by {self.final_difference:.1%}, promised are {_LAST_TOLERANCE:.0%}"
            )
        return broken


def demo(console: Console, steps: int, seed: int, out: Path) -> bool:
    """Train, print the comparison and a sample of generated text, and draw the losses and speeds.

    Args:
        console: where to print.
        steps: training steps of each model; fewer are done if a layer's time of 75 seconds is over.
        seed: of the weights and the generated text.
        out: path of the PNG.

    Returns:
        whether the promises were kept: the losses of the first 50 steps agree within 1e-3, the final ones within 2%.
    """
    data = _Data()
    console.print(
        f"Text: {data.streams.numel()} characters of Python's help topics. Model: embedding {_EMBEDDING}, "
        f"recurrent layer of {_H} units, linear; batches of {_B} x {_T} characters; Adam; "
        f"{torch.get_num_threads()} threads."
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        pairs = [_train(layer, data, steps, seed, progress) for layer in _LAYERS]
    console.print(_table(pairs))
    for pair in pairs:
        console.print(f"{pair.layer}: {pair.decision}", markup=False)
        if len(pair.fused.losses) < steps:
            console.print(
                f"{pair.layer} stopped after {len(pair.fused.losses)} of {steps} steps: {_SECONDS} s were over"
            )
    best = min(pairs, key=lambda pair: pair.fused.final_loss)
    sample = Text(_sample(best.fused.model, data.alphabet, seed))
    console.print(Panel(sample, title=f"Written by fusedrnn's {best.layer}"))
    _plot(pairs, out)
    console.print(f"plot: {out}", soft_wrap=True)
    for pair in pairs:
        broken = pair.broken_promises()
        for promise in broken:
            console.print(f"PROMISE BROKEN: {promise}", style="bold red", markup=False)
        if not broken:
            console.print(
                f"{pair.layer} kept its promises: losses of the first {pair.compared} steps within "
                f"{_FIRST_TOLERANCE:.0e}, final losses (means of the last {_LAST} steps) within {_LAST_TOLERANCE:.0%}",
                style="green",
            )
    return not any(pair.broken_promises() for pair in pairs)


def _train(layer: str, data: _Data, steps: int, seed: int, progress: Progress) -> _Pair:
    """Train both models in turns of a few steps, so that whatever else the machine does slows both alike."""
    torch.manual_seed(seed)
    model = _Model(layer, len(data.alphabet))
    pair = _Pair(
        layer,
        stock=_Training(model),
        fused=_Training(convert(copy.deepcopy(model))),
        decision=explain(convert(copy.deepcopy(model)), data.batch(0)[0], None).decisions[0],
    )
    bar = progress.add_task(layer, total=steps)
    end = perf_counter() + _SECONDS
    turns = [pair.stock, pair.fused]
    for start in range(0, steps, _SLICE):
        if perf_counter() >= end:
            progress.update(bar, total=start)
            break
        for training in turns:
            for step in range(start, min(start + _SLICE, steps)):
                training.step(*data.batch(step))
        turns.reverse()
        speeds = f"torch.nn {pair.stock.tokens_per_second:,.0f}, fusedrnn {pair.fused.tokens_per_second:,.0f} tokens/s"
        progress.update(
            bar,
            completed=len(pair.fused.losses),
            description=f"{layer}: loss {pair.fused.losses[-1]:.2f}; {speeds}",
        )
    return pair


def _table(pairs: list[_Pair]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Whole training steps: embedding, recurrent layer, linear, backward, Adam")
    for heading in (
        "",
        "first loss",
        f"loss at step {_FIRST}",
        "final loss",
        "tokens/s",
        "ratio",
        "served by",
    ):
        table.add_column(heading, justify="left" if heading in ("", "served by") else "right")
    for pair in pairs:
        for name, training in ((f"torch.nn.{pair.layer}", pair.stock), (f"fusedrnn.{pair.layer}", pair.fused)):
            ours = training is pair.fused
            at_first = f"{training.losses[_FIRST - 1]:.4f}" if pair.compared == _FIRST else "not reached"
            table.add_row(
                name,
                f"{training.losses[0]:.4f}",
                at_first,
                f"{training.final_loss:.4f}",
                f"{training.tokens_per_second:,.0f}",
                f"{pair.ratio:.2f}" if ours else "",
                f"engine {pair.decision.engine}" if ours else "stock torch",
            )
        table.add_row(
            "difference", "", f"up to {pair.first_difference:.1e}", f"{pair.final_difference:.3%}", end_section=True
        )
    return table


def _sample(model: _Model, alphabet: list[str], seed: int) -> str:
    """Text that the model writes, one character at a time."""
    torch.manual_seed(seed)
    text = "The "
    state: _State | None = None
    read = torch.tensor([[alphabet.index(character)] for character in text])
    with torch.no_grad():
        while len(text) < _SAMPLE_LENGTH:
            scores, state = model(read, state)
            read = torch.multinomial(torch.softmax(scores[-1] / _TEMPERATURE, -1), 1)
            text += alphabet[int(read)]
    return text


def _plot(pairs: list[_Pair], out: Path) -> None:
    """Losses on the left, speeds on the right."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    *panels, speeds = figure.subplots(1, len(pairs) + 1)
    colours = {"torch.nn": "tab:orange", "fusedrnn": "tab:blue"}
    for axes, pair in zip(panels, pairs, strict=True):
        axes.plot(pair.stock.losses, color=colours["torch.nn"], linewidth=4, alpha=0.5, label="torch.nn")
        axes.plot(pair.fused.losses, color=colours["fusedrnn"], linewidth=1, label="fusedrnn")
        axes.set_title(f"{pair.layer}: final losses differ by {pair.final_difference:.3%}", fontsize=11)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss, nats per character")
        axes.grid(alpha=0.3)
        axes.legend()
    for place, pair in enumerate(pairs):
        for shift, name, training in ((-0.2, "torch.nn", pair.stock), (0.2, "fusedrnn", pair.fused)):
            value = training.tokens_per_second / 1e3
            bar = speeds.bar(place + shift, value, 0.38, color=colours[name], label=name if place == 0 else None)
            speeds.bar_label(bar, fmt="%.1f")
    labels = [f"{pair.layer}\nratio {pair.ratio:.2f}, engine {pair.decision.engine}" for pair in pairs]
    speeds.set_xticks(range(len(pairs)), labels)
    speeds.set_ylabel("thousand characters per second")
    speeds.set_title("Speed of whole training steps", fontsize=11)
    speeds.margins(y=0.2)
    speeds.legend(loc="upper center", ncols=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
