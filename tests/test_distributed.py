"""Data-parallel and sharded training on two processes over gloo: the gradients are those of one process."""

from __future__ import annotations

import socket

import pytest
from support import run_script

PREPARE = """
    import os, sys, torch, fusedrnn
    import torch.distributed as dist
    import torch.multiprocessing as mp

    def build():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({
            "embed": torch.nn.Linear(3, 4), "rnn": torch.nn.LSTM(4, 4, 2, bidirectional=True),
            "gru": torch.nn.GRU(8, 4), "unused": torch.nn.Linear(2, 2) if UNUSED else torch.nn.Identity(),
        }).double()
        return fusedrnn.convert(Net(model))

    class Net(torch.nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.parts = parts
        def forward(self, x):
            return self.parts["gru"](self.parts["rnn"](self.parts["embed"](x))[0])[0].square().mean()

    def data():
        torch.manual_seed(1)
        return torch.randn(5, 4, 3, dtype=torch.float64)

    def main(rank, port):
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=2)
        expected = build()
        expected(data()).backward()
        mine = data()[:, 2 * rank : 2 * rank + 2]
        check(rank, expected, mine)
        dist.destroy_process_group()
"""

RUN = """
    if __name__ == "__main__":
        mp.start_processes(main, args=({port},), nprocs=2, start_method="fork")
        print("same")
"""

REPLICATED = """
    def check(rank, expected, mine):
        model = torch.nn.parallel.DistributedDataParallel(build(), **OPTIONS)
        for _ in range(2):
            model.zero_grad()
            model(mine).backward()
            for (name, p), q in zip(model.module.named_parameters(), expected.parameters()):
                if p.grad is not None or q.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad, msg=name)
"""

SHARDED = """
    from torch.distributed.fsdp import fully_shard

    def check(rank, expected, mine):
        model = build()
        for part in (model.parts["rnn"], model.parts["gru"], model):
            fully_shard(part)
        assert isinstance(model.parts["rnn"], torch.nn.LSTM)
        assert isinstance(model.parts["rnn"], fusedrnn.LSTM)
        for _ in range(2):
            model.zero_grad()
            model(mine).backward()
            for (name, p), q in zip(model.named_parameters(), expected.parameters()):
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)
        assert "sharded" in str(fusedrnn.survey(fully_shard(torch.nn.GRU(2, 3))))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("options", ["", "static_graph=True", "find_unused_parameters=True"])
def test_replicated(options):
    unused = options.startswith("find_unused")
    script = f"UNUSED, OPTIONS = {unused}, dict({options})\n" + _script(REPLICATED)
    result = run_script(script)
    assert result.stdout == "same\n", result.stderr


def test_sharded():
    result = run_script("UNUSED = False\n" + _script(SHARDED))
    assert result.stdout == "same\n", result.stderr


def _script(check: str) -> str:
    from textwrap import dedent

    return dedent(PREPARE) + dedent(check) + dedent(RUN.format(port=free_port()))
