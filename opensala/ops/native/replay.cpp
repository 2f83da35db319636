// A list of calls, made one after the other: what a step of a model costs without Python between its kernels.
#include "replay.h"

// `program`: for each call the address of a packed function, the number of its arguments, and the arguments.
extern "C" void opensala_replay(const int64_t* program, int64_t length) {
  for (int64_t i = 0; i < length; i += 2 + program[i + 1])
    reinterpret_cast<void (*)(const int64_t*)>(program[i])(program + i + 2);
}
