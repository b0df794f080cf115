"""The contestants of the CPU's benchmark beside fusedrnn and torch.nn, each in the form that suits it best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .contestants import CONTESTANTS, FUSEDRNN, Job, NotOfferedError, Task

CELL_LOOP, ONNXRUNTIME, OPENVINO, JAX = "torch.nn cells", "onnxruntime", "openvino", "jax"


@dataclass(frozen=True)
class Peer:
    """A contestant and what it needs.

    Attributes:
        prepare: makes a job of a task; raises NotOfferedError.
        packages: that must be installed.
        jitted: whether it compiles a whole training step ahead of running it.
        settings: environment variables with which its process gets a number of threads; all heed its affinity too.
    """

    prepare: Callable[[Task, int], Job]
    packages: tuple[str, ...] = ()
    jitted: bool = False
    settings: Callable[[int], dict[str, str]] = lambda threads: {}


def installed() -> list[str]:
    """The contestants that can run here."""
    return [name for name, peer in PEERS.items() if all(find_spec(package) for package in peer.packages)]


def _in_process(name: str) -> Peer:
    def prepare(task: Task, threads: int) -> Job:
        return CONTESTANTS[name](task)

    return Peer(prepare)


def _plain_layer(task: Task, who: str) -> torch.nn.RNNBase:
    """The module of a dense task that is not a single step."""
    if not isinstance(task.module, torch.nn.RNNBase):
        raise NotOfferedError(f"{who}: no modules of one step")
    if task.batch_sizes is not None:
        raise NotOfferedError(f"{who}: no packed input")
    return task.module


def _weights_by_layer(module: torch.nn.RNNBase) -> list[list[list[Tensor]]]:
    """[layer][direction][w_ih, w_hh, b_ih, b_hh]."""
    directions = 2 if module.bidirectional else 1
    all_weights: list[list[Any]] = module.all_weights
    return [all_weights[k : k + directions] for k in range(0, len(all_weights), directions)]


def _array(tensor: Tensor) -> Any:
    """As NumPy; bfloat16, which NumPy lacks, in float32, which holds it."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _cell_loop(task: Task, threads: int) -> Job:
    """torch.nn's LSTMCell, GRUCell or RNNCell called for every step."""
    module = _plain_layer(task, CELL_LOOP)
    if module.num_layers > 1 or module.bidirectional:
        raise NotOfferedError(f"{CELL_LOOP}: one layer in one direction only")
    kind: Any = {"LSTM": torch.nn.LSTMCell, "GRU": torch.nn.GRUCell}.get(module.mode, torch.nn.RNNCell)
    options = {"nonlinearity": module.mode.removeprefix("RNN_").lower()} if kind is torch.nn.RNNCell else {}
    cell = kind(module.input_size, module.hidden_size, dtype=task.data.dtype, **options)
    for mine, theirs in zip(cell.parameters(), module.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    leaves = [task.data, *cell.parameters()]
    is_lstm = module.mode == "LSTM"

    def infer() -> Tensor:
        state, outputs = None, []
        for x in task.data:
            state = cell(x, state)
            outputs.append(state[0] if is_lstm else state)
        return torch.stack(outputs)

    def train() -> list[Tensor]:
        output = infer()
        return [output, *torch.autograd.grad(output, leaves, task.grad_output)]

    return Job(train) if task.training else Job(infer, lambda output: [output])


#: Where ONNX puts the gates that torch has in order: LSTM i f g o as i o f c, GRU r z n as z r h.
_ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def _onnx_model(module: torch.nn.RNNBase, T: int, B: int) -> bytes:
    """A model of the ONNX operators RNN, GRU and LSTM with fixed sizes, from ``x`` (T, B, I) to ``y``."""
    import onnx
    from onnx import helper, numpy_helper

    operator = module.mode.partition("_")[0]
    directions, H = 2 if module.bidirectional else 1, module.hidden_size
    nodes, constants, source = [], [], "x"

    def constant(name: str, tensors: Sequence[Tensor]) -> str:
        constants.append(numpy_helper.from_array(_array(torch.stack(list(tensors))), name))
        return name

    def reordered(weight: Tensor) -> Tensor:
        gates = weight.detach().chunk(len(_ONNX_GATES[operator]))
        return torch.cat([gates[place] for place in _ONNX_GATES[operator]])

    for k, layer in enumerate(_weights_by_layer(module)):
        w, r = (constant(f"{name}{k}", [reordered(d[which]) for d in layer]) for which, name in ((0, "w"), (1, "r")))
        b = constant(f"b{k}", [torch.cat([reordered(d[2]), reordered(d[3])]) for d in layer])
        options: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if directions == 2 else "forward"}
        if operator == "GRU":
            options["linear_before_reset"] = 1
        if operator == "RNN":
            options["activations"] = [{"RNN_TANH": "Tanh", "RNN_RELU": "Relu"}[module.mode]] * directions
        nodes.append(helper.make_node(operator, [source, w, r, b], [f"raw{k}"], **options))
        # The operators return (T, directions, B, H).
        constants.append(numpy_helper.from_array(torch.tensor([T, B, directions * H]).numpy(), f"shape{k}"))
        moved = f"raw{k}"
        if directions == 2:
            nodes.append(helper.make_node("Transpose", [moved], [f"moved{k}"], perm=[0, 2, 1, 3]))
            moved = f"moved{k}"
        source = f"y{k}" if k < module.num_layers - 1 else "y"
        nodes.append(helper.make_node("Reshape", [moved, f"shape{k}"], [source]))
    kind = helper.np_dtype_to_tensor_dtype(_array(module.all_weights[0][0]).dtype)
    x = helper.make_tensor_value_info("x", kind, [T, B, module.input_size])
    y = helper.make_tensor_value_info("y", kind, [T, B, directions * H])
    graph = helper.make_graph(nodes, "layers", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _inference_model(task: Task, who: str, dtypes: Sequence[torch.dtype]) -> bytes:
    module = _plain_layer(task, who)
    if task.training:
        raise NotOfferedError(f"{who}: no training")
    if task.data.dtype not in dtypes:
        raise NotOfferedError(f"{who}: no {str(task.data.dtype).removeprefix('torch.')}")
    T, B, _ = task.data.shape
    return _onnx_model(module, T, B)


def _onnxruntime(task: Task, threads: int) -> Job:
    model = _inference_model(task, ONNXRUNTIME, (torch.float32, torch.float64))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": _array(task.data)}
    return Job(lambda: session.run(None, feed), lambda results: [torch.from_numpy(results[0])])


def _openvino(task: Task, threads: int) -> Job:
    model = _inference_model(task, OPENVINO, (torch.float32, torch.bfloat16))
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Left to itself it computes in bfloat16 wherever the processor has instructions for that.
        "INFERENCE_PRECISION_HINT": "bf16" if task.data.dtype == torch.bfloat16 else "f32",
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(_array(task.data), shared_memory=True))

    def tensors(_: Any) -> list[Tensor]:
        return [torch.from_numpy(request.get_output_tensor().data.copy()).to(task.data.dtype)]

    return Job(request.infer, tensors)


def _jax(task: Task, threads: int) -> Job:
    """A scan over time behind one product for all inputs, compiled as a whole; weights transposed as JAX's users do."""
    module = _plain_layer(task, JAX)
    import jax
    import jax.numpy as jnp

    H = module.hidden_size
    dtype = getattr(jnp, str(task.data.dtype).removeprefix("torch."))
    if task.data.dtype == torch.float64:
        jax.config.update("jax_enable_x64", True)

    def ours(tensor: Tensor) -> Any:
        return jnp.asarray(_array(tensor.T.contiguous() if tensor.dim() == 2 else tensor), dtype)

    def theirs(array: Any) -> Tensor:  # NumPy has no bfloat16
        tensor = torch.from_numpy(jax.device_get(array.astype(jnp.promote_types(dtype, jnp.float32))).copy())
        return (tensor.T if tensor.dim() == 2 else tensor).to(task.data.dtype)

    def lstm(w: Any, b: Any, state: Any, z: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(z + h @ w + b, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru(w: Any, b: Any, state: Any, z: Any) -> Any:
        (h,) = state
        hidden = h @ w + b
        r, u = jnp.split(jax.nn.sigmoid(z[:, : 2 * H] + hidden[:, : 2 * H]), 2, axis=-1)
        n = jnp.tanh(z[:, 2 * H :] + r * hidden[:, 2 * H :])
        h = (1 - u) * n + u * h
        return (h,), h

    def rnn(w: Any, b: Any, state: Any, z: Any) -> Any:
        (h,) = state
        z = z + h @ w + b
        h = jnp.tanh(z) if module.mode == "RNN_TANH" else jax.nn.relu(z)
        return (h,), h

    step = {"LSTM": lstm, "GRU": gru}.get(module.mode, rnn)
    states = 2 if step is lstm else 1

    def forward(x: Any, layers: Any) -> Any:
        for layer in layers:
            outputs = []
            for reverse, (w_ih, w_hh, b_ih, b_hh) in enumerate(layer):
                start = (jnp.zeros((x.shape[1], H), dtype),) * states
                z = x @ w_ih + b_ih
                _, y = jax.lax.scan(lambda s, z, w=w_hh, b=b_hh: step(w, b, s, z), start, z, reverse=bool(reverse))
                outputs.append(y)
            x = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
        return x

    def train(x: Any, layers: Any, grad: Any) -> Any:
        y, backward = jax.vjp(forward, x, layers)
        return y, *backward(grad)

    x = jnp.asarray(_array(task.data), dtype)
    layers = [[[ours(w) for w in direction] for direction in layer] for layer in _weights_by_layer(module)]
    arguments: tuple[Any, ...] = (x, layers)
    if task.grad_output is not None:
        arguments = (x, layers, jnp.asarray(_array(task.grad_output), dtype))
    compiled = jax.jit(train if task.training else forward).lower(*arguments).compile()

    def tensors(result: Any) -> list[Tensor]:
        if not task.training:
            return [theirs(result)]
        y, dx, d_layers = result
        return [theirs(y), theirs(dx), *(theirs(w) for layer in d_layers for d in layer for w in d)]

    return Job(lambda: jax.block_until_ready(compiled(*arguments)), tensors)


def _jax_settings(threads: int) -> dict[str, str]:
    flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


#: Everybody, in the order of the tables. A new peer is a new entry.
PEERS: dict[str, Peer] = {
    **{name: _in_process(name) for name in CONTESTANTS},
    CELL_LOOP: Peer(_cell_loop),
    ONNXRUNTIME: Peer(_onnxruntime, ("onnxruntime", "onnx")),
    OPENVINO: Peer(_openvino, ("openvino", "onnx")),
    JAX: Peer(_jax, ("jax",), jitted=True, settings=_jax_settings),
}


def rivals(names: Sequence[str], T: int, mode: str) -> list[str]:
    """Of the contestants, those that fusedrnn is measured against: in training one step, not the compiled ones, which
    pay no autograd."""
    eager_only = T == 1 and mode == "training"
    return [name for name in names if name != FUSEDRNN and not (eager_only and PEERS[name].jitted)]
