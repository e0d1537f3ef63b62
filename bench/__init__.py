"""Benchmarks: what an op costs on this machine, against torch, its peers and the machine's own limit."""

from .runner import rooms, run

__all__ = ["rooms", "run"]
