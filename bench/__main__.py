"""`python -m pyops.bench`: the benches alone, as the GPU engine starts them."""

import sys

from .runner import main

sys.exit(main(sys.argv[1:]))
