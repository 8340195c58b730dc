"""Gates in recurrent networks: equations that show, differentiate, test and run themselves.

This file is the only one of the package that is not exported from a notebook; nbdev keeps its version up to date.
"""
__version__ = "0.1.0"

from gatednb.symbols import s, x
from gatednb.gates import Gate, catalogue, find_gate, hard_sigmoid, register, sigmoid, tanh
from gatednb.cells import Cell
from gatednb.layers import GRU, LSTM, MGU, RecurrentLayer
from gatednb.steps import GRUCell, LSTMCell, MGUCell, RecurrentCell
from gatednb.sst import SSTGRU, squared_sigmoid, squared_tanh
from gatednb.contrast import shifted_sigmoid, shifted_steep_sigmoid, smoothstep
from gatednb.refined import RefinedGRU, RefinedLSTM, RefinedMGU, refined_add, refined_mul
from gatednb.kaf import KAFGRU, kaf, kernel_gate
from gatednb.family import chrono_, uniform_, ur
from gatednb.zoo.gates import fast_sigmoid, hard_sigmoid_sixth
from gatednb.zoo.light import forget_share, linear, positive, relu, rg_lru_gate
