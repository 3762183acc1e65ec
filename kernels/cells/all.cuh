// Every cell. The schedules include this one list.

#include "cell.cuh"

#include "rnn.cuh"
#include "lstm.cuh"
#include "gru.cuh"

// Expands to DO(Cell) for each cell that a layer can name.
#define FOR_EACH_CELL(DO) DO(rnn_tanh) DO(rnn_relu) DO(lstm) DO(gru) DO(gru_original)
