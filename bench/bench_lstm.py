"""lstm, lstm_cell: an LSTM over sequences, and single steps of it."""

from .recurrent import CENTRED as CENTRED
from .recurrent import Recurrent

STEM = "lstm"
OPS = ("lstm", "lstm_cell")
MATRIX = True

_room = Recurrent(OPS, gates=4, states=2, stacked=True)
cases, tiny, shapes, bytes, flops = _room.cases, _room.tiny, _room.shapes, _room.bytes, _room.flops
bind, providers = _room.bind, _room.providers
