// What the tests set and ask of the emulation.

#include "cuda_emulation.h"

#define LID_EXPORT extern "C" __attribute__((visibility("default")))

LID_EXPORT void lid_emulate(int order, unsigned seed, const char* skipped) {
  emulation::machine.order = static_cast<emulation::Order>(order);
  emulation::machine.random.seed(seed);
  emulation::machine.skipped = skipped;
  emulation::machine.error.clear();
  emulation::machine.barriers.clear();
}

LID_EXPORT const char* lid_emulation_error() { return emulation::machine.error.c_str(); }

// Places of the barriers that threads came to, one a line.
LID_EXPORT const char* lid_emulation_barriers() {
  static std::string lines;
  lines.clear();
  for (const std::string& place : emulation::machine.barriers) lines += place + "\n";
  return lines.c_str();
}
