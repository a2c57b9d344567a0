#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "matrix.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rarefy {
namespace {

Level processor() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool halves = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (!halves || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2")) {
    return Level::portable;
  }
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni");
  return wide ? Level::avx512 : Level::avx2;
#else
  return Level::portable;
#endif
}

Level named(const char* name) {
  if (name != nullptr && std::strcmp(name, "portable") == 0) return Level::portable;
  if (name != nullptr && std::strcmp(name, "avx2") == 0) return Level::avx2;
  return Level::avx512;
}

Level lower(Level a, Level b) { return a < b ? a : b; }

std::atomic<Level>& current() {
  static std::atomic<Level> value{lower(processor(), named(std::getenv("RAREFY_KERNELS")))};
  return value;
}

}  // namespace

Level level() { return current().load(std::memory_order_relaxed); }

void limit(Level best) { current().store(lower(processor(), best)); }

}  // namespace rarefy

extern "C" const char* rarefy_instructions(void) {
  switch (rarefy::level()) {
    case rarefy::Level::avx512:
      return "avx512-vnni";
    case rarefy::Level::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

extern "C" const char* rarefy_limit(const char* name) {
  rarefy::limit(rarefy::named(name));
  return rarefy_instructions();
}
