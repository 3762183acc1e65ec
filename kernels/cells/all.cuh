// Every cell. The schedules include this one list.

#include "rnn.cuh"
#include "lstm.cuh"
#include "gru.cuh"
