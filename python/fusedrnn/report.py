"""What is installed, and what ran: nothing that fusedrnn chooses stays hidden."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from . import engines, installation
from .engines import listener
from .engines.base import Call
from .gpus import describe_gpus, describe_paths


@dataclass(frozen=True)
class Decision:
    """How one layer of one call was served.

    Attributes:
        layer: what the call was: cell, sizes, dtype, directions.
        engine: the engine's name.
        kernel: what the engine says of its kernel.
        reasons: why this engine: it was asked for, or for each engine preferred to it why it could not serve.
    """

    layer: str
    engine: str
    kernel: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.layer, f"  engine {self.engine}: {self.kernel}", *(f"  {r}" for r in self.reasons)])


@dataclass(frozen=True)
class Explanation:
    """The decisions of one run, in order. Printing it is what it is for."""

    decisions: tuple[Decision, ...]
    stock: tuple[str, ...]

    def __str__(self) -> str:
        lines = [str(decision) for decision in self.decisions]
        lines += [
            f"{name}: a module of torch.nn, not fusedrnn's; convert(model) would change it" for name in self.stock
        ]
        return "\n".join(lines) or "no recurrent layer ran"


def explain(module: torch.nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Run ``module(*inputs, **kwargs)`` once and tell which engine and kernel served each recurrent layer, and why.

    The run is a real one, in the module's current mode and with gradients as they are enabled now; the state of
    torch's random number generators is put back afterwards.

    Args:
        module: any module.
        *inputs: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        an :class:`Explanation`; ``str`` of it is a text to read.

    Raises:
        whatever the module raises.
    """
    decisions: list[Decision] = []

    def listen(call: Call, choice: engines.Choice) -> None:
        decisions.append(_decision(call, choice))

    token = listener.set(listen)
    try:
        with torch.random.fork_rng():
            module(*inputs, **kwargs)
    finally:
        listener.reset(token)
    stock = [
        name or type(m).__name__
        for name, m in module.named_modules()
        if isinstance(m, torch.nn.RNNBase | torch.nn.RNNCellBase) and type(m).forward.__module__.startswith("torch.")
    ]
    return Explanation(tuple(decisions), tuple(stock))


def _decision(call: Call, choice: engines.Choice) -> Decision:
    engine, dtype = choice.engine, call.input.dtype
    shape = f"T={call.time} B={call.batch} I={call.input.shape[-1]} H={call.hidden_size}"
    details = [shape, str(dtype).removeprefix("torch."), str(call.input.device)]
    if call.output_size != call.hidden_size:
        details.append(f"projected to {call.output_size}")
    if call.directions == 2:
        details.append("bidirectional")
    if call.batch_sizes is not None:
        details.append("packed")
    options = {"lengths": call.lengths, "resets": call.resets, "recurrent dropout": call.h_mask}
    details += [name for name, given in (options | {"zoneout": call.zoneout or None}).items() if given is not None]
    reasons = ["asked for by fusedrnn.engine or FUSEDRNN_ENGINE"] if choice.forced else []
    if choice.route is not None:
        reasons.append(choice.route)
    reasons += [f"not {name}: {why}" for name, why in choice.declined.items()]
    if call.recompute and not engine.recomputes:
        reasons.append("keeps everything for backward, whatever save says: only the C++ engine computes gates again")
    compute = engine.computes_in(dtype)
    if compute != dtype:
        reasons.append(f"{dtype} is converted to {compute}, computed in it, and converted back")
    return Decision(f"{call.cell.name} ({', '.join(details)})", engine.name, engine.describe(call), tuple(reasons))


@dataclass(frozen=True)
class Info:
    """Versions, compilers, processor, GPUs and engines of this installation. Printing it is what it is for.

    Attributes:
        versions: of fusedrnn, torch and Python.
        compiled: by which compilers and for which GPUs; empty if not by an installation.
        processor: its name.
        threads: how many torch, and so fusedrnn, uses.
        gpus: each GPU, and the versions of CUDA; empty without one.
        engines: for each engine ``"ready"`` with its kernels, or why it is unavailable.
        paths: which path each cell, arithmetic and width takes on the current GPU; empty without CUDA kernels for it.
    """

    versions: dict[str, str]
    compiled: str
    processor: str
    threads: int
    gpus: dict[str, str]
    engines: dict[str, str]
    paths: dict[str, str]

    def __str__(self) -> str:
        rows = self.versions | ({"compiled by": self.compiled} if self.compiled else {})
        rows |= {"processor": self.processor, "threads": str(self.threads)}
        rows |= self.gpus | {f"engine {name}": state for name, state in self.engines.items()} | self.paths
        width = max(map(len, rows))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


def info() -> Info:
    """What this installation of fusedrnn can do on this machine.

    Returns:
        an :class:`Info`; ``str`` of it is a table to read.
    """
    from . import __version__

    states = {}
    for name, engine in engines.ENGINES.items():
        reason = engine.available()
        states[name] = "ready" if reason is None else f"unavailable: {reason}"
    if engines.cpu._cpu is not None:
        supported = ", ".join(engines.cpu._cpu.isas())
        try:
            states["cpu"] = f"ready, {engines.cpu._cpu.isa()} (this machine runs: {supported})"
        except RuntimeError as error:
            states["cpu"] = f"unavailable: {error}"
    gpus, cuda = describe_gpus(), engines.ENGINES["cuda"]
    return Info(
        versions={"fusedrnn": __version__, "torch": torch.__version__, "python": platform.python_version()},
        compiled=installation.built_with(),
        processor=_processor(),
        threads=torch.get_num_threads(),
        gpus=gpus,
        engines=states,
        paths=describe_paths(cuda, torch.cuda.current_device()) if gpus and states["cuda"] == "ready" else {},
    )


def _processor() -> str:
    # The name that a guest is told may leave out which generation it is: on x86, family and model tell.
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, colon, value = line.partition(":")
                if not colon:
                    break
                facts[key.strip()] = value.strip()
    except OSError:
        pass
    if "model name" in facts:
        words = (("family", "cpu family"), ("model", "model"))
        generation = [f"{word} {facts[key]}" for word, key in words if key in facts]
        return ", ".join([f"{facts['model name']} ({platform.machine()})", *generation])
    return platform.processor() or platform.machine()
