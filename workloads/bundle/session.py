"""A model of a bundle under ONNX Runtime, as a server that answers from one event loop opens it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """One thread, and no memory that is kept for later: parallelism here is between processes.

    Raises whatever ONNX Runtime raises, whose exceptions have no base class of their own.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
