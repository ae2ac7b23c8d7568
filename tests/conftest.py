"""Before any test module is imported: ONNX Runtime must not report to its maker from tests either."""

import workloads  # noqa: F401 - sets what ONNX Runtime reads when it is loaded
