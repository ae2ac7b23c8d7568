"""Load tests: open-loop Locust suites, budgets, and the gate that decides."""
