"""The rows of the logits that the probe reads are those that TensorRT-LLM's own `HandleLogits` gives each request.

TRTLLM_HOME: a checkout of TensorRT-LLM, or the folder that holds the installed package. Its file is run as it is, with
stand-ins for what it imports, since the package itself needs a GPU.
"""

import importlib.util
import inspect
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.rollout.trtllm.probe import _places

FILE = "tensorrt_llm/_torch/pyexecutor/handle_logits.py"
HOME = os.environ.get("TRTLLM_HOME")

pytestmark = pytest.mark.skipif(not HOME, reason=f"TRTLLM_HOME names no folder with {FILE}")


def upstream() -> Any:
    """The class `HandleLogits` of TRTLLM_HOME."""
    names = ("tensorrt_llm", "tensorrt_llm._torch", "tensorrt_llm._torch.pyexecutor")
    modules = {name: types.ModuleType(name) for name in names}
    requests = types.ModuleType("tensorrt_llm._torch.pyexecutor.llm_request")
    requests.LlmRequest = object  # type: ignore[attr-defined]
    requests.LlmRequestState = types.SimpleNamespace(GENERATION_COMPLETE="complete")  # type: ignore[attr-defined]
    utils, logger = types.ModuleType("tensorrt_llm._utils"), types.ModuleType("tensorrt_llm.logger")
    utils.nvtx_range = lambda name: lambda function: function  # type: ignore[attr-defined]
    logger.logger = mock.MagicMock()  # type: ignore[attr-defined]
    modules |= {module.__name__: module for module in (requests, utils, logger)}
    spec = importlib.util.spec_from_file_location("upstream_handle_logits", Path(str(HOME)) / FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules):
        spec.loader.exec_module(module)
    return module.HandleLogits


@dataclass
class Result:
    rows: list[int] = field(default_factory=list)

    def append_generation_logits(self, logits: torch.Tensor) -> None:
        self.rows.append(int(logits))

    def append_context_logits(self, logits: torch.Tensor) -> None: ...


@dataclass
class Request:
    """What upstream and the probe read of a request."""

    py_client_id: int
    context_chunk_size: int = 0
    is_last_context_chunk: bool = True
    py_return_context_logits: bool = False
    py_return_generation_logits: bool = True
    context_current_position: int = 0
    prepopulated_prompt_len: int = 0
    request_id: int = 0
    py_batch_idx: int | None = None
    max_beam_num_tokens: int = 5
    state: str = "running"
    py_result: Result = field(default_factory=Result)


CONTEXTS = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.booleans()), max_size=6)


@given(contexts=CONTEXTS, generations=st.integers(0, 6))
def test_the_rows_are_upstreams(contexts: list[tuple[int, bool, bool]], generations: int) -> None:
    context = [
        Request(number, chunk, is_last_context_chunk=last, py_return_context_logits=whole)
        for number, (chunk, last, whole) in enumerate(contexts)
    ]
    generation = [Request(100 + number) for number in range(generations)]
    starts = [0]  # a request has a row, or one for each token of its chunk
    for request in context:
        starts.append(starts[-1] + (request.context_chunk_size if request.py_return_context_logits else 1))
    logits = torch.arange(starts[-1] + generations, dtype=torch.float64)[:, None]
    handle = upstream()()
    given_by_name = {
        "context_requests": context, "generation_requests": generation, "logits": logits, "beam_width": 1,
        "num_context_logits_prefix_sum": starts, "is_generation_model": True,
    }  # fmt: skip
    handle(**{name: given_by_name[name] for name in inspect.signature(handle).parameters if name in given_by_name})
    expected = {request.py_client_id: request.py_result.rows for request in (*context, *generation)}
    scheduled = types.SimpleNamespace(context_requests=context, generation_requests=generation)
    ours: dict[int | None, list[int]] = {client: [] for client in expected}
    for row, client, _ in _places(scheduled, None):
        ours[client].append(row)
    assert ours == expected
