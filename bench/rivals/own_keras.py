"""An LSTM with peepholes as a cell of one's own: in Keras."""

import keras
from keras import ops


class Peephole(keras.layers.Layer):
    def __init__(self, units, **options):
        super().__init__(**options)
        self.units, self.state_size = units, [units, units]

    def build(self, shape):
        H = self.units
        self.W = self.add_weight(shape=(shape[-1], 4 * H), name="W")
        self.U = self.add_weight(shape=(H, 4 * H), name="U")
        self.b = self.add_weight(shape=(4 * H,), initializer="zeros", name="b")
        self.p_i = self.add_weight(shape=(H,), initializer="zeros", name="p_i")
        self.p_f = self.add_weight(shape=(H,), initializer="zeros", name="p_f")
        self.p_o = self.add_weight(shape=(H,), initializer="zeros", name="p_o")

    def call(self, x, states):
        h, c = states
        i, f, g, o = ops.split(x @ self.W + h @ self.U + self.b, 4, axis=1)
        i = ops.sigmoid(i + self.p_i * c)
        f = ops.sigmoid(f + self.p_f * c)
        c = f * c + i * ops.tanh(g)
        o = ops.sigmoid(o + self.p_o * c)
        h = o * ops.tanh(c)
        return h, [h, c]

    def get_config(self):
        return super().get_config() | {"units": self.units}


def make(input_size, hidden_size):
    layer = keras.layers.RNN(Peephole(hidden_size), return_sequences=True, return_state=True)
    layer.build((None, None, input_size))
    return layer
