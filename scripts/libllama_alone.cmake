# Read by CMake at the beginning of llama-cpp-python's own build file, which asks for llama.cpp's common library
# whatever it is told. This variable hides that wish.
set(LLAMA_BUILD_COMMON OFF)
