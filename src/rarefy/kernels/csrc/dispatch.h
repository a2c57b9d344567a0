// One library for every x86-64 processor (and a portable path for the others): each kind of matrix
// keeps a table of functions for each level, compiled in files with that level's flags
// (*_portable.cpp, *_avx2.cpp, *_avx512.cpp), and asks here which to take.
#pragma once

namespace rarefy {

enum class Level {
  portable = 0,
  avx2 = 1,    // with FMA and F16C
  avx512 = 2,  // F, BW, VL, DQ, VNNI
};

// The best level that processor, build and RAREFY_KERNELS (portable, avx2, avx512) allow. The
// environment is read once, at the first call.
Level level();

// Allow no better level than this from here on.
void limit(Level best);

// pick(a, b, c): the table of the level at hand. Where no file is compiled for a level (other
// architectures), its table is null and the next lower one is taken.
template <class Table>
const Table& pick(const Table* portable, const Table* avx2, const Table* avx512) {
  if (level() == Level::avx512 && avx512 != nullptr) return *avx512;
  if (level() != Level::portable && avx2 != nullptr) return *avx2;
  return *portable;
}

}  // namespace rarefy
