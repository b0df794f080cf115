"""What holds for all shapes and options: the oracle's values, and how results of related calls are related."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CELL_KINDS, CELLS, DTYPES, SEQUENCE_KINDS, TARGETS, Case, build, call_of, check, flat, loss_of
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence, unpad_sequence
from torch.testing import assert_close

import fusedrnn

# Stock torch says so of itself, at the first such call.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

sizes = st.integers(1, 40)
steps = st.integers(1, 12)
rows = st.integers(1, 20)
seeds = st.integers(0, 2**16)


@st.composite
def cases(draw):
    """A case of any options that fit each other."""
    cell = draw(st.sampled_from(CELLS))
    layout = draw(st.sampled_from(["dense", "unbatched", "sorted", "unsorted", "cell", "unbatched_cell"]))
    is_cell = layout.endswith("cell")
    projected = cell == "lstm" and not is_cell and draw(st.booleans())
    return Case(
        target=draw(st.sampled_from([target for target in TARGETS if target.isa])),
        cell=cell,
        dtype=draw(st.sampled_from(DTYPES)),
        layout=layout,
        layers=1 if is_cell else draw(st.integers(1, 3)),
        directions=1 if is_cell else draw(st.integers(1, 2)),
        projected=projected,
        bias=draw(st.booleans()),
        hx=draw(st.booleans()),
        batch_first=not is_cell and draw(st.booleans()),
        strided=draw(st.booleans()),
        loss=draw(st.sampled_from(["both", "output", "final"])),
        threads=draw(st.integers(1, 3)),
        T=1 if is_cell else draw(steps),
        B=draw(rows),
        I=draw(sizes),
        H=draw(st.integers(2, 40) if projected else sizes),
        seed=draw(seeds),
    )


@st.composite
def modules(draw, kind, **options):
    """A float64 module and a call of it; H is at least 4, wider than the projection."""
    torch.manual_seed(draw(seeds))
    I, H = draw(sizes), draw(st.integers(4, 40))
    module = build(fusedrnn, kind, I, H, dtype=torch.float64, **options)
    return module, *call_of(module, draw(steps), draw(rows))


def of_states(hx, change):
    return tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)


def unpadded(x, lengths):
    """The rows alone. (torch's function transposes its argument in place unless it is batch first.)"""
    return unpad_sequence(x.transpose(0, 1), lengths, batch_first=True)


@settings(max_examples=300)
@given(cases())
def test_compiled_engine_agrees_with_the_oracle(case):
    check(case)


class TestRelations:
    """Between calls of one module, gradients included. A sum may be taken in another order, so not bit by bit."""

    @pytest.fixture(params=SEQUENCE_KINDS)
    def kind(self, request):
        return request.param

    def gradients(self, module, *results):
        return torch.autograd.grad(sum(map(loss_of, results)), list(module.parameters()))

    @settings(max_examples=10)
    @given(data=st.data())
    def test_rows_do_not_see_each_other(self, engine, kind, data):
        """A permuted batch gives the permuted results."""
        module, x, hx = data.draw(modules(kind, bidirectional=True))
        order = torch.randperm(x.shape[1])
        plain, permuted = flat(module(x, hx)), flat(module(x[:, order], of_states(hx, lambda h: h[:, order])))
        assert_close(permuted, [t[:, order] for t in plain])
        restored = [t[:, order.argsort()] for t in permuted]
        assert_close(self.gradients(module, restored), self.gradients(module, plain))

    @settings(max_examples=10)
    @given(data=st.data())
    def test_state_carries_all(self, engine, kind, data):
        """A sequence cut in two, the state handed over, is the whole sequence."""
        module, x, hx = data.draw(modules(kind, num_layers=2))
        x = torch.cat([x, torch.randn_like(x[:1])])
        cut = data.draw(st.integers(1, len(x) - 1))
        output, final = module(x, hx)
        first, between = module(x[:cut], hx)
        second, last = module(x[cut:], between)
        joined = torch.cat([first, second])
        assert_close((joined, last), (output, final))
        assert_close(self.gradients(module, joined, last), self.gradients(module, output, final))

    @settings(max_examples=10)
    @given(data=st.data())
    def test_packed_rows_are_rows_alone(self, engine, kind, data):
        module, x, hx = data.draw(modules(kind, bidirectional=True))
        T, B, _ = x.shape
        lengths = torch.tensor([T, *data.draw(st.lists(st.integers(1, T), min_size=B - 1, max_size=B - 1))])
        lengths = lengths[torch.randperm(B)]
        packed, final = module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        output, _ = pad_packed_sequence(packed)
        alone = [module(row, of_states(hx, lambda h, b=b: h[:, b])) for b, row in enumerate(unpadded(x, lengths))]
        assert_close(unpadded(output, lengths), [out for out, _ in alone])
        finals = [torch.stack(states, 1) for states in zip(*(flat([last]) for _, last in alone), strict=True)]
        assert_close(finals, flat([final]))
        padded = pad_sequence([out for out, _ in alone])
        assert_close(self.gradients(module, padded, finals), self.gradients(module, output, final))

    @settings(max_examples=10)
    @given(data=st.data())
    def test_backwards_is_forwards_of_the_flipped(self, engine, kind, data):
        both, x, hx = data.draw(modules(kind, bidirectional=True))
        single = build(fusedrnn, kind, both.input_size, both.hidden_size, dtype=torch.float64)
        single.load_state_dict({name: getattr(both, f"{name}_reverse") for name in single.state_dict()})
        output, final = both(x, hx)
        flipped, last = single(x.flip(0), of_states(hx, lambda h: h[1:]))
        assert_close(flipped.flip(0), output.chunk(2, -1)[1])
        assert_close(last, of_states(final, lambda h: h[1:]))

    @settings(max_examples=10)
    @given(data=st.data())
    def test_sequence_is_its_steps(self, engine, kind, data):
        """One call over T steps is T calls of one step."""
        module, x, hx = data.draw(modules(kind))
        output, final = module(x, hx)
        outputs, state = [], hx
        for step in x:
            out, state = module(step[None], state)
            outputs.append(out)
        joined = torch.cat(outputs)
        assert_close((joined, state), (output, final))
        assert_close(self.gradients(module, joined, state), self.gradients(module, output, final))

    @settings(max_examples=10)
    @given(data=st.data())
    @pytest.mark.parametrize("cell_kind", CELL_KINDS)
    def test_sequence_is_steps_of_the_cell(self, engine, cell_kind, data):
        module, x, hx = data.draw(modules(cell_kind.replace("Cell", "")))
        cell = build(fusedrnn, cell_kind, module.input_size, module.hidden_size, dtype=torch.float64)
        cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in module.state_dict().items()})
        output, _ = module(x, hx)
        state, outputs = of_states(hx, lambda h: h[0]), []
        for step in x:
            state = cell(step, state)
            outputs.append(flat([state])[0])
        joined = torch.stack(outputs)
        assert_close(joined, output)
        assert_close(self.gradients(cell, joined), self.gradients(module, output))

    @settings(max_examples=10)
    @given(data=st.data())
    def test_layers_are_modules_in_a_row(self, engine, kind, data):
        deep, x, hx = data.draw(modules(kind, num_layers=2))
        output, final = deep(x, hx)
        for layer in range(2):
            single = build(fusedrnn, kind, x.shape[-1], deep.hidden_size, dtype=torch.float64)
            weights = {name: getattr(deep, name.replace("_l0", f"_l{layer}")) for name in single.state_dict()}
            x, last = torch.func.functional_call(single, weights, (x, of_states(hx, lambda h, k=layer: h[k : k + 1])))
            assert_close(last, of_states(final, lambda h, k=layer: h[k : k + 1]))
        assert_close(x, output)
        assert_close(self.gradients(deep, x), self.gradients(deep, output))
