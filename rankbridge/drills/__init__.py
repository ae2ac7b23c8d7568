"""Fault drills: one declarative entry per fault, made on running sites under constant load, judged by a ledger."""
