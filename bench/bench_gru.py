"""gru, gru_cell: a GRU over sequences, and single steps of it."""

from .recurrent import CENTRED as CENTRED
from .recurrent import Recurrent

STEM = "gru"
OPS = ("gru", "gru_cell")
MATRIX = True

_room = Recurrent(OPS, gates=3, states=1, stacked=True)
cases, tiny, shapes, bytes, flops = _room.cases, _room.tiny, _room.shapes, _room.bytes, _room.flops
bind, providers = _room.bind, _room.providers
