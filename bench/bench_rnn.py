"""rnn_tanh, rnn_tanh_cell, rnn_relu_cell: an RNN over sequences, and single steps of it."""

from .recurrent import CENTRED as CENTRED
from .recurrent import Recurrent

STEM = "rnn"
OPS = ("rnn_tanh", "rnn_tanh_cell", "rnn_relu_cell")
MATRIX = True

_room = Recurrent(OPS, gates=1, states=1)
cases, tiny, shapes, bytes, flops = _room.cases, _room.tiny, _room.shapes, _room.bytes, _room.flops
bind, providers = _room.bind, _room.providers
