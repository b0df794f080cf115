"""Data-parallel and sharded training on two processes over gloo: the gradients are those of one process."""

from __future__ import annotations

import socket
from textwrap import dedent

from support import run_script

PREPARE = """
    import os, sys, torch, fusedrnn
    import torch.distributed as dist
    import torch.multiprocessing as mp

    def build():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({
            "embed": torch.nn.Linear(3, 4), "rnn": torch.nn.LSTM(4, 4, 2, bidirectional=True),
            "gru": torch.nn.GRU(8, 4), "unused": torch.nn.Linear(2, 2),
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
        used = [name for name, p in expected.named_parameters() if p.grad is not None]
        for option in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view"):
            parts = build()
            if option != "find_unused_parameters":
                parts.parts["unused"] = torch.nn.Identity()
            model = torch.nn.parallel.DistributedDataParallel(parts, **{option: True})
            for _ in range(2):
                model.zero_grad()
                model(mine).backward()
                grads = {name: p.grad for name, p in parts.named_parameters() if "unused" not in name}
                assert list(grads) == used
                for name, grad in grads.items():
                    torch.testing.assert_close(grad, expected.get_parameter(name).grad)
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
            for name, p in model.named_parameters():
                if "unused" not in name:
                    torch.testing.assert_close(p.grad.full_tensor(), expected.get_parameter(name).grad)
        assert "sharded" in str(fusedrnn.survey(fully_shard(torch.nn.GRU(2, 3))))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_replicated():
    """Also with parameters that take no part, and with a graph that torch may take for fixed."""
    result = run_script(_script(REPLICATED))
    assert result.stdout == "same\n", result.stderr


def test_sharded():
    result = run_script(_script(SHARDED))
    assert result.stdout == "same\n", result.stderr


def _script(check: str) -> str:
    return dedent(PREPARE) + dedent(check) + dedent(RUN.format(port=free_port()))
