"""What runs at the two sites: data, models, bundles and the services that serve them."""

import os

# ONNX Runtime (1.29 and later) sends usage data to its maker unless it is told not to before it is loaded, and keeps
# a device id on disk. What is served here, and for whom, is nobody else's business.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
