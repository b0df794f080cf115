"""Everything of torch that one may do with a module, for every module: against torch.nn in plain eager mode, float64.

The table is also the page docs/compatibility.md, which ``python tests/test_compatibility.py`` writes anew.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import assert_equal, backward, build, call_of, flat, loss_of
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import fusedrnn

MODULES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
T, B, I, H = 4, 3, 6, 5  # all different: torch.compile takes equal sizes for one
PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"

# torch says these of its own insides.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed. Please remove usage:DeprecationWarning"),
]


@dataclass(frozen=True)
class Row:
    """One line of the table: what is done, whether it is supported, how; and the check, which takes a module's name."""

    section: str
    name: str
    check: Callable[[str], None]
    answer: str
    note: str
    slow: bool


TABLE: list[Row] = []


def row(
    section: str, name: str, answer: str = "yes", note: str = "", slow: bool = False
) -> Callable[[Callable[[str], None]], None]:
    def register(check: Callable[[str], None]) -> None:
        TABLE.append(Row(section, name, check, answer, note, slow))

    return register


def rows_of(kind):
    return (B,) if kind.endswith("Cell") else (T, B)


def options(kind):
    """Both directions for the modules that have them."""
    return {"dtype": torch.float64} if kind.endswith("Cell") else {"dtype": torch.float64, "bidirectional": True}


def pair(kind):
    """torch.nn's module and ours with the same weights, and arguments for both that want gradients."""
    theirs, ours = (m for m in twins_of(kind))
    return theirs, ours, call_of(ours, *rows_of(kind), requires_grad=True)


def twins_of(kind):
    theirs = getattr(torch.nn, kind)(I, H, **options(kind))
    ours = getattr(fusedrnn, kind)(I, H, **options(kind))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tuple_of(module, hx):
    """The module as a function from its input to a tuple of tensors."""
    return lambda x: tuple(flat(module(x, hx)))


def scalar_of(module, hx):
    return lambda x: loss_of([torch.sin(t) for t in flat(module(x, hx))])


COMPILE = "torch.compile"


def check_compiled(kind, backend):
    torch.compiler.reset()
    theirs, ours, call = pair(kind)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    assert_close(backward(compiled, *call), rename(backward(theirs, *call)))
    with torch.no_grad():
        assert_close(compiled(*call), theirs(*call))


def rename(results):
    """As the parameters of a compiled module are called."""
    return {
        name.replace("gradient of weight", "gradient of _orig_mod.weight").replace(
            "gradient of bias", "gradient of _orig_mod.bias"
        ): value
        for name, value in results.items()
    }


@row(COMPILE, 'backend "eager", fullgraph, forward and backward', note="nothing to set; one operator a layer")
def _(kind):
    check_compiled(kind, "eager")


@row(COMPILE, 'backend "aot_eager"')
def _(kind):
    check_compiled(kind, "aot_eager")


@row(COMPILE, 'backend "inductor"', slow=True)
def _(kind):
    check_compiled(kind, "inductor")


@row(COMPILE, "T and B change without compiling again", note="`dynamic=True`, or after one change", slow=True)
def _(kind):
    torch.compiler.reset()
    theirs, ours, _ = pair(kind)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, guard in (((4, 3), False), ((6, 5), True), ((9, 2), True)):
        call = call_of(ours, *rows[-len(rows_of(kind)) :])
        with torch._dynamo.config.patch(error_on_recompile=guard):
            assert_close(compiled(*call), theirs(*call))


@row(COMPILE, "inside a larger model, in training and eval mode", slow=True)
def _(kind):
    torch.compiler.reset()
    theirs, ours, (x, _) = pair(kind)
    models = [torch.nn.ModuleDict({"a": torch.nn.Linear(I, I).double(), "b": m}) for m in (theirs, ours)]
    models[1]["a"].load_state_dict(models[0]["a"].state_dict())

    def run(model, x):
        return flat(model["b"](model["a"](x)))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for train in (True, False):
        models[1].train(train)
        assert_close(compiled(models[1], x), run(models[0], x))


@row(COMPILE, "torch.func inside the compiled function", slow=True)
def _(kind):
    torch.compiler.reset()
    theirs, ours, (x, hx) = pair(kind)
    x, hx = x.detach(), tuple(h.detach() for h in hx) if isinstance(hx, tuple) else hx.detach()
    compiled = torch.compile(torch.func.grad(scalar_of(ours, hx)), backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), torch.func.grad(scalar_of(theirs, hx))(x))


@row(COMPILE, "second derivatives", "no", "torch.compile has none; take them uncompiled")
def _(kind):
    torch.compiler.reset()
    _, ours, call = pair(kind)
    loss = scalar_of(torch.compile(ours, backend="aot_eager"), call[1])(call[0])
    (grad,) = torch.autograd.grad(loss, call[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), call[0])


EXPORT = "Export"


def check_exported(kind, strict):
    theirs, ours, call = pair(kind)
    dims = [torch.export.Dim(name, min=2) for name in ("T", "B")][-len(rows_of(kind)) :]
    of_x = dict(enumerate(dims))
    of_state = {len(rows_of(kind)) - 1: dims[-1]}
    shapes = (of_x, (of_state, of_state) if isinstance(call[1], tuple) else of_state)
    program = torch.export.export(ours, call, dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if "fusedrnn" in str(node.target)]
    assert targets == ["fusedrnn.layer.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    other = call_of(ours, *(n + 2 for n in rows_of(kind)))
    assert_close(torch.export.load(file).module()(*other), theirs(*other))


@row(EXPORT, "torch.export, strict", note="dynamic T and B; the program needs `import fusedrnn` where it is loaded")
def _(kind):
    check_exported(kind, strict=True)


@row(EXPORT, "torch.export, not strict")
def _(kind):
    check_exported(kind, strict=False)


@row(EXPORT, "torch.fx.symbolic_trace", note="a leaf of the graph, as torch.nn's are")
def _(kind):
    class Net(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x, hx):
            return self.module(2 * x, hx)

    theirs, ours, call = pair(kind)
    graph = torch.fx.symbolic_trace(Net(ours))
    stock = torch.fx.symbolic_trace(Net(theirs))
    assert str(graph.graph) == str(stock.graph)
    assert_close(graph(*call), theirs(2 * call[0], call[1]))
    assert_close(fusedrnn.revert(graph)(*call), stock(*call))


@row(EXPORT, "torch.onnx.export", "how", "`fusedrnn.revert(model)` first: then standard LSTM, GRU and RNN nodes")
def _(kind):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    ours = getattr(fusedrnn, kind)(I, H).eval()
    x, file = torch.randn(*rows_of(kind), I), io.BytesIO()
    expected = flat(ours(x))
    with pytest.raises(RuntimeError, match=r"does not know .*fusedrnn\.revert\(model\)"):
        torch.onnx.export(ours, (x,), file, dynamo=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of what it does not do with other shapes
        torch.onnx.export(fusedrnn.revert(ours), (x,), file, dynamo=False, input_names=["x"])
    nodes = {node.op_type for node in pytest.importorskip("onnx").load_from_string(file.getvalue()).graph.node}
    assert kind in nodes or kind.endswith("Cell")
    got = runtime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})
    assert_close([torch.from_numpy(array) for array in got], expected)


@row(EXPORT, "torch.jit.script, torch.jit.trace", "how", "`fusedrnn.revert(model)` first; the error says so")
def _(kind):
    _, ours, call = pair(kind)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script does not know .*fusedrnn\.revert\(model\)"):
        torch.jit.script(torch.nn.Sequential(ours))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace does not know .*fusedrnn\.revert\(model\)"):
        torch.jit.trace(ours, call)


FUNC = "torch.func and derivatives"


@row(FUNC, "vmap over inputs", note="one call: the members become rows")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    xs = torch.randn(5, *x.shape, dtype=x.dtype)
    expected = [torch.stack(r) for r in zip(*(tuple_of(theirs, hx)(x) for x in xs), strict=True)]
    assert_close(list(torch.func.vmap(tuple_of(ours, hx))(xs)), expected)
    moved = torch.func.vmap(tuple_of(ours, hx), in_dims=1)(xs.movedim(0, 1))
    assert_close(list(moved), expected)


@row(FUNC, "vmap over states", note="one call")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    hxs = torch.utils._pytree.tree_map(lambda h: torch.randn(5, *h.shape, dtype=h.dtype), hx)
    got = torch.func.vmap(lambda h: tuple(flat(ours(x, h))))(hxs)
    members = [torch.utils._pytree.tree_map(lambda h, k=k: h[k], hxs) for k in range(5)]
    assert_close(list(got), [torch.stack(r) for r in zip(*(flat(theirs(x, h)) for h in members), strict=True)])


@row(FUNC, "vmap over weights (ensembles)", note="a call for each member")
def _(kind):
    _, _, (x, hx) = pair(kind)
    members = [twins_of(kind)[0] for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(members)
    skeleton = getattr(fusedrnn, kind)(I, H, **options(kind), device="meta")

    def call(w, b, x):
        return tuple(flat(torch.func.functional_call(skeleton, (w, b), (x, hx))))

    expected = [torch.stack(r) for r in zip(*(flat(m(x, hx)) for m in members), strict=True)]
    assert_close(list(torch.func.vmap(call, in_dims=(0, 0, None))(weights, buffers, x)), expected)


@row(FUNC, "gradient of each sample", note="forward in one call, backward in one for each sample")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    xs, weights = torch.randn(4, *x.shape, dtype=x.dtype), dict(ours.named_parameters())

    def loss(module, weights, x):
        return loss_of(torch.func.functional_call(module, weights, (x, hx)))

    got = torch.func.vmap(torch.func.grad(lambda w, x: loss(ours, w, x)), in_dims=(None, 0))(weights, xs)
    for name, grads in got.items():
        expected = [torch.autograd.grad(loss(theirs, weights, x), weights[name])[0] for x in xs]
        assert_close(grads, torch.stack(expected))


@row(FUNC, "functional_call, grad, vjp")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    weights = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    x = x.detach()

    def of(module):
        def loss(weights, x):
            return loss_of(torch.func.functional_call(module, weights, (x, hx)))

        return torch.func.grad(loss, argnums=(0, 1))(weights, x), torch.func.vjp(loss, weights, x)[1](x.new_ones(()))

    assert_close(of(ours), of(theirs))


@row(FUNC, "jvp, jacfwd, dual numbers", note="by the reference, step by step: slow, never zero")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    x, v = x.detach(), torch.randn_like(x)
    expected = torch.autograd.functional.jacobian(lambda x: flat(theirs(x, hx))[0], x)
    assert_close(torch.func.jacfwd(lambda x: flat(ours(x, hx))[0])(x), expected)
    along = (expected * v).flatten(-v.dim()).sum(-1)
    assert along.any()
    assert_close(torch.func.jvp(tuple_of(ours, hx), (x,), (v,))[1][0], along)
    with forward_ad.dual_level():
        result = flat(ours(forward_ad.make_dual(x, v), hx))[0]
        assert_close(forward_ad.unpack_dual(result).tangent, along)


@row(FUNC, "jacrev")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    expected = torch.autograd.functional.jacobian(lambda x: flat(theirs(x, hx))[0], x.detach())
    assert_close(torch.func.jacrev(lambda x: flat(ours(x, hx))[0])(x.detach()), expected)


@row(FUNC, "Hessians: forward over reverse, reverse over reverse", note="second derivatives by the reference")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    x = x.detach()
    expected = torch.autograd.functional.hessian(scalar_of(theirs, hx), x)
    assert_close(torch.func.hessian(scalar_of(ours, hx))(x), expected)
    assert_close(torch.func.jacrev(torch.func.jacrev(scalar_of(ours, hx)))(x), expected)


@row(FUNC, "Hessian-vector products, all arguments and weights")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in weights.items()}

    def product(module, outer):
        def loss(weights):
            return scalar_of(lambda x, hx: torch.func.functional_call(module, weights, (x, hx)), hx)(x)

        if outer == "forward":
            return torch.func.jvp(torch.func.grad(loss), (weights,), (v,))[1]
        if outer == "reverse":
            return torch.func.vjp(torch.func.grad(loss), weights)[1](v)[0]
        leaves = [w.clone().requires_grad_() for w in weights.values()]
        first = torch.autograd.grad(loss(dict(zip(weights, leaves, strict=True))), leaves, create_graph=True)
        return dict(zip(weights, torch.autograd.grad(first, leaves, list(v.values())), strict=True))

    expected = product(theirs, "eager")
    for outer in ("eager", "forward", "reverse"):
        assert_close(product(ours, outer), expected)


@row(FUNC, "gradients of a batch of vectors (is_grads_batched)")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    results = [flat(m(x, hx))[0] for m in (theirs, ours)]
    vectors = torch.randn(3, *results[0].shape, dtype=x.dtype)
    assert_close(*(torch.autograd.grad(r, x, vectors, is_grads_batched=True)[0] for r in results))


MODES = "Modes and tensors"


@row(MODES, "FakeTensorMode")
def _(kind):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        module = build(fusedrnn, kind_of(kind), I, H)
        call = call_of(module, *rows_of(kind), requires_grad=True)
        results = backward(module, *call)
    real = backward(m := build(fusedrnn, kind_of(kind), I, H), *call_of(m, *rows_of(kind), requires_grad=True))
    assert {n: t.shape for n, t in results.items()} == {n: t.shape for n, t in real.items()}


def kind_of(kind):
    """As tests/support.py calls it."""
    return {"RNN": "RNN_tanh", "RNNCell": "RNNCell_tanh"}.get(kind, kind)


@row(MODES, "meta device")
def _(kind):
    theirs, ours = (getattr(where, kind)(I, H, device="meta") for where in (torch.nn, fusedrnn))
    x = torch.randn(*rows_of(kind), I, device="meta")
    assert [t.shape for t in flat(ours(x))] == [t.shape for t in flat(theirs(x))]


@row(MODES, "inference_mode, no_grad")
def _(kind):
    theirs, ours, call = pair(kind)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert_close(ours(*call), theirs(*call))


@row(MODES, "autocast, bfloat16 and float16", note="casts as torch's; float16 computed in float32")
def _(kind):
    theirs, ours = (m.float() for m in twins_of(kind))
    call = call_of(ours, *rows_of(kind), requires_grad=True)
    expected = backward(theirs, *call)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            got = backward(ours, *call)
        for name, want in expected.items():
            assert_close(got[name].float(), want, rtol=0, atol=0.05 * want.abs().max().item())


@row(MODES, "subclasses of Tensor")
def _(kind):
    class Named(torch.Tensor):
        pass

    theirs, ours, (x, hx) = pair(kind)
    result = ours(x.as_subclass(Named), hx)
    assert {type(t) for t in flat(result)} == {Named}
    assert_close([t.as_subclass(torch.Tensor) for t in flat(result)], flat(theirs(x, hx)))


@row(MODES, "torch dispatch modes")
def _(kind):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    theirs, ours, call = pair(kind)
    with Seeing():
        got = backward(ours, *call)
    assert_close(got, backward(theirs, *call))
    assert "fusedrnn.layer_backward.default" in seen


@row(MODES, "checkpoint, saved-tensor hooks")
def _(kind):
    from torch.utils.checkpoint import checkpoint

    theirs, ours, call = pair(kind)
    expected, run = backward(theirs, *call), Module(ours)
    for reentrant in (True, False):
        run.forward = lambda *call, r=reentrant: checkpoint(ours, *call, use_reentrant=r)
        assert_close({n.replace("of module.", "of "): t for n, t in backward(run, *call).items()}, expected) if (
            not reentrant
        ) else loss_of(run(*call)).backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        assert_close(backward(ours, *call), expected)
    assert packed


class Module(torch.nn.Module):
    """A module around another."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@row(MODES, "hooks on modules and tensors")
def _(kind):
    theirs, ours, (x, hx) = pair(kind)
    heard = []
    for module in (theirs, ours):
        module.register_forward_pre_hook(lambda m, given: (2 * given[0], *given[1:]))
        module.register_full_backward_hook(lambda m, gi, go: heard.append([g for g in gi if g is not None]))
        next(module.parameters()).register_hook(lambda g: 3 * g)
    assert_close(backward(ours, x, hx), backward(theirs, x, hx))
    assert_close(heard[0], heard[1])


WEIGHTS = "Weights"


@row(WEIGHTS, "parametrize: weight_norm, spectral_norm, orthogonal", note="torch.nn ignores it in its own modules")
def _(kind):
    for parametrization in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ):
        theirs, ours, call = pair(kind)
        name = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
        ours.eval()
        parametrization(ours, name)
        expected = torch.func.functional_call(theirs, {name: getattr(ours, name)}, call)
        assert_close(ours(*call), expected)


@row(WEIGHTS, "replaced by a tensor (weight drop), tied, .data assigned")
def _(kind):
    suffix = "" if kind.endswith("Cell") else "_l0"
    theirs, ours = (getattr(where, kind)(H, H, dtype=torch.float64) for where in (torch.nn, fusedrnn))
    ours.load_state_dict(theirs.state_dict())
    call = call_of(ours, *rows_of(kind))
    raw = torch.nn.Parameter(getattr(ours, f"weight_hh{suffix}").detach().clone())
    grads = []
    for module in (theirs, ours):
        setattr(module, f"bias_hh{suffix}", getattr(module, f"bias_ih{suffix}"))
        getattr(module, f"weight_ih{suffix}").data = raw.detach() + 1
        delattr(module, f"weight_hh{suffix}")
        setattr(module, f"weight_hh{suffix}", raw * 0.5)
        grads.append(torch.autograd.grad(loss_of(module(*call)), [raw, *module.parameters()]))
    assert_close(*grads)


@row(WEIGHTS, "pickle, deepcopy, torch.save, load with weights_only, share_memory")
def _(kind):
    _, ours, call = pair(kind)
    expected = ours(*call)
    assert_equal(copy.deepcopy(ours)(*call), expected)
    assert_equal(pickle.loads(pickle.dumps(ours))(*call), expected)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other = getattr(fusedrnn, kind)(I, H, **options(kind))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(other.share_memory()(*call), expected)


@row(WEIGHTS, "torch.use_deterministic_algorithms; the same bits each time")
def _(kind):
    _, ours, call = pair(kind)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(backward(ours, *call), backward(ours, *call))
    finally:
        torch.use_deterministic_algorithms(False)


def cells_of_the_table():
    """Every module in every line, but of the slow lines a sequence and a cell only in the sample that runs always."""
    for line in TABLE:
        for kind in MODULES:
            left = line.slow and kind not in ("LSTM", "GRUCell")
            marks = [pytest.mark.full] if left else []
            yield pytest.param(line, kind, id=f"{line.name.replace(' ', '_')}-{kind}", marks=marks)


@pytest.mark.parametrize(("line", "kind"), list(cells_of_the_table()))
def test_row(line, kind):
    line.check(kind)


def page() -> str:
    """The table in Markdown."""
    lines = [
        "# What works together",
        "",
        "Written by `python tests/test_compatibility.py` from the tests, which run every line for every module and",
        "compare it with torch.nn in plain eager mode. *How* means: with the step in the last column.",
    ]
    section = ""
    for line in TABLE:
        if line.section != section:
            section = line.section
            lines += ["", f"## {section}", "", "| | " + " | ".join(MODULES) + " | |", "|---|" + "---|" * 7]
        lines.append(f"| {line.name} | " + " | ".join([line.answer] * len(MODULES)) + f" | {line.note} |")
    return "\n".join([*lines, "", *(PAGE_END.strip().splitlines()), ""])


PAGE_END = """
## Elsewhere in the tests

| | | |
|---|---|---|
| DistributedDataParallel, also static graph and unused parameters | yes | tests/test_distributed.py |
| fully_shard (FSDP2) | yes | convert before sharding |
| AOTInductor package | yes | loaded in a process that imports fusedrnn |
| PackedSequence as an argument of a compiled function | yes | tests/test_compile.py |
| PackedSequence made inside an exported program | how | give the padded batch and `lengths` instead |
| tensor subclasses with a `__torch_dispatch__` of their own | yes | by the reference, step by step: slow |
| forward mode around a compiled module that trains | no | torch.compile has none: `requires_grad_(False)` |
| `type(m) is torch.nn.LSTM` in code that can't be edited | how | `with fusedrnn.patch():` instead of `convert` |

## On torch 2.4, the oldest

The tables above hold there too, except that transforms of torch.func run the reference, step by step: torch had no vmap
rules for operators yet. torch.compile takes no PackedSequence as an argument, no jacfwd inside, no compiled autograd.
"""


def test_page():
    assert PAGE.read_text() == page(), "run python tests/test_compatibility.py"


if __name__ == "__main__":
    PAGE.write_text(page())
