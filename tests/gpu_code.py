"""What Inductor generates for a GPU, on a machine without one.

A graph is traced for the CPU; before it is lowered, all its tensors are said to be on a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, graph, scheduler
from torch._inductor.exc import InductorError
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

triton = pytest.importorskip("triton")

GPU = torch.device("cuda:0")
PROPERTIES = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
)  # fmt: skip


class Generated(Exception):
    """Ends a compilation where what was generated would be compiled."""


def generated(call, monkeypatch):
    """The code of the first graph that `call` compiles."""
    found = []
    run = graph.GraphLowering.run

    def lower(self, *args):
        for node in self.module.graph.nodes:
            node.meta["val"] = tree_map(_on_gpu, node.meta.get("val"))
            if "device" in node.kwargs:
                node.update_kwarg("device", GPU)
        self.module.recompile()
        self.example_inputs = [_on_gpu(x) for x in args]
        self.device_types, self.device_idxs = {GPU.type}, {GPU.index}
        return run(self, *self.example_inputs)

    def generate(self):
        found.append(self.codegen()[0].value)
        raise Generated

    properties = SimpleNamespace(major=9, minor=0, total_memory=1 << 37, multi_processor_count=132)
    driver = SimpleNamespace(
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32),
        get_current_device=lambda: GPU.index,
    )
    with monkeypatch.context() as m, pytest.raises(InductorError, match="Generated"):
        m.setattr(graph.GraphLowering, "run", lower)
        m.setattr(graph.GraphLowering, "compile_to_module", generate)
        m.setattr(compile_fx, "_check_triton_bf16_support", lambda graph: None)
        m.setattr(scheduler, "has_triton", lambda: True)
        m.setattr(DeviceProperties, "create", lambda device: PROPERTIES)
        m.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        m.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        m.setattr(CudaInterface.Worker, "current_device", lambda: GPU.index)
        m.setattr(triton.runtime.driver, "_active", driver)
        call()
    torch._dynamo.reset()
    (code,) = found
    return code


def _on_gpu(x):
    if not isinstance(x, FakeTensor):
        return x
    as_it_lies = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    return FakeTensor(x.fake_mode, as_it_lies, GPU)
