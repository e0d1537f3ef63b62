"""Plumbing that every room shares: op declaration, backend choice, autograd recipe, checks, autocast, interception."""
