"""Programs of other people, trained with torch.nn's recurrent modules and with fusedrnn's: equal losses, and the times.

Each client builds a model of a published package on data made here, and trains it for a few steps. It runs twice from
one seed, the second time converted, or patched where the package asks for classes or constructs modules as it goes.
Run by ``make clients``, which installs the packages in an environment of their own.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

import fusedrnn

STEPS, ROUNDS, TOLERANCE = 6, 5, 2e-4
#: A client returns its model and one training step, which returns the loss.
Client = Callable[[], tuple[torch.nn.Module, Callable[[], Tensor]]]
CLIENTS: dict[str, tuple[Client, bool]] = {}


def client(name: str, *, patched: bool = False) -> Callable[[Client], Client]:
    """Register a client; ``patched`` runs it inside ``fusedrnn.patch()`` instead of converting its model."""

    def register(make: Client) -> Client:
        CLIENTS[name] = make, patched
        return make

    return register


def trained(model: torch.nn.Module, loss: Callable[[], Tensor]) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """The usual step: backward and Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return model, step


@client("neural-amp-modeler: an LSTM subclass over audio, learned initial state")
def neural_amp_modeler():
    from nam.models.recurrent import LSTM

    model = LSTM(hidden_size=24, train_burn_in=128, train_truncate=256, num_layers=1)
    x, y = torch.randn(8, 1024), torch.randn(8, 1024)
    return trained(model, lambda: (model(x, pad_start=False) - y).square().mean())


@client("torch-geometric: Set2Set and GRU aggregation over a graph's nodes")
def torch_geometric():
    from torch_geometric.nn.aggr import GRUAggregation, Set2Set

    model = torch.nn.ModuleList([Set2Set(32, 6), GRUAggregation(32, 16)])
    x, index = torch.randn(200, 32), torch.arange(20).repeat_interleave(10)
    return trained(model, lambda: sum(m(x, index, dim_size=20).square().mean() for m in model))


@client("torch-geometric: gated graph convolution, a GRUCell over every node", patched=True)
def torch_geometric_cells():
    from torch_geometric.nn import GatedGraphConv

    model = GatedGraphConv(32, 4)
    x, edges = torch.randn(2000, 32), torch.randint(2000, (2, 8000))
    return trained(model, lambda: model(x, edges).square().mean())


@client("snntorch: a spiking LSTM, cell by cell")
def snntorch():
    from snntorch import SLSTM

    model = SLSTM(20, 32, threshold=0.1)
    x = torch.randn(30, 16, 20)

    def loss() -> Tensor:
        syn, mem = model.reset_mem()
        total = x.new_zeros(())
        for frame in x:
            spikes, syn, mem = model(frame, syn, mem)
            total = total + mem.square().mean() + spikes.mean()
        return total

    return trained(model, loss)


@client("fastai: AWD-LSTM language model with weight drop")
def fastai():
    from fastai.text.models.awdlstm import AWD_LSTM

    model = AWD_LSTM(100, 32, 64, 2)
    head = torch.nn.Linear(32, 100)
    tokens = torch.randint(100, (8, 36))
    both = torch.nn.ModuleList([model, head])

    def loss() -> Tensor:
        model.reset()
        out = head(model(tokens[:, :-1]))
        return torch.nn.functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())

    return trained(both, loss)


@client("rsl-rl-lib: a recurrent policy, rollout and update over padded trajectories")
def rsl_rl():
    from rsl_rl.modules import RNN

    model = RNN(24, 64, 1, "gru")
    frames, masks = torch.randn(24, 32, 24), torch.ones(24, 32, dtype=torch.bool)

    def loss() -> Tensor:
        model.reset()
        with torch.no_grad():
            for frame in frames:
                model(frame)
                model.reset((frame[:, 0] > 1.5).int())
        return model(frames, masks, torch.zeros(1, 32, 64)).square().mean()

    return trained(model, loss)


@client("gluonts: DeepAR, negative log-likelihood")
def gluonts():
    from gluonts.torch.model.deepar.module import DeepARModel

    model = DeepARModel("h", 24, 12, num_layers=2, hidden_size=40, dropout_rate=0.1, lags_seq=[1, 2, 24])
    past, batch = model._past_length, 16
    data = {
        "feat_static_cat": torch.zeros(batch, 1, dtype=torch.long),
        "feat_static_real": torch.zeros(batch, 1),
        "past_time_feat": torch.randn(batch, past, 1),
        "past_target": torch.randn(batch, past),
        "past_observed_values": torch.ones(batch, past),
        "future_time_feat": torch.randn(batch, 12, 1),
        "future_target": torch.randn(batch, 12),
        "future_observed_values": torch.ones(batch, 12),
    }
    return trained(model, lambda: model.loss(**data).mean())


@client("pypots: BRITS imputation, LSTM cells both ways")
def pypots():
    from pypots.nn.modules.brits import BackboneBRITS
    from pypots.nn.modules.loss import MAE

    model = BackboneBRITS(20, 8, 32, MAE())
    batch = 16
    mask = (torch.rand(batch, 20, 8) > 0.2).float()
    x = torch.randn(batch, 20, 8) * mask
    way = {"X": x, "missing_mask": mask, "deltas": torch.rand(batch, 20, 8)}
    data = {"forward": way, "backward": {key: value.flip(1) for key, value in way.items()}}

    def loss() -> Tensor:
        results = model(data)
        return sum(r for r in results[-3:] if r.dim() == 0)

    return trained(model, loss)


@contextmanager
def on(which: str, model: torch.nn.Module, patched: bool) -> Iterator[None]:
    """Run the block on torch.nn or on fusedrnn."""
    if which == "fusedrnn" and not patched:
        fusedrnn.convert(model)
    with fusedrnn.patch() if which == "fusedrnn" and patched else nullcontext():
        yield


def compare(make: Client, patched: bool) -> tuple[float, float, int]:
    """The largest relative difference of losses, torch.nn's time over fusedrnn's, and how many layers ran on ours.

    The two take turns, so that whatever else the machine does meets both alike.
    """
    losses: dict[str, list[float]] = {"torch": [], "fusedrnn": []}
    pairs = {}
    for which in losses:
        torch.manual_seed(0)
        model, step = make()
        pairs[which] = model, step
        torch.manual_seed(1)
        with on(which, model, patched):
            losses[which] = [float(step()) for _ in range(STEPS)]
            if which == "fusedrnn":
                decisions = fusedrnn.explain(_Once(step)).decisions
    if not decisions or any(d.engine in ("torch", "reference") for d in decisions):
        raise AssertionError(f"fusedrnn's kernels did not run: {decisions}")
    seconds: dict[str, list[float]] = {which: [] for which in pairs}
    for _ in range(ROUNDS):
        for which, (model, step) in pairs.items():
            with on(which, model, patched):
                start = time.perf_counter()
                step()
                seconds[which].append(time.perf_counter() - start)
    pair = zip(losses["torch"], losses["fusedrnn"], strict=True)
    difference = max(abs(a - b) / max(abs(a), 1e-6) for a, b in pair)
    ratio = statistics.median(a / b for a, b in zip(seconds["torch"], seconds["fusedrnn"], strict=True))
    return difference, ratio, len(decisions)


class _Once(torch.nn.Module):
    """One training step as a module, which is what explain takes."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self) -> None:
        self.step()


def main() -> int:
    """Run the clients named on the command line, or all; the exit status is the number of failures."""
    warnings.simplefilter("ignore")
    failures = 0
    chosen = {n: c for n, c in CLIENTS.items() if not sys.argv[1:] or c[0].__name__ in sys.argv[1:]}
    for name, (make, patched) in chosen.items():
        difference, ratio, layers = compare(make, patched)
        good = difference <= TOLERANCE
        failures += not good
        print(
            f"{'ok  ' if good else 'FAIL'} {name}: losses differ by {difference:.1e}, torch.nn's time / fusedrnn's "
            f"{ratio:.2f}, {layers} layer calls a step",
            flush=True,
        )
    print(f"{len(chosen) - failures} passed, {failures} failed")
    return failures


if __name__ == "__main__":
    raise SystemExit(main())
