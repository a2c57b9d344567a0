#include "soft.h"

#ifdef __AVX512F__
#include "soft.inl"

const rarefy::SoftRounding* rarefy::soft_rounding_avx512() { return &kRounding; }
#else
const rarefy::SoftRounding* rarefy::soft_rounding_avx512() { return nullptr; }
#endif
