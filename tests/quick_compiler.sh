# The C++ compiler of the tests for what cells are compiled to at their first use: nothing is optimized, as
# compiling takes far more time than running.
exec c++ "$@" -O0
