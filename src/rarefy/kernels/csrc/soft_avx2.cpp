#include "soft.h"

#ifdef __AVX2__
#include "soft.inl"

const rarefy::SoftRounding* rarefy::soft_rounding_avx2() { return &kRounding; }
#else
const rarefy::SoftRounding* rarefy::soft_rounding_avx2() { return nullptr; }
#endif
