// Every cell. The schedules include this one list.

#include "rnn.cuh"
#include "lstm.cuh"
#include "gru.cuh"

// Expands to DO(Cell) for each cell that a layer can name.
#define FOR_EACH_CELL(DO) DO(RnnTanh) DO(RnnRelu) DO(LstmCell) DO(GruCell) DO(GruOriginal)
